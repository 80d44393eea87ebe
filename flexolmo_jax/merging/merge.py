"""Merging: an anchor and any set of contributions become one model, without training, block by block."""

import dataclasses
from collections.abc import Mapping, Sequence

from etils import epath

from flexolmo_jax.checkpoint import directories
from flexolmo_jax.checkpoint.atomic import atomic_directory
from flexolmo_jax.checkpoint.tree import Slice, write_tree
from flexolmo_jax.checkpoint.verify import check_digests, open_model
from flexolmo_jax.errors import UserError
from flexolmo_jax.merging.contribution import Member, open_contribution, size
from flexolmo_jax.progress import byte_progress


def merge(
    anchor: epath.PathLike, contributions: Sequence[epath.PathLike], out: epath.PathLike, top_k: int
) -> directories.Model:
    """Merges contributions into a model directory; the order in which they are given does not matter.

    The feed-forwards and router rows of the anchor and of the contributions, sorted by name, are stacked
    (FlexOlmo, arXiv 2507.07024, section 3). Every leaf is digested block by block on its way and
    compared with what the manifests say.

    Args:
      anchor: model directory of the anchor.
      contributions: contribution directories.
      out: the model directory to make.
      top_k: how many experts compute each token (all of them, where there are fewer).

    Raises:
      UserError: an input is not what its manifest says, two contributions have one name, or `out` exists.
    """
    merged, shared, experts = gather(anchor, contributions, top_k)
    with atomic_directory(out) as directory:
        assemble(directory, merged, shared, experts)
        copy_tokenizer(anchor, directory)
    return merged


def gather(
    anchor: epath.PathLike, contributions: Sequence[epath.PathLike], top_k: int
) -> tuple[directories.Model, dict[str, Slice], dict[str, dict[str, Slice]]]:
    """Opens what a merge is made of, without reading a leaf's content.

    Returns:
      (the merge's manifest, {path: slice} of the shared leaves, {expert: {leaf: slice}} in the order of the roster).

    Raises:
      UserError: as `merge`, but for what only reading the content shows.
    """
    if top_k < 1:
        raise UserError(f"--top_k={top_k}: must be at least 1")
    manifest = read_anchor(anchor)
    shared, own = open_model(anchor, manifest, f"--anchor={anchor}")
    members, given = [], {}
    for path in contributions:
        member = open_contribution(path, manifest, own[directories.ANCHOR_NAME])
        name = member.expert.name
        if name in given:
            raise UserError(f"--contribution={path}: its expert '{name}' came already, from {given[name]}; give one")
        given[name] = path
        members.append(member)
    members.sort(key=lambda member: member.expert.name)
    members.insert(0, Member(manifest.experts[0], own[directories.ANCHOR_NAME]))
    merged = dataclasses.replace(manifest, experts=tuple(member.expert for member in members), top_k=top_k)
    return merged, shared, {member.expert.name: member.leaves for member in members}


def read_anchor(path: epath.PathLike) -> directories.Model:
    """Reads the manifest of an anchor, the directory of `--anchor`.

    Raises:
      UserError: no model directory, or a merged model, or one that was trained on after a merge.
    """
    manifest = directories.Model.read(path, flag="--anchor")
    if len(manifest.experts) > 1:
        raise UserError(
            f"--anchor={path}: a merged model ({', '.join(manifest.roster)}); give the anchor it was made from"
        )
    if manifest.tuned:
        raise UserError(f"--anchor={path}: was trained on after a merge; give the anchor as it was published")
    return manifest


def assemble(
    directory: epath.Path,
    manifest: directories.Model,
    shared: Mapping[str, Slice],
    experts: Mapping[str, Mapping[str, Slice]],
) -> None:
    """Streams these leaves into a model directory and checks every one against the manifest.

    Raises:
      UserError: the content of a leaf is not what its digest says, or is not finite.
    """
    total = sum(size(leaves) for leaves in (shared, *experts.values()))
    with byte_progress(f"{len(experts)} experts", total) as advance:
        leaves = directories.model_leaves(shared, experts)
        digests = write_tree(directory / directories.PARAMS, leaves, directories.digest_name, advance)
    found_shared, found_experts = directories.split_digests(digests, manifest.roster)
    check_digests(found_shared, manifest.shared, shared)
    for expert, found in zip(manifest.experts, found_experts, strict=True):
        check_digests(found, expert.leaves, experts[expert.name])
    manifest.write(directory)


def copy_tokenizer(source: epath.PathLike, directory: epath.Path) -> None:
    """Copies `tokenizer.json`, and what else an import kept of it, from one model directory to another."""
    tokenizer = epath.Path(source) / directories.TOKENIZER_FILE
    if tokenizer.exists():
        tokenizer.copy(directory / directories.TOKENIZER_FILE)
    directories.copy_files(epath.Path(source) / directories.TOKENIZER_FOLDER, directory / directories.TOKENIZER_FOLDER)
