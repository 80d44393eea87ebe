"""What a directory may hold: files and folders by name, and no link that leads out of it."""

import errno
import fnmatch
import os
from collections.abc import Callable, Mapping
from typing import Protocol, Union

from etils import epath

from flexolmo_jax.errors import UserError
from flexolmo_jax.paths import is_remote

# What operating systems and file servers leave in folders, in lower case: never read, never copied, never refused.
SYSTEM_FILES = (
    *(".ds_store", "._*", ".appledouble", ".localized", ".spotlight-v100", ".trashes", ".fseventsd", "__macosx"),
    *("thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "system volume information"),
    *("lost+found", ".directory", ".trash-*", ".nfs*", "@eadir"),
)
FILE = "file"


class Names(Protocol):
    """The content of a folder, by name; a dict, or what has its `get`."""

    def get(self, name: str, /) -> "Content | None":
        """The content under that name; None where nothing belongs there."""


# A file; a folder with this content; or a folder whose files say what it holds (None: they are damaged, which is for
# those to report who read them).
Content = Union[str, Names, Callable[[epath.Path], Names | None]]  # noqa: UP007  "|" does not take a forward reference


def is_system_file(name: str) -> bool:
    """Whether an operating system or a file server makes files of that name."""
    return any(fnmatch.fnmatchcase(name.lower(), pattern) for pattern in SYSTEM_FILES)


def check_files(directory: epath.Path, content: Content, label: str) -> None:
    """Checks the names in a directory; system files are passed over.

    Args:
      directory: local, or remote, where there are no links. It may itself be reached through a link.
      content: what belongs in it.
      label: names it in errors.

    Raises:
      UserError: names a file or folder that does not belong in it, what is neither a file nor a folder, or a link that
        leads out of the directory, nowhere, or in a circle.
    """
    if is_remote(directory):
        _check_folder(directory, content, label, "", lambda folder, place: _remote_entries(folder))
        return
    root = os.path.realpath(directory)
    _check_folder(directory, content, label, "", lambda folder, place: _local_entries(folder, root, label, place))


def _check_folder(
    folder: epath.Path,
    content: Content,
    label: str,
    place: str,
    entries: Callable[[epath.Path, str], Mapping[str, bool | None]],
) -> None:
    """Checks a folder, which lies at `place` in the directory ("" or "params/"), and the folders in it."""
    found = entries(folder, place)
    names = content(folder) if callable(content) else content
    if names is None or isinstance(names, str):
        return
    for name, is_folder in found.items():
        expected, entry = names.get(name), f"{label}: holds {shown(place + name)}"
        if expected is None:
            raise UserError(f"{entry}, which is no part of it; remove it, or copy the directory again from its source")
        if is_folder is not None and is_folder is (expected == FILE):
            kinds = ("a folder where a file belongs", "a file where a folder belongs")
            raise UserError(f"{entry}, {kinds[not is_folder]}; copy the directory again from its source")
        if expected != FILE:
            _check_folder(folder / name, expected, label, f"{place}{name}/", entries)


def _remote_entries(folder: epath.Path) -> dict[str, bool | None]:
    """{name: None}; whether each is a folder would take a request each."""
    return dict.fromkeys(sorted(e.name for e in folder.iterdir() if not is_system_file(e.name)))


def _local_entries(folder: epath.Path, root: str, label: str, place: str) -> dict[str, bool | None]:
    """{name: whether it is a folder} in the order of names, once every link was found to stay in `root`."""
    found: dict[str, bool | None] = {}
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            label_of_entry = f"{label}: {shown(place + entry.name)}"
            if entry.is_symlink():
                _check_link(entry.path, root, label_of_entry)
            if is_system_file(entry.name):
                continue
            if not (entry.is_dir() or entry.is_file()):
                raise UserError(
                    f"{label_of_entry} is neither a file nor a folder (a pipe, a socket or a device); remove it"
                )
            found[entry.name] = entry.is_dir()
    return found


def _check_link(path: str, root: str, label: str) -> None:
    """Raises UserError where a link leads out of `root`, even if it leads into it again."""
    target = os.path.join(os.path.dirname(path), os.readlink(path))
    try:
        end = os.path.realpath(path, strict=True)
    except OSError as error:
        problem = "in a circle" if error.errno == errno.ELOOP else "nowhere"
        raise UserError(f"{label} is a link that leads {problem}; copy the directory again from its source") from None
    step = os.path.join(os.path.realpath(os.path.dirname(target)), os.path.basename(target))
    for at in (os.path.normpath(step), end):
        if os.path.commonpath([root, at]) != root:
            raise UserError(
                f"{label} is a link that leads out of the directory, to {shown(at)}; "
                "copy the directory with its links followed (cp -rL)"
            )


def shown(name: str) -> str:
    """A name from a disk, fit for a terminal."""
    return name if name.isprintable() else ascii(name)
