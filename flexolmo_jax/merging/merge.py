"""Merging: an anchor and any set of contributions become one model, without training, block by block."""

import dataclasses
from collections.abc import Mapping, Sequence

from etils import epath
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from flexolmo_jax.checkpoint import directories
from flexolmo_jax.checkpoint.atomic import atomic_directory
from flexolmo_jax.checkpoint.tree import Slice, write_tree
from flexolmo_jax.checkpoint.verify import check_digests, open_model
from flexolmo_jax.errors import UserError
from flexolmo_jax.merging.contribution import Member, open_contribution, size
from flexolmo_jax.progress import progress_bar


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
    if top_k < 1:
        raise UserError(f"--top_k={top_k}: must be at least 1")
    manifest = directories.Model.read(anchor, flag="--anchor")
    if len(manifest.experts) > 1:
        raise UserError(
            f"--anchor={anchor}: a merged model ({', '.join(manifest.roster)}); give the anchor it was made from"
        )
    if manifest.tuned:
        raise UserError(f"--anchor={anchor}: was trained on after a merge; give the anchor as it was published")
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
    with atomic_directory(out) as directory:
        assemble(directory, merged, shared, {member.expert.name: member.leaves for member in members})
        copy_tokenizer(anchor, directory)
    return merged


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
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with progress_bar(TextColumn("{task.description}"), *columns) as progress:
        task = progress.add_task(f"{len(experts)} experts", total=total)
        digests = write_tree(
            directory / directories.PARAMS,
            directories.model_leaves(shared, experts),
            directories.digest_name,
            advance=lambda written: progress.update(task, advance=written),
        )
    found_shared, found_experts = directories.split_digests(digests, manifest.roster)
    check_digests(found_shared, manifest.shared, shared)
    for expert, found in zip(manifest.experts, found_experts, strict=True):
        check_digests(found, expert.leaves, experts[expert.name])
    manifest.write(directory)


def copy_tokenizer(source: epath.PathLike, directory: epath.Path) -> None:
    """Copies `tokenizer.json` from one model directory to another, where there is one."""
    tokenizer = epath.Path(source) / directories.TOKENIZER_FILE
    if tokenizer.exists():
        tokenizer.copy(directory / directories.TOKENIZER_FILE)
