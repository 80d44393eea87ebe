"""Copies of remote token files and indices on the local disk, which are memory-mapped: by SHA-256, each made once."""

import hashlib
import pathlib
from collections.abc import Callable

import filelock
import platformdirs
from etils import epath

from flexolmo_jax.errors import UserError

_READ_BYTES = 1 << 22


def local_copy(file: epath.Path, sha256: str, advance: Callable[[int], None] = lambda size: None) -> epath.Path:
    """Returns the local copy of a remote file, which is made where there is none.

    It lies in the user's cache directory (`XDG_CACHE_HOME`), under its digest. Of several processes of a machine the
    first makes it, and the others wait. A copy that was interrupted does not count.

    Args:
      file: the remote file.
      sha256: of its content, in hex.
      advance: called with the number of bytes of each read.

    Raises:
      UserError: the file is missing, or its content is another.
    """
    copy = folder() / f"{sha256}{file.suffix}"
    copy.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(copy.with_suffix(".lock")):
        if not copy.exists():
            unfinished = copy.with_suffix(".incomplete")
            try:
                _download(file, sha256, unfinished, advance)
            except BaseException:
                unfinished.unlink(missing_ok=True)
                raise
            unfinished.replace(copy)
    return epath.Path(copy)


def folder() -> pathlib.Path:
    """Where the copies lie."""
    return platformdirs.user_cache_path("flexolmo-jax") / "corpora"


def _download(file: epath.Path, sha256: str, to: pathlib.Path, advance: Callable[[int], None]) -> None:
    digest = hashlib.sha256()
    try:
        with file.open("rb") as source, to.open("wb") as out:
            while data := source.read(_READ_BYTES):
                digest.update(data)
                out.write(data)
                advance(len(data))
    except FileNotFoundError:
        raise UserError(f"{file}: missing, and corpus.json names it; copy the corpus again") from None
    if digest.hexdigest() != sha256:
        raise UserError(f"{file}: differs from the digest in corpus.json; copy the corpus again")
