"""Merging: an anchor and any set of contributions become one model, without training, chunk by chunk."""

from collections.abc import Collection, Sequence

from etils import epath

from flexolmo_jax.checkpoint.casts import cast_slices
from flexolmo_jax.checkpoint.copying import digest_slice
from flexolmo_jax.checkpoint.manifests import ANCHOR_NAME, BY_ROUTER, STACK, ModelManifest
from flexolmo_jax.checkpoint.model_directory import (
    copy_tokenizer,
    open_model,
    read_model,
    write_model,
)
from flexolmo_jax.checkpoint.params import Slice
from flexolmo_jax.checkpoint.statistics import open_statistics
from flexolmo_jax.combine import stack
from flexolmo_jax.combine.contribution import Alias, Member, check_statistics, has_statistics, open_contribution
from flexolmo_jax.combine.methods import Inputs, Method
from flexolmo_jax.errors import ArgumentError, UserError
from flexolmo_jax.model.selectors import SELECTIONS, SELECTORS, selector_of, uses_router

METHODS: dict[str, Method] = {method.name: method for method in (stack.STACK,)}


def merge(
    anchor: epath.PathLike,
    contributions: Sequence[epath.PathLike | Alias],
    out: epath.PathLike,
    top_k: int | None = None,
    dtype: str | None = None,
    method: str = STACK,
    selection: str | None = None,
) -> ModelManifest:
    """Merges contributions into a model directory; the order in which they are given does not matter.

    Every leaf is digested on its way and compared with what the manifests say. A contribution's leaf that has another
    dtype than the anchor's is cast to that, and every leaf to `dtype` where it is given; the manifest records it
    (docs/formats.md).

    Args:
      anchor: model directory of the anchor.
      contributions: contribution directories, or aliases of them.
      out: the model directory to make.
      top_k: how many experts compute each token (all of them, where there are fewer); None: `default_top_k`.
      dtype: of all leaves ("float32", "bfloat16" or "float16"), or None: those of the anchor.
      method: a name in `METHODS`.
      selection: what chooses experts, one of `model.selectors.SELECTIONS`; None: `default_selection`.

    Raises:
      UserError: an input is not what its manifest says, or holds what does not belong in it, two contributions have
        one name, the statistics that a selector needs are not there or not valid, a value is too large for its dtype,
        or `out` exists.
    """
    chosen = method_of(method)
    return write_combined(gather(anchor, contributions, top_k, dtype, selection), chosen, anchor, out)


def write_combined(inputs: Inputs, method: Method, source: epath.PathLike, out: epath.PathLike) -> ModelManifest:
    """Writes the model that a method makes of its inputs, with the tokenizer of the model directory `source`.

    Raises:
      UserError: as `merge`, for what only reading the content shows, or `out` exists.
    """
    if not method.keeps_experts:
        _check_members(inputs.members)
    outputs = method.combine(inputs)
    return write_model(
        out,
        outputs.manifest,
        outputs.shared,
        outputs.experts,
        statistics={m.expert.name: m.statistics for m in inputs.members if m.expert.name in outputs.experts},
        complete=lambda directory, manifest: copy_tokenizer(source, directory),
        title=f"{len(inputs.members)} experts",
    )


def checked_selection(selection: str | None, members: Sequence[Member]) -> str:
    """The selection, by default `default_selection`, once the statistics that it needs are read and found valid.

    Raises:
      ArgumentError: no such selection.
      UserError: a member has not the statistics that it needs, or they are not valid.
    """
    if selection is None:
        selection = default_selection(members[0])
    if selection not in SELECTIONS:
        raise ArgumentError("selection", selection, f"no such selection; use one of {', '.join(SELECTIONS)}")
    selector = selector_of(selection)
    if selector:
        for member in members:
            check_statistics(member, selector)
    return selection


def default_selection(anchor: Member) -> str:
    """The first selector for which the anchor has statistics, or else the router.

    It depends on the anchor alone, so that it is the same whoever takes part.
    """
    return next((name for name in SELECTORS if has_statistics(anchor, name)), BY_ROUTER)


def default_top_k(selection: str) -> int:
    """1 with a selector alone, whose best expert computes a token; 4, as in the published run, with the router."""
    return 4 if uses_router(selection) else 1


def method_of(name: str) -> Method:
    """The method of that name; raises ArgumentError where there is none."""
    if name not in METHODS:
        raise ArgumentError("method", name, f"no such method; use one of {', '.join(METHODS)}")
    return METHODS[name]


def gather(
    anchor: epath.PathLike,
    contributions: Sequence[epath.PathLike | Alias],
    top_k: int | None = None,
    dtype: str | None = None,
    selection: str | None = None,
) -> Inputs:
    """Opens what a method combines, without reading a leaf's content.

    Raises:
      UserError: as `merge`, but for what only reading the content shows.
    """
    if top_k is not None and top_k < 1:
        raise ArgumentError("top_k", top_k, "must be at least 1")
    manifest = read_anchor(anchor)
    shared, experts = cast_slices(manifest, *open_model(anchor, manifest), dtype)
    first = Member(manifest.experts[0], experts[ANCHOR_NAME], open_statistics(anchor, manifest)[ANCHOR_NAME])
    members = [first, *open_contributions(contributions, manifest, first.leaves)]
    selection = checked_selection(selection, members)
    return Inputs(manifest, shared, members, default_top_k(selection) if top_k is None else top_k, selection)


def open_contributions(
    contributions: Sequence[epath.PathLike | Alias],
    anchor: ModelManifest,
    anchor_leaves: dict[str, Slice],
    roster: Collection[str] = (),
) -> list[Member]:
    """Opens contributions, in the order of their names; `roster` has the names that are taken.

    Raises:
      UserError: as `open_contribution`; or a contribution has the name of another one, or one of the roster.
    """
    members: dict[str, Member] = {}
    labels: dict[str, str] = {}
    for contribution in contributions:
        member = open_contribution(contribution, anchor, anchor_leaves)
        name = member.expert.name
        path = contribution.path if isinstance(contribution, Alias) else contribution
        if name in roster:
            raise UserError(
                f"{contribution}: its expert is called '{name}', as one of the model is; "
                f"replace={name} updates that one, NAME={path} gives this one another name"
            )
        if name in members:
            raise UserError(
                f"{contribution}: its expert is called '{name}', as that of {labels[name]} is; "
                f"give one of them another name (NAME={path})"
            )
        members[name], labels[name] = member, str(contribution)
    return [members[name] for name in sorted(members)]


def read_anchor(path: epath.PathLike) -> ModelManifest:
    """Reads the manifest of an anchor.

    Raises:
      UserError: no model directory, or a merged model, or one that was trained on after a merge.
    """
    manifest = read_model(path, strict=True)
    if len(manifest.experts) > 1 or manifest.method != STACK:
        names = manifest.roster + [expert.name for expert in manifest.combined]
        raise UserError(f"{path}: a merged model ({', '.join(names)}); give the anchor it was made from")
    if manifest.tuned:
        raise UserError(f"{path}: was trained on after a merge; give the anchor as it was published")
    return manifest


def _check_members(members: Sequence[Member]) -> None:
    """Reads every leaf of the members; raises UserError where one is not what its manifest says."""
    for member in members:
        for leaf, part in member.leaves.items():
            digest_slice(part._replace(cast=None, digest=member.expert.stored[leaf]), leaf)
