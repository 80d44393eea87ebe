"""Leaves that are stored in another dtype than they were published in: how they are read, checked and recorded."""

from collections.abc import Iterable, Mapping

import jax.numpy as jnp

from flexolmo_jax.checkpoint.copying import digest_slice
from flexolmo_jax.checkpoint.manifests import (
    MOE,
    Cast,
    Casts,
    ContributionManifest,
    Manifest,
    ModelManifest,
    digest_name,
)
from flexolmo_jax.checkpoint.params import Slice

Experts = dict[str, dict[str, Slice]]
"""{expert: {leaf: slice}}, in the order of the roster."""


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


def group_digests(digests: Mapping[str, str | list[str]], groups: Iterable[str]) -> dict[str, dict[str, str]]:
    """Digests of a tree, as `write_tree` gives them, by group: "" for shared leaves, then the experts in order."""
    found: dict[str, dict[str, str]] = {group: {} for group in groups}
    experts = [group for group in found if group]
    for path, values in sorted(digests.items()):
        members = experts if path.startswith(MOE) else [""]
        for group, digest in zip(members, values if isinstance(values, list) else [values], strict=True):
            found[group][digest_name(path)] = digest
    return found


def with_digests(
    manifest: Manifest,
    slices: Mapping[str, Mapping[str, Slice]],
    found: Mapping[str, Mapping[str, str]],
    statistics: Mapping[str, str | list[str]] | None = None,
) -> Manifest:
    """The manifest after its leaves were read: each cast is recorded, and new leaves have their digests.

    Args:
      manifest: what the leaves were before; it need not name all.
      slices: {expert: {leaf: slice}} as they were read, and under "" the shared leaves; a contribution's are under "".
      found: {expert: {leaf: digest}} of what was read.
      statistics: {path: digest} of statistics that were read too.
    """
    statistics = {path: str(digest) for path, digest in (statistics or {}).items()}
    if isinstance(manifest, ContributionManifest):
        casts = new_casts(manifest.leaves, manifest.casts, slices[""], found[""])
        changes = {"statistics": statistics} if statistics else {}
        return manifest.but(leaves={**found[""], **manifest.leaves}, casts=casts, **changes)
    published: dict[str, tuple[dict[str, str], Casts]]
    published = {"": (manifest.shared, manifest.casts), **{e.name: (e.leaves, e.casts) for e in manifest.experts}}
    casts = {group: new_casts(*before, slices[group], found[group]) for group, before in published.items()}
    of_expert = {
        e.name: {p.removeprefix(f"{e.name}/"): d for p, d in statistics.items() if p.startswith(f"{e.name}/")}
        for e in manifest.experts
    }
    experts = [
        e.but(
            leaves={**found[e.name], **e.leaves},
            casts=casts[e.name],
            statistics=of_expert[e.name] or e.statistics,
        )
        for e in manifest.experts
    ]
    return manifest.but(experts=experts, shared={**found[""], **manifest.shared}, casts=casts[""])


def new_casts(
    published: Mapping[str, str], casts: Mapping[str, Cast], slices: Mapping[str, Slice], found: Mapping[str, str]
) -> Casts:
    """The casts of a set of leaves after they were read as `slices` say, with the digests `found`."""
    recorded: Casts = {}
    for leaf, part in sorted(slices.items()):
        # A leaf that is new, or has become again what was published, needs no record.
        if leaf not in published or found[leaf] == published[leaf]:
            continue
        dtypes = casts[leaf].dtypes if leaf in casts else [part.source_dtype.name]
        after = Cast.model_construct(dtypes=[*dtypes, part.dtype.name], digest=found[leaf])
        recorded[leaf] = casts[leaf] if part.cast is None else after
    return recorded
