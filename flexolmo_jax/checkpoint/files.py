"""Whether a directory holds what one of its kind does, and nothing else; no link in it may lead out of it."""

import errno
import fnmatch
import os
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

from etils import epath

from flexolmo_jax.errors import UserError

# What operating systems and file servers leave in folders, in lower case: never read, never copied, never refused.
SYSTEM_FILES = (
    *(".ds_store", "._*", ".appledouble", ".localized", ".spotlight-v100", ".trashes", ".fseventsd", "__macosx"),
    *("thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "system volume information"),
    *("lost+found", ".directory", ".trash-*", ".nfs*", "@eadir"),
)


class File:
    """Stands for a file in what a folder holds."""


FILE = File()


class Names(Protocol):
    """What a folder holds, by name: a mapping, or what answers as one does."""

    def get(self, name: str) -> "File | Names | Described | None":
        """What belongs under that name; None: nothing."""


class Described(NamedTuple):
    """A folder in which one file says what it holds.

    Attributes:
      source: name of that file.
      read: makes the names of it; None where it is damaged, which is for those to say who need it.
    """

    source: str
    read: Callable[[epath.Path], Names | None]


class Chunks(NamedTuple):
    """What the folder of a zarr3 array holds: metadata, and a file for each chunk, side by side or in folders.

    Attributes:
      metadata: name of the file of metadata.
      prefix: first parts of a chunk's key, before its place.
      grid: how many chunks there are along each axis.
      separator: between the parts of a key; "/" makes folders.
      parts: those of the folder that is described.
    """

    metadata: str
    prefix: tuple[str, ...]
    grid: tuple[int, ...]
    separator: str
    parts: tuple[str, ...] = ()

    def get(self, name: str) -> "File | Chunks | None":
        """What belongs under a name in the folder."""
        if name == self.metadata and not self.parts:
            return FILE
        parts = (*self.parts, *name.split(self.separator))
        depth = len(self.prefix)
        if parts[:depth] != self.prefix[: len(parts)] or len(parts) > depth + len(self.grid):
            return None
        # str(int): a chunk has one name.
        if not all(p.isascii() and p.isdigit() and p == str(int(p)) for p in parts[depth:]):
            return None
        if not all(int(part) < length for part, length in zip(parts[depth:], self.grid, strict=False)):
            return None
        if len(parts) == depth + len(self.grid):
            return FILE
        return self._replace(parts=parts) if self.separator == "/" else None


def is_system_file(name: str) -> bool:
    """Whether an operating system or a file server makes files of that name."""
    return any(fnmatch.fnmatchcase(name.lower(), pattern) for pattern in SYSTEM_FILES)


def check_files(directory: epath.Path, holds: Names | Described, label: str) -> None:
    """Goes through a directory without reading what it holds; system files are passed over.

    Args:
      directory: local, or remote, where there are no links. It may itself be reached through a link.
      holds: what belongs in it.
      label: names it in errors.

    Raises:
      UserError: names a file or folder that does not belong in it, what is neither a file nor a folder, or a link that
        leads out of the directory, nowhere, or in a circle.
    """
    if "://" in str(directory):
        _check_folder(directory, holds, label, "", lambda folder, place: _remote_entries(folder))
        return
    root = os.path.realpath(directory)
    _check_folder(directory, holds, label, "", lambda folder, place: _local_entries(folder, root, label, place))


def _check_folder(
    folder: epath.Path,
    holds: Names | Described,
    label: str,
    place: str,
    entries: Callable[[epath.Path, str], Mapping[str, bool | None]],
) -> None:
    """Checks a folder, which lies at `place` in the directory ("" or "params/"), and those in it."""
    found = entries(folder, place)
    if isinstance(holds, Described):
        holds = holds.read(folder / holds.source) if found.get(holds.source, True) is not True else None
        if holds is None:
            return
    for name, is_folder in found.items():
        belongs, said = holds.get(name), f"{label}: holds {shown(place + name)}"
        if belongs is None:
            raise UserError(f"{said}, which is no part of it; remove it, or copy the directory again from its source")
        if is_folder is not None and is_folder is isinstance(belongs, File):
            kinds = ("a folder where a file belongs", "a file where a folder belongs")
            raise UserError(f"{said}, {kinds[not is_folder]}; copy the directory again from its source")
        if not isinstance(belongs, File):
            _check_folder(folder / name, belongs, label, f"{place}{name}/", entries)


def _remote_entries(folder: epath.Path) -> dict[str, bool | None]:
    """{name: None, as to ask whether it is a folder would be a request each}."""
    return dict.fromkeys(sorted(e.name for e in folder.iterdir() if not is_system_file(e.name)))


def _local_entries(folder: epath.Path, root: str, label: str, place: str) -> dict[str, bool]:
    """{name: whether it is a folder} in the order of names, once every link was found to stay in `root`."""
    found = {}
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            said = f"{label}: {shown(place + entry.name)}"
            if entry.is_symlink():
                _check_link(entry.path, root, said)
            if is_system_file(entry.name):
                continue
            if not (entry.is_dir() or entry.is_file()):
                raise UserError(f"{said} is neither a file nor a folder (a pipe, a socket or a device); remove it")
            found[entry.name] = entry.is_dir()
    return found


def _check_link(path: str, root: str, said: str) -> None:
    """Raises UserError where a link leads out of `root`, also where it does so only on its way."""
    target = os.path.join(os.path.dirname(path), os.readlink(path))
    try:
        end = os.path.realpath(path, strict=True)
    except OSError as error:
        where = "in a circle" if error.errno == errno.ELOOP else "nowhere"
        raise UserError(f"{said} is a link that leads {where}; copy the directory again from its source") from None
    step = os.path.join(os.path.realpath(os.path.dirname(target)), os.path.basename(target))
    for at in (os.path.normpath(step), end):
        if os.path.commonpath([root, at]) != root:
            raise UserError(
                f"{said} is a link that leads out of the directory, to {shown(at)}; "
                "copy the directory with its links followed (cp -rL)"
            )


def shown(name: str) -> str:
    """A name from a disk, fit for a terminal."""
    return name if name.isprintable() else ascii(name)
