"""Merging: an anchor and any set of contributions become one model, without training, block by block."""

import dataclasses
from collections.abc import Mapping, Sequence

from etils import epath

from flexolmo_jax.checkpoint import directories
from flexolmo_jax.checkpoint.atomic import atomic_directory
from flexolmo_jax.checkpoint.tree import Slice, write_tree
from flexolmo_jax.checkpoint.verify import cast_slices, open_model, with_casts
from flexolmo_jax.combine.contribution import Alias, Member, open_contribution, size
from flexolmo_jax.errors import UserError
from flexolmo_jax.progress import byte_progress


def merge(
    anchor: epath.PathLike,
    contributions: Sequence[epath.PathLike | Alias],
    out: epath.PathLike,
    top_k: int,
    dtype: str | None = None,
) -> directories.Model:
    """Merges contributions into a model directory; the order in which they are given does not matter.

    The feed-forwards and router rows of the anchor and of the contributions, sorted by name, are stacked
    (FlexOlmo, arXiv 2507.07024, section 3). Every leaf is digested block by block on its way and
    compared with what the manifests say. A contribution's leaf that has another dtype than the anchor's is cast to
    that, and every leaf to `dtype` where it is given; the manifest records it (docs/formats.md).

    Args:
      anchor: model directory of the anchor.
      contributions: contribution directories, or aliases of them.
      out: the model directory to make.
      top_k: how many experts compute each token (all of them, where there are fewer).
      dtype: of all leaves ("float32", "bfloat16" or "float16"), or None: those of the anchor.

    Raises:
      UserError: an input is not what its manifest says, or holds what does not belong in it, two contributions have
        one name, a value is too large for its dtype, or `out` exists.
    """
    merged, shared, experts = gather(anchor, contributions, top_k, dtype)
    with atomic_directory(out) as directory:
        merged = assemble(directory, merged, shared, experts)
        copy_tokenizer(anchor, directory)
    return merged


def gather(
    anchor: epath.PathLike, contributions: Sequence[epath.PathLike | Alias], top_k: int, dtype: str | None = None
) -> tuple[directories.Model, dict[str, Slice], dict[str, dict[str, Slice]]]:
    """Opens what a merge is made of, without reading a leaf's content.

    Returns:
      (the merge's manifest before any cast, {path: slice} of the shared leaves, {expert: {leaf: slice}} in the order
      of the roster).

    Raises:
      UserError: as `merge`, but for what only reading the content shows.
    """
    if top_k < 1:
        raise UserError(f"--top_k={top_k}: must be at least 1")
    manifest = read_anchor(anchor)
    opened = open_model(anchor, manifest, f"--anchor={anchor}")
    shared, own = cast_slices(manifest, *opened, dtype)
    members, given = [], {}
    for contribution in contributions:
        alias, path = contribution if isinstance(contribution, Alias) else (None, contribution)
        member = open_contribution(path, manifest, own[directories.ANCHOR_NAME], alias)
        name = member.expert.name
        if name in given:
            raise UserError(
                f"--contribution={path}: its expert is called '{name}', as that of {given[name]} is; "
                f"give one of them another name (--contribution=NAME={path})"
            )
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
    manifest = directories.Model.read(path, flag="--anchor", strict=True)
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
) -> directories.Model:
    """Streams these leaves into a model directory and checks every one against the manifest.

    Returns:
      The manifest that was written, with a record of every cast.

    Raises:
      UserError: the content of a leaf is not what its digest says, or is not finite.
    """
    total = sum(size(leaves) for leaves in (shared, *experts.values()))
    with byte_progress(f"{len(experts)} experts", total) as advance:
        leaves = directories.model_leaves(shared, experts)
        digests = write_tree(directory / directories.PARAMS, leaves, directories.digest_name, advance)
    found_shared, found_experts = directories.split_digests(digests, manifest.roster)
    found = dict(zip(manifest.roster, found_experts, strict=True))
    manifest = with_casts(manifest, shared, experts, found_shared, found)
    manifest.write(directory)
    return manifest


def copy_tokenizer(source: epath.PathLike, directory: epath.Path) -> None:
    """Copies `tokenizer.json`, and what else an import kept of it, from one model directory to another."""
    tokenizer = epath.Path(source) / directories.TOKENIZER_FILE
    if tokenizer.exists():
        tokenizer.copy(directory / directories.TOKENIZER_FILE)
    directories.copy_files(epath.Path(source) / directories.TOKENIZER_FOLDER, directory / directories.TOKENIZER_FOLDER)
