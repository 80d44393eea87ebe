"""Contributions as a coordinator receives them: opened, checked, and refused with a reason."""

from typing import NamedTuple

from etils import epath

from flexolmo_jax.checkpoint import directories
from flexolmo_jax.checkpoint.tree import Slice
from flexolmo_jax.errors import UserError


class Member(NamedTuple):
    """An expert ready to be merged: its line of the roster, and its leaves, {leaf: slice}."""

    expert: directories.Expert
    leaves: dict[str, Slice]


def open_contribution(path: epath.PathLike, anchor: directories.Model, anchor_leaves: dict[str, Slice]) -> Member:
    """Opens a contribution and checks all that can be checked without reading a weight.

    Args:
      path: the contribution directory.
      anchor: manifest of the anchor it will be merged with.
      anchor_leaves: the anchor's own expert, whose leaves' shapes and dtypes every expert has.

    Raises:
      UserError: made on another anchor or with another architecture; a leaf is missing, extra or
        misshapen, or has another dtype; a manifest or a file is damaged.
    """
    flag = f"--contribution={path}"
    contribution = directories.Contribution.read(path, flag="--contribution")
    name = contribution.expert.name
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
        ("names no digest for the leaf", stored.keys() - contribution.expert.leaves.keys()),
        ("names a digest for the absent leaf", contribution.expert.leaves.keys() - stored.keys()),
    ):
        if leaves:
            raise UserError(f"{flag}: {problem} {min(leaves)}; copy it again from its owner")
    slices = {leaf: Slice(stored[leaf], None, f"{flag}: leaf {leaf}") for leaf in sorted(stored)}
    for leaf, part in slices.items():
        like = anchor_leaves[leaf]
        if part.shape != like.shape or part.dtype != like.dtype:
            raise UserError(
                f"{flag}: leaf {leaf} is {part.dtype.name}{list(part.shape)}; "
                f"the anchor's is {like.dtype.name}{list(like.shape)}"
            )
    return Member(directories.Expert(name, dict(contribution.expert.leaves), contribution.expert.card), slices)


def size(leaves: dict[str, Slice]) -> int:
    """Bytes of a set of leaves."""
    return sum(part.nbytes for part in leaves.values())
