"""Opting out: a model without an expert, exactly as if that expert had never been merged."""

import json
from collections.abc import Sequence, Set
from typing import Any

from etils import epath

from flexolmo_jax.checkpoint.casts import Experts
from flexolmo_jax.checkpoint.manifests import BY_ROUTER, ExpertRecord, ModelManifest, is_router_leaf, without_selector
from flexolmo_jax.checkpoint.model_directory import (
    CERTIFICATE_FILE,
    copy_tokenizer,
    open_merged_router,
    open_model,
    read_model,
    write_model,
)
from flexolmo_jax.checkpoint.statistics import open_statistics
from flexolmo_jax.combine.merge import METHODS
from flexolmo_jax.combine.stack import selector_leaves
from flexolmo_jax.errors import ArgumentError, UserError

IMPORTED = "imported"  # in an anchor's data card: where a model came from; "experts" are those that came with it
EXACT = "exact: every leaf equals, byte for byte, the merge that never had the removed experts"
ROUTER_RETURNED = EXACT + "; the router is the merge's again, its later tuning was undone"
ROUTER_KEPT = (
    "partial: every leaf but the router's equals the merge that never had the removed experts; "
    "the router was tuned while they took part, and is kept as tuned"
)
REMOVED_ONLY = (
    "removed: the experts' own leaves are gone; the leaves named in 'trained_together' were trained after the merge, "
    "while they took part"
)
UNKNOWN = "; what was trained together before the import is not known"
AS_IMPORTED = (
    "as imported: every leaf that was imported equals, byte for byte, the imported model's without the removed experts"
    + UNKNOWN
)


def opt_out(
    model: epath.PathLike, names: Sequence[str], out: epath.PathLike, keep_tuned_router: bool = False
) -> dict[str, Any]:
    """Makes a model directory without some experts, and its certificate.

    A router that was tuned after the merge is returned to what the merge made of it, so that the result is exact,
    unless `keep_tuned_router`. The certificate (`certificate.json`, returned as a dict) says which guarantee
    holds: `guarantee`, and the digests that let anyone check it.

    Args:
      model: model directory.
      names: experts to remove.
      out: the model directory to make.
      keep_tuned_router: keep router weights and biases as tuned.

    Raises:
      ArgumentError: a name is not on the roster or is the anchor.
      UserError: the model is damaged, holds what does not belong in it, or was combined by a method that does not keep
        experts apart; or `out` exists.
    """
    manifest = read_model(model, strict=True)
    check_keeps_experts(model, manifest, "merge the anchor and the other contributions again")
    check_removable(names, manifest.roster)
    shared, experts = open_model(model, manifest)
    statistics = open_statistics(model, manifest)
    trained = set(manifest.tuned.leaves) if manifest.tuned else set()
    together = trained if keep_tuned_router else {leaf for leaf in trained if not is_router_leaf(leaf)}
    routers = open_merged_router(model, manifest) if trained else {}
    if trained and not keep_tuned_router:
        manifest, experts = with_merged_router(manifest), replace_router(experts, routers)
        shared = without_selector(shared) | selector_leaves(manifest.selection)
    remaining = _without(manifest, names, together)
    if remaining.selection == BY_ROUTER:
        shared = without_selector(shared)
    certificate = {
        "removed": [_line(expert) for expert in manifest.experts if expert.name in names],
        "remaining": [_line(expert) for expert in remaining.experts],
        "anchor_digest": remaining.anchor_digest,
        "guarantee": _guarantee(trained, together, bool(imported_experts(manifest))),
        "trained_together": sorted(together),
    }

    def complete(directory: epath.Path, written: ModelManifest) -> None:
        copy_tokenizer(model, directory)
        (directory / CERTIFICATE_FILE).write_text(json.dumps(certificate, indent=2) + "\n")

    write_model(
        out,
        remaining,
        shared,
        {name: experts[name] for name in remaining.roster},
        statistics={name: statistics[name] for name in remaining.roster},
        merged_router={name: routers[name] for name in remaining.roster} if remaining.tuned else None,
        complete=complete,
        title=f"{len(remaining.experts)} experts",
    )
    return certificate


def check_keeps_experts(model: epath.PathLike, manifest: ModelManifest, remedy: str) -> None:
    """Raises UserError, which ends in `remedy`, where the model does not hold every expert as it was contributed."""
    method = METHODS.get(manifest.method)
    if method is None or not method.keeps_experts:
        raise UserError(
            f"{model}: its experts were combined by the method '{manifest.method}', which does not keep them apart; "
            f"{remedy}"
        )


def _line(expert: ExpertRecord) -> dict[str, str]:
    """An expert in a certificate; its owner's name for it, where that is another."""
    line = {"name": expert.name, "digest": expert.digest}
    return line if expert.owner_name == expert.name else line | {"owner_name": expert.owner_name}


def check_removable(names: Sequence[str], roster: Sequence[str], argument: str = "names") -> None:
    """Raises ArgumentError, of the argument called `argument`, unless all names are contributed experts."""
    for name in names:
        if name not in roster[1:]:
            problem = "the anchor, which every model keeps" if name == roster[0] else "not on the roster"
            known = ", ".join(roster[1:]) or "none, this is an anchor"
            raise ArgumentError(argument, name, f"{problem}; contributed experts: {known}")


def imported_experts(manifest: ModelManifest) -> list[str]:
    """The contributed experts that were imported together with the anchor, of whose merge nothing is known."""
    note = manifest.experts[0].card.get(IMPORTED)
    names = note.get("experts") if isinstance(note, dict) else None
    return [name for name in manifest.roster[1:] if isinstance(names, list) and name in names]


def _guarantee(trained: Set[str], together: Set[str], imported: bool) -> str:
    """Which guarantee holds, by what was trained after the merge or the import, and what of it the result holds."""
    if imported:
        return REMOVED_ONLY + UNKNOWN if together else AS_IMPORTED
    if not together:
        return ROUTER_RETURNED if trained else EXACT
    return ROUTER_KEPT if all(map(is_router_leaf, together)) else REMOVED_ONLY


def _without(manifest: ModelManifest, names: Sequence[str], together: Set[str]) -> ModelManifest:
    """The manifest without some experts, in which the leaves `together` are tuned."""
    experts = [expert for expert in manifest.experts if expert.name not in names]
    tuned = manifest.but(experts=experts).tuned_in(together) if together else None
    # An anchor alone is the anchor again, as it was published.
    if len(experts) > 1:
        return manifest.but(experts=experts, tuned=tuned)
    shared = without_selector(manifest.shared)
    return manifest.but(experts=experts, tuned=tuned, top_k=1, selection=BY_ROUTER, shared=shared)


def replace_router(experts: Experts, routers: Experts) -> Experts:
    """The experts' leaves with those of `routers`, as `open_merged_router` gives them, in place of their routers'."""
    return {name: leaves | routers[name] for name, leaves in experts.items()}


def with_merged_router(manifest: ModelManifest) -> ModelManifest:
    """The manifest that describes the experts with the merge's router in place of the tuned one."""
    merged, casts = manifest.merged_router, manifest.merged_router_casts
    experts = []
    for expert in manifest.experts:
        others = {leaf: cast for leaf, cast in expert.casts.items() if leaf not in merged[expert.name]}
        leaves = {**expert.leaves, **merged[expert.name]}
        experts.append(expert.but(leaves=leaves, casts=others | casts.get(expert.name, {})))
    return manifest.but(experts=experts, shared=without_selector(manifest.shared))
