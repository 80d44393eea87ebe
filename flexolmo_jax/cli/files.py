"""Paths that flags name, and JSON files that commands write besides their output."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from flexolmo_jax.data.corpus import path_labels
from flexolmo_jax.errors import ArgumentError


def write_json(path: epath.PathLike, results: Mapping[str, Any]) -> None:
    """Writes results as JSON, and creates missing folders."""
    file = epath.Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(results, indent=2) + "\n")


def label_paths(flag: str, values: Sequence[str]) -> dict[str, str]:
    """Returns {label: directory} of values that are a directory or NAME=DIR. What exists is a directory.

    Directories without a name are labelled by what distinguishes their paths.

    Raises:
      ArgumentError: a name or a directory is empty, or two have the same label.
    """
    named, unnamed = {}, []
    for value in values:
        name, equals, path = value.partition("=")
        if not equals or epath.Path(value).exists() or "/" in name:
            unnamed.append(value)
        elif not name or not path:
            raise ArgumentError(flag, value, "is neither a directory nor NAME=DIR")
        else:
            named[value] = (name, path)
    labels = path_labels(unnamed)
    labelled: dict[str, str] = {}
    for value in values:
        label, path = named.get(value) or (labels[value], value)
        if label in labelled:
            raise ArgumentError(flag, value, f"is the second called {label!r}; name it with NAME=DIR")
        labelled[label] = path
    return labelled
