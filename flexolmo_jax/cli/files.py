"""Files that commands write besides their output."""

import json
from collections.abc import Mapping
from typing import Any

from etils import epath


def write_json(path: epath.PathLike, results: Mapping[str, Any]) -> None:
    """Writes results as JSON, and creates missing folders."""
    file = epath.Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(results, indent=2) + "\n")
