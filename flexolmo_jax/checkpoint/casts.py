"""Leaves that are stored in another dtype than they were published in: how they are read, checked and recorded."""

from collections.abc import Mapping

import jax.numpy as jnp

from flexolmo_jax.checkpoint.manifests import Cast, Casts, ModelManifest, stored_digests
from flexolmo_jax.checkpoint.params import Slice, check_digest, digest_slice

Experts = dict[str, dict[str, Slice]]
"""{expert: {leaf: slice}}, in the order of the roster."""


def check_digests(found: Mapping[str, str], named: Mapping[str, str], slices: Mapping[str, Slice]) -> None:
    """Raises UserError where the content of a leaf is not what the manifest says."""
    for leaf, digest in found.items():
        check_digest(slices[leaf].name, digest, named[leaf])


def cast_slices(
    manifest: ModelManifest, shared: dict[str, Slice], experts: Experts, dtype: str | None
) -> tuple[dict[str, Slice], Experts]:
    """A model's leaves cast to `dtype` as they are read; the same where it is None."""
    if dtype is None:
        return shared, experts
    slices = {"": shared, **experts}
    groups = {
        group: {leaf: part.as_dtype(jnp.dtype(dtype), stored[leaf]) for leaf, part in slices[group].items()}
        for group, stored in manifest.stored.items()
    }
    return groups.pop(""), groups


def cast_router(manifest: ModelManifest, router: Experts, dtype: str | None) -> tuple[ModelManifest, Experts]:
    """Casts the router that a tuned model keeps as it was merged; the manifest then says so.

    Raises:
      UserError: it is not what the manifest says, or a value is too large for `dtype`.
    """
    if dtype is None or manifest.tuned is None:
        return manifest, router
    cast: Experts = {}
    casts: dict[str, Casts] = {}
    for name, leaves in router.items():
        stored, before = manifest.stored_router[name], manifest.merged_router_casts.get(name, {})
        cast[name] = {leaf: part.as_dtype(jnp.dtype(dtype), stored[leaf]) for leaf, part in leaves.items()}
        found = {leaf: digest_slice(part, leaf) for leaf, part in cast[name].items()}
        casts[name] = new_casts(manifest.merged_router[name], before, cast[name], found)
    casts = {name: of_expert for name, of_expert in casts.items() if of_expert}
    return manifest.but(tuned=manifest.tuned.but(casts=casts)), cast


def with_casts(
    manifest: ModelManifest, slices: Mapping[str, Mapping[str, Slice]], found: Mapping[str, Mapping[str, str]]
) -> ModelManifest:
    """The manifest after its leaves were read: each cast is recorded, and new leaves have their digests.

    Args:
      manifest: what the leaves were before; it need not name all.
      slices: {expert: {leaf: slice}} as they were read, and under "" the shared leaves.
      found: {expert: {leaf: digest}} of what was read.

    Raises:
      UserError: a leaf that was not cast is not what the manifest says. Those that were are checked as they are read.
    """
    experts = [
        expert.but(
            leaves={**found[expert.name], **expert.leaves},
            casts=new_casts(expert.leaves, expert.casts, slices[expert.name], found[expert.name]),
        )
        for expert in manifest.experts
    ]
    casts = new_casts(manifest.shared, manifest.casts, slices[""], found[""])
    return manifest.but(experts=experts, shared={**found[""], **manifest.shared}, casts=casts)


def new_casts(
    published: Mapping[str, str], casts: Mapping[str, Cast], slices: Mapping[str, Slice], found: Mapping[str, str]
) -> Casts:
    """The casts of a set of leaves after they were read as `slices` say; errors are those of `with_casts`."""
    kept = {leaf for leaf, part in slices.items() if part.cast is None and leaf in published}
    check_digests({leaf: found[leaf] for leaf in kept}, stored_digests(published, casts), slices)
    recorded: Casts = {}
    for leaf, part in sorted(slices.items()):
        # A leaf that is new, or has become again what was published, needs no record.
        if leaf not in published or found[leaf] == published[leaf]:
            continue
        dtypes = casts[leaf].dtypes if leaf in casts else [part.source_dtype.name]
        after = Cast.model_construct(dtypes=[*dtypes, part.dtype.name], digest=found[leaf])
        recorded[leaf] = casts[leaf] if leaf in kept else after
    return recorded
