"""Directories that are complete or absent."""

import contextlib
import fnmatch
import json
import os
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from etils import epath

from flexolmo_jax import distributed
from flexolmo_jax.errors import UserError
from flexolmo_jax.paths import is_remote


@contextlib.contextmanager
def atomic_directory(path: epath.PathLike, manifest: str = "", names: Collection[str] = ()) -> Iterator[epath.Path]:
    """Yields a directory to fill, which is there under its name only when the block ends well.

    Locally that is a temporary directory beside `path`, renamed at the end. Object stores (`://`) cannot rename a
    directory in one step: there `path` itself is filled, and it counts as absent until it has its manifest, which the
    block writes last. What a killed attempt left behind is removed by the next one.

    Of several processes, all fill the directory of the first one, which makes and renames it.

    Args:
      path: the directory to make.
      manifest: the file that makes a directory in an object store complete.
      names: what such a directory holds at its top, names or patterns (`*`); anything else is never removed.

    Raises:
      UserError: `path` exists already.
    """
    path = epath.Path(path)
    in_place = is_remote(path)
    filled = path if in_place else path.parent / f".{path.name}.incomplete"
    complete = True
    try:
        with distributed.agreed(f"begin {path.name}"):
            if distributed.is_primary():
                check_absent(path, manifest, names)
                if filled.exists():
                    filled.rmtree()
                complete = False
                filled.mkdir(parents=True)
        yield filled
        with distributed.agreed(f"finish {path.name}"):
            if distributed.is_primary() and not in_place:
                _sync(filled)
                filled.rename(path)
                _sync(path.parent)
        complete = True
    except OSError as error:
        # An error of writing names no file, or one in the temporary directory, which the user does not know.
        if error.filename is None or os.fspath(filled) in str(error.filename):
            error.filename = os.fspath(path)
        raise
    finally:
        if not complete:
            with contextlib.suppress(OSError):  # the first error counts; the next attempt removes the rest
                if filled.exists():
                    filled.rmtree()


def check_absent(path: epath.PathLike, manifest: str = "", names: Collection[str] = ()) -> None:
    """Raises UserError where `atomic_directory` would, before long work; arguments are the same."""
    path = epath.Path(path)
    if path.exists() and not (is_remote(path) and _is_leftover(path, manifest, names)):
        raise UserError(f"{path}: exists already; name a new directory, or remove this one first")


def commit(file: epath.Path, document: Mapping[str, Any]) -> None:
    """Writes the manifest of a directory, the last of its files, and has it stored before the directory is renamed."""
    with file.open("w") as stream:
        stream.write(json.dumps(document, indent=2) + "\n")
        if not is_remote(file):
            stream.flush()
            os.fsync(stream.fileno())


def _is_leftover(path: epath.Path, manifest: str, names: Collection[str]) -> bool:
    found = {entry.name for entry in path.iterdir()} if path.is_dir() else {""}
    known = all(any(fnmatch.fnmatchcase(name, pattern) for pattern in names) for name in found)
    return bool(manifest) and manifest not in found and known


def _sync(directory: epath.Path) -> None:
    """Has the names in a directory written to disk where the file system can, not the content of its files."""
    with contextlib.suppress(OSError):
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
