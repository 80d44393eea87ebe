"""Joining: contributions enter a merged model, as new experts or new versions, without the others' directories."""

from collections.abc import Collection, Sequence

from etils import epath

from flexolmo_jax.checkpoint.casts import Experts, cast_slices
from flexolmo_jax.checkpoint.manifests import Casts, ModelManifest, is_router_leaf, without_selector
from flexolmo_jax.checkpoint.model_directory import open_merged_router, open_model, read_model
from flexolmo_jax.checkpoint.params import Slice
from flexolmo_jax.checkpoint.statistics import open_statistics
from flexolmo_jax.combine.contribution import Alias, Member
from flexolmo_jax.combine.merge import (
    checked_selection,
    default_top_k,
    method_of,
    open_contributions,
    write_combined,
)
from flexolmo_jax.combine.methods import Inputs
from flexolmo_jax.combine.opt_out import check_keeps_experts, check_removable, replace_router, with_merged_router
from flexolmo_jax.errors import ArgumentError, UserError

FROM_THE_START = "merge the anchor and all contributions again"


def join(
    model: epath.PathLike,
    contributions: Sequence[epath.PathLike | Alias],
    out: epath.PathLike,
    replace: Collection[str] = (),
    top_k: int | None = None,
    dtype: str | None = None,
    method: str | None = None,
    selection: str | None = None,
) -> ModelManifest:
    """Makes a model directory of a merged model and contributions: the one that `merge` makes, byte for byte.

    The model holds the anchor and every contribution that it was merged from, so neither is needed again. A router that
    was tuned since the merge is returned to what the merge made of it.

    Args:
      model: directory of a merged model, or of an anchor.
      contributions: contribution directories, or aliases of them.
      out: the model directory to make.
      replace: experts of the model that contributions of the same name take the place of.
      top_k: how many experts compute each token; None: as in the model, if that has the same selection.
      dtype: of all leaves, as in `merge`; None: those of the model.
      method: a name in `METHODS`; None: that of the model.
      selection: what chooses experts; None: as in the model.

    Raises:
      ArgumentError: a name to replace is no contributed expert of the model, or of no contribution.
      UserError: as `merge`; or a contribution has the name of an expert that is not replaced; leaves but the router's
        were trained since the merge; leaves would be rounded twice; or the model's method does not keep experts apart.
    """
    manifest = read_model(model, strict=True)
    check_keeps_experts(model, manifest, FROM_THE_START)
    check_removable(sorted(replace), manifest.roster, "replace")
    chosen = method_of(method or manifest.method)
    if top_k is not None and top_k < 1:
        raise ArgumentError("top_k", top_k, "must be at least 1")
    shared, experts = open_model(model, manifest)
    if selection is None and len(manifest.experts) > 1:
        selection = manifest.selection
    shared = without_selector(shared)
    manifest = manifest.but(shared=without_selector(manifest.shared))
    if manifest.tuned:
        _check_only_router(model, manifest.tuned.leaves)
        experts = replace_router(experts, open_merged_router(model, manifest))
        manifest = with_merged_router(manifest).but(tuned=None)
    statistics = open_statistics(model, manifest)
    if top_k is None and len(manifest.experts) > 1 and selection == manifest.selection:
        top_k = manifest.top_k
    manifest = manifest.but(experts=[expert for expert in manifest.experts if expert.name not in replace])
    if dtype is not None:
        _check_rounded_once(model, manifest, shared, experts, dtype)
    shared, experts = cast_slices(manifest, shared, {name: experts[name] for name in manifest.roster}, dtype)
    first, *others = [Member(e, experts[e.name], statistics[e.name]) for e in manifest.experts]
    anchor = manifest.but(experts=[first.expert], top_k=1)
    joining = open_contributions(contributions, anchor, first.leaves, manifest.roster)
    missing = set(replace) - {member.expert.name for member in joining}
    if missing:
        problem = f"no contribution has that name; give one, or its directory as {min(missing)}=DIR"
        raise ArgumentError("replace", min(missing), problem)
    members = [first, *sorted([*others, *joining], key=lambda member: member.expert.name)]
    selection = checked_selection(selection, members)
    top_k = default_top_k(selection) if top_k is None else top_k
    return write_combined(Inputs(anchor, shared, members, top_k, selection), chosen, model, out)


def _check_only_router(model: epath.PathLike, trained: Sequence[str]) -> None:
    """Raises UserError where other leaves than the router's were trained since the merge."""
    leaf = next((path for path in trained if not is_router_leaf(path)), None)
    if leaf is not None:
        raise UserError(f"{model}: its {leaf} was trained since the merge, and is no more as merged; {FROM_THE_START}")


def _check_rounded_once(
    model: epath.PathLike, manifest: ModelManifest, shared: dict[str, Slice], experts: Experts, dtype: str
) -> None:
    """Raises UserError where a leaf that was cast when the model was merged would be cast to another dtype."""
    groups: list[tuple[Casts, dict[str, Slice]]] = [(manifest.casts, shared)]
    groups += [(expert.casts, experts[expert.name]) for expert in manifest.experts]
    for casts, leaves in groups:
        for leaf in casts:
            stored = leaves[leaf].dtype.name
            if stored != dtype:
                problem = f"{leaf} of {model} was cast to {stored} already; {FROM_THE_START}, or keep {stored}"
                raise ArgumentError("dtype", dtype, problem)
