"""Opting out: a model without an expert, exactly as if that expert had never been merged."""

import dataclasses
import json
from collections.abc import Sequence, Set
from typing import Any

from etils import epath

from flexolmo_jax.checkpoint import directories
from flexolmo_jax.checkpoint.atomic import atomic_directory
from flexolmo_jax.checkpoint.verify import open_model, write_merged_router
from flexolmo_jax.combine.stack import assemble, copy_tokenizer
from flexolmo_jax.errors import UserError

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
    "as imported: every leaf equals, byte for byte, the imported model's without the removed experts" + UNKNOWN
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
      keep_tuned_router: keep router rows and biases as tuned.

    Raises:
      UserError: a name is not on the roster or is the anchor, the model is damaged or holds what does not belong in
        it, or `out` exists.
    """
    manifest = directories.Model.read(model, flag="--model", strict=True)
    check_removable(names, manifest.roster, "--expert")
    shared, experts = open_model(model, manifest, f"--model={model}")
    trained = set(manifest.tuned["leaves"]) if manifest.tuned else set()
    together = trained if keep_tuned_router else trained - set(directories.ROUTER_LEAVES)
    routers = directories.merged_router(model, manifest) if trained else {}
    if trained and not keep_tuned_router:
        experts = {name: leaves | routers[name] for name, leaves in experts.items()}
        manifest = with_merged_router(manifest)
    remaining = _without(manifest, names, together)
    certificate = {
        "removed": [_line(expert) for expert in manifest.experts if expert.name in names],
        "remaining": [_line(expert) for expert in remaining.experts],
        "anchor_digest": remaining.anchor_digest,
        "guarantee": _guarantee(trained, together, bool(imported_experts(manifest))),
        "trained_together": sorted(together),
    }
    with atomic_directory(out) as directory:
        assemble(directory, remaining, shared, {e.name: experts[e.name] for e in remaining.experts})
        copy_tokenizer(model, directory)
        if remaining.tuned:
            routers = {name: routers[name] for name in remaining.roster}
            write_merged_router(directory, routers, remaining)
        (directory / directories.CERTIFICATE_FILE).write_text(json.dumps(certificate, indent=2) + "\n")
    return certificate


def _line(expert: directories.Expert) -> dict[str, str]:
    """An expert in a certificate; its owner's name for it, where that is another."""
    line = {"name": expert.name, "digest": expert.digest}
    return line if expert.owner_name == expert.name else line | {"owner_name": expert.owner_name}


def check_removable(names: Sequence[str], roster: Sequence[str], flag: str) -> None:
    """Raises UserError unless every name is a contributed expert of the roster."""
    for name in names:
        if name not in roster[1:]:
            what = "the anchor, which every model keeps" if name == roster[0] else "not on the roster"
            known = ", ".join(roster[1:]) or "none, this is an anchor"
            raise UserError(f"{flag}={name}: {what}; contributed experts: {known}")


def imported_experts(manifest: directories.Model) -> list[str]:
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
    return ROUTER_KEPT if together <= set(directories.ROUTER_LEAVES) else REMOVED_ONLY


def _without(manifest: directories.Model, names: Sequence[str], together: Set[str]) -> directories.Model:
    """The manifest without some experts, in which the leaves `together` are tuned."""
    experts = tuple(expert for expert in manifest.experts if expert.name not in names)
    tuned = None
    if together:
        tuned = dataclasses.replace(manifest, experts=experts).tuned_in(together)
    # An anchor alone is the anchor again, as it was published.
    top_k = manifest.top_k if len(experts) > 1 else 1
    return dataclasses.replace(manifest, experts=experts, tuned=tuned, top_k=top_k)


def with_merged_router(manifest: directories.Model) -> directories.Model:
    """The manifest that describes the experts with the merge's router in place of the tuned one."""
    merged, casts = manifest.merged_router, manifest.merged_router_casts
    experts = []
    for expert in manifest.experts:
        others = {leaf: cast for leaf, cast in expert.casts.items() if leaf not in merged[expert.name]}
        leaves = {**expert.leaves, **merged[expert.name]}
        experts.append(dataclasses.replace(expert, leaves=leaves, casts=others | casts.get(expert.name, {})))
    return dataclasses.replace(manifest, experts=tuple(experts))
