"""Contributions as a coordinator receives them: opened, checked, and refused with a reason."""

from typing import NamedTuple

from etils import epath

from flexolmo_jax.checkpoint import DTYPES
from flexolmo_jax.checkpoint.manifests import BY_ROUTER, NAME_RULE, ExpertRecord, ModelManifest, is_expert_name
from flexolmo_jax.checkpoint.model_directory import open_params, read_contribution
from flexolmo_jax.checkpoint.params import Slice
from flexolmo_jax.checkpoint.statistics import open_statistics, read_statistics
from flexolmo_jax.errors import ArgumentError, UserError
from flexolmo_jax.model.selectors import Selector

STATISTICS_DTYPES = (*DTYPES, "float64", "int32", "int64", "uint32", "uint64")


class Alias(NamedTuple):
    """A contribution directory, and the name that its expert is to have in the roster."""

    name: str
    path: epath.PathLike

    def __str__(self) -> str:
        return f"{self.name}={self.path}"


def parse_contribution(value: str) -> str | Alias:
    """Reads a directory, or NAME=DIR. A path that exists is a directory, whatever its name.

    Raises:
      ArgumentError: NAME is no name, or DIR is empty.
    """
    name, equals, path = value.partition("=")
    if not equals or epath.Path(value).exists() or "/" in name:
        return value
    if not is_expert_name(name):
        raise ArgumentError("contribution", value, f"{name!r} is no name; {NAME_RULE}")
    if not path:
        raise ArgumentError("contribution", value, "names no directory; write NAME=DIR")
    return Alias(name, path)


class Member(NamedTuple):
    """An expert that is ready to be combined with others.

    Attributes:
      expert: its record in the roster.
      leaves: {leaf: slice}.
      statistics: {leaf: slice}.
    """

    expert: ExpertRecord
    leaves: dict[str, Slice]
    statistics: dict[str, Slice]


def open_contribution(
    contribution: epath.PathLike | Alias, anchor: ModelManifest, anchor_leaves: dict[str, Slice]
) -> Member:
    """Opens a contribution and checks all that can be checked without reading a weight.

    Args:
      contribution: the directory, or an alias of it.
      anchor: manifest of the anchor it will be combined with.
      anchor_leaves: the anchor's own expert, whose leaves' shapes every expert has; to their dtypes it is cast.

    Raises:
      UserError: made on another anchor or with another architecture; a leaf is missing, extra or
        misshapen, or of a dtype that is not read; a manifest or a file is damaged; or it holds something else.
    """
    name, path = contribution if isinstance(contribution, Alias) else (None, contribution)
    label = str(contribution)
    manifest = read_contribution(path, strict=True, label=label)
    if manifest.architecture != anchor.architecture:
        keys = manifest.architecture.keys() | anchor.architecture.keys()
        different = sorted(key for key in keys if manifest.architecture.get(key) != anchor.architecture.get(key))
        raise UserError(
            f"{label}: has another architecture than the anchor ({', '.join(different)} differ); "
            "train it on this anchor"
        )
    if manifest.anchor_digest != anchor.anchor_digest:
        raise UserError(
            f"{label}: made on another anchor ({manifest.anchor_digest[:12]}, not {anchor.anchor_digest[:12]}); "
            "give the anchor it was trained on"
        )
    stored = open_params(path)
    for problem, leaves in (
        ("lacks the leaf", anchor_leaves.keys() - stored.keys()),
        ("holds the unknown leaf", stored.keys() - anchor_leaves.keys()),
        ("names no digest for the leaf", stored.keys() - manifest.leaves.keys()),
        ("names a digest for the absent leaf", manifest.leaves.keys() - stored.keys()),
    ):
        if leaves:
            raise UserError(f"{label}: {problem} {min(leaves)}; copy it again from its owner")
    slices = {leaf: Slice(stored[leaf], None, f"{label}: leaf {leaf}") for leaf in sorted(stored)}
    for leaf, part in slices.items():
        like = anchor_leaves[leaf]
        described = f"{label}: leaf {leaf} is {part.dtype.name}{list(part.shape)}"
        if part.shape != like.shape:
            raise UserError(f"{described}; the anchor's is {like.dtype.name}{list(like.shape)}")
        if part.dtype.name not in DTYPES:
            raise UserError(f"{described}; it must be one of {', '.join(DTYPES)}")
    slices = {leaf: part.as_dtype(anchor_leaves[leaf].dtype, manifest.stored[leaf]) for leaf, part in slices.items()}
    (statistics,) = open_statistics(path, manifest).values()
    for leaf, part in statistics.items():
        if part.dtype.name not in STATISTICS_DTYPES:
            raise UserError(f"{label}: statistics leaf {leaf} is {part.dtype.name}; use {', '.join(STATISTICS_DTYPES)}")
    return Member(ExpertRecord.of(manifest, name), slices, statistics)


def has_statistics(member: Member, selector: str) -> bool:
    """Whether the member has statistics for the selector of that name."""
    return any(leaf.startswith(f"{selector}/") for leaf in member.statistics)


def check_statistics(member: Member, selector: Selector) -> None:
    """Reads what a selector needs of a member.

    Raises:
      UserError: the member has no statistics for it, they are not valid, or they cannot be read.
    """
    name = member.expert.name
    if not has_statistics(member, selector.name):
        raise UserError(
            f"{name}: has no statistics for the selector {selector.name}; add them with `flexolmo statistics`, or "
            f"choose experts by the router alone (selection={BY_ROUTER})"
        )
    statistics = read_statistics(member.statistics, selector.name)
    documents = member.expert.card.get("documents")
    problem = selector.problem(statistics, documents if isinstance(documents, int) else None)
    if problem:
        raise UserError(f"the statistics of {name}: {problem}; get them again from their owner")
