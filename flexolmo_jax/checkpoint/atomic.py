"""Directories that are complete or absent."""

import contextlib
import os
from collections.abc import Iterator

from etils import epath

from flexolmo_jax.errors import UserError


@contextlib.contextmanager
def atomic_directory(path: epath.PathLike, *, flag: str = "--out") -> Iterator[epath.Path]:
    """Yields a temporary directory beside `path` that takes its name when the block ends well.

    The temporary name is the same for every attempt, so what an attempt that was killed left behind is
    removed by the next one. When the block raises, the temporary directory is removed.

    Args:
      path: the directory to make; local or `gs://` (where the final rename is a copy, not atomic).
      flag: the flag that asked for it, named in errors.

    Raises:
      UserError: `path` exists already.
    """
    path = epath.Path(path)
    temporary = path.parent / f".{path.name}.incomplete"
    try:
        if path.exists():
            raise UserError(f"{flag}={path}: exists already; name a new directory, or remove this one first")
        if temporary.exists():
            temporary.rmtree()
        temporary.mkdir(parents=True)
        yield temporary
        temporary.rename(path)
    except OSError as error:
        # A write names no file, and what goes wrong in the temporary directory is of no interest to who named `path`.
        if error.filename is None or os.fspath(temporary) in str(error.filename):
            error.filename = f"{flag}={path}"
        raise
    finally:
        with contextlib.suppress(OSError):  # what failed first is what counts; the next attempt removes the rest
            if temporary.exists():
                temporary.rmtree()
