"""Opting out: a model without an expert, exactly as if that expert had never been merged."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from etils import epath

from flexolmo_jax.checkpoint import directories
from flexolmo_jax.checkpoint.atomic import atomic_directory
from flexolmo_jax.checkpoint.tree import open_tree
from flexolmo_jax.errors import UserError
from flexolmo_jax.merging.merge import assemble, check_leaves, copy_tokenizer

CERTIFICATE_FILE = "certificate.json"
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
      UserError: a name is not on the roster or is the anchor, the model is damaged, or `out` exists.
    """
    manifest = directories.Model.read(model, flag="--model")
    check_removable(names, manifest.roster, "--expert")
    tree = directories.open_params(model)
    shared, experts = directories.model_slices(tree, manifest.roster, f"--model={model}")
    check_leaves(shared, manifest.shared, f"--model={model}")
    for expert in manifest.experts:
        check_leaves(experts[expert.name], expert.leaves, f"--model={model}: expert {expert.name}")
    trained = set(manifest.tuned["leaves"]) if manifest.tuned else set()
    together = sorted(trained - set(directories.ROUTER_LEAVES))
    restore = bool(trained) and not keep_tuned_router
    if restore:
        manifest = _with_merged_router(model, manifest, experts)
    remaining = dataclasses.replace(
        manifest,
        experts=tuple(expert for expert in manifest.experts if expert.name not in names),
        tuned=manifest.tuned if together or (trained and not restore) else None,
    )
    guarantee = REMOVED_ONLY if together else EXACT if not trained else ROUTER_RETURNED if restore else ROUTER_KEPT
    certificate = {
        "removed": [{"name": e.name, "digest": e.digest} for e in manifest.experts if e.name in names],
        "remaining": [{"name": e.name, "digest": e.digest} for e in remaining.experts],
        "anchor_digest": remaining.anchor_digest,
        "guarantee": guarantee,
        "trained_together": together,
    }
    with atomic_directory(out) as directory:
        assemble(directory, remaining, shared, {e.name: experts[e.name] for e in remaining.experts})
        copy_tokenizer(model, directory)
        (directory / CERTIFICATE_FILE).write_text(json.dumps(certificate, indent=2) + "\n")
    return certificate


def check_removable(names: Sequence[str], roster: Sequence[str], flag: str) -> None:
    """Raises UserError unless every name is a contributed expert of the roster."""
    for name in names:
        if name not in roster[1:]:
            what = "the anchor, which every model keeps" if name == roster[0] else "not on the roster"
            known = ", ".join(roster[1:]) or "none, this is an anchor"
            raise UserError(f"{flag}={name}: {what}; contributed experts: {known}")


def _with_merged_router(model: epath.PathLike, manifest: directories.Model, experts: dict) -> directories.Model:
    """Points the experts' router leaves at the ones the merge made; returns the manifest that describes them."""
    path = epath.Path(model) / directories.MERGED_ROUTER
    _, routers = directories.model_slices(open_tree(path), manifest.roster, f"--model={model}: {path.name}")
    for name, router in routers.items():
        experts[name] = {**experts[name], **router}
    merged = manifest.tuned["merged_router"]
    return dataclasses.replace(
        manifest,
        experts=tuple(directories.Expert(e.name, {**e.leaves, **merged[e.name]}, e.card) for e in manifest.experts),
    )
