"""Files that verbs write besides their product."""

import json
from collections.abc import Mapping
from typing import Any

from etils import epath


def write_json(path: epath.PathLike, figures: Mapping[str, Any]) -> None:
    """Writes figures for other programs; folders are made as needed."""
    file = epath.Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(figures, indent=2) + "\n")
