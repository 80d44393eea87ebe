"""Contributions as a coordinator receives them: opened, checked, and refused with a reason."""

import dataclasses
from typing import NamedTuple

from etils import epath

from flexolmo_jax.checkpoint import DTYPES, directories
from flexolmo_jax.checkpoint.tree import Slice
from flexolmo_jax.errors import UserError


class Alias(NamedTuple):
    """A contribution directory, and the name that its expert is to have in the roster."""

    name: str
    path: epath.PathLike


def parse_contribution(value: str) -> str | Alias:
    """Reads the value of `--contribution`: a directory, or NAME=DIR. What exists is a directory, whatever its name.

    Raises:
      UserError: NAME is no name, or DIR is empty.
    """
    name, equals, path = value.partition("=")
    if not equals or epath.Path(value).exists() or "/" in name:
        return value
    if not directories.is_expert_name(name):
        raise UserError(f"--contribution={value}: {name!r} is no name; {directories.NAME_RULE}")
    if not path:
        raise UserError(f"--contribution={value}: names no directory; write NAME=DIR")
    return Alias(name, path)


class Member(NamedTuple):
    """An expert ready to be merged: its line of the roster, and its leaves, {leaf: slice}."""

    expert: directories.Expert
    leaves: dict[str, Slice]


def open_contribution(
    path: epath.PathLike, anchor: directories.Model, anchor_leaves: dict[str, Slice], alias: str | None = None
) -> Member:
    """Opens a contribution and checks all that can be checked without reading a weight.

    Args:
      path: the contribution directory.
      anchor: manifest of the anchor it will be merged with.
      anchor_leaves: the anchor's own expert, whose leaves' shapes every expert has; to their dtypes it is cast.
      alias: the name in the roster; by default that which its owner gave.

    Raises:
      UserError: made on another anchor or with another architecture; a leaf is missing, extra or
        misshapen, or of a dtype that is not read; a manifest or a file is damaged; or it holds something else.
    """
    flag = f"--contribution={path}"
    contribution = directories.Contribution.read(path, flag="--contribution", strict=True)
    expert = contribution.expert
    if contribution.architecture != dict(anchor.architecture):
        keys = contribution.architecture.keys() | anchor.architecture.keys()
        odd = sorted(key for key in keys if contribution.architecture.get(key) != anchor.architecture.get(key))
        raise UserError(
            f"{flag}: has another architecture than the anchor ({', '.join(odd)} differ); train it on this anchor"
        )
    if contribution.anchor_digest != anchor.anchor_digest:
        raise UserError(
            f"{flag}: made on another anchor ({contribution.anchor_digest[:12]}, not {anchor.anchor_digest[:12]}); "
            "give the --anchor it was trained on"
        )
    stored = directories.open_params(path)
    for problem, leaves in (
        ("lacks the leaf", anchor_leaves.keys() - stored.keys()),
        ("holds the unknown leaf", stored.keys() - anchor_leaves.keys()),
        ("names no digest for the leaf", stored.keys() - expert.leaves.keys()),
        ("names a digest for the absent leaf", expert.leaves.keys() - stored.keys()),
    ):
        if leaves:
            raise UserError(f"{flag}: {problem} {min(leaves)}; copy it again from its owner")
    slices = {leaf: Slice(stored[leaf], None, f"{flag}: leaf {leaf}") for leaf in sorted(stored)}
    for leaf, part in slices.items():
        like = anchor_leaves[leaf]
        said = f"{flag}: leaf {leaf} is {part.dtype.name}{list(part.shape)}"
        if part.shape != like.shape:
            raise UserError(f"{said}; the anchor's is {like.dtype.name}{list(like.shape)}")
        if part.dtype.name not in DTYPES:
            raise UserError(f"{said}; it must be one of {', '.join(DTYPES)}")
    slices = {leaf: part.as_dtype(anchor_leaves[leaf].dtype, expert.stored[leaf]) for leaf, part in slices.items()}
    return Member(dataclasses.replace(expert, name=alias or expert.name), slices)


def size(leaves: dict[str, Slice]) -> int:
    """Bytes of a set of leaves."""
    return sum(part.nbytes for part in leaves.values())
