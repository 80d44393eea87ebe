"""Whether the leaves of a directory are the ones its manifest names."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from etils import epath

from flexolmo_jax.checkpoint import directories
from flexolmo_jax.checkpoint.roster import Casts, cast_record, stored_digests
from flexolmo_jax.checkpoint.tree import Slice, check_digest, digest_slice, write_tree
from flexolmo_jax.errors import UserError
from flexolmo_jax.progress import progress_bar

ModelSlices = tuple[dict[str, Slice], dict[str, dict[str, Slice]]]


def open_model(path: epath.PathLike, manifest: directories.Model, source: str) -> ModelSlices:
    """Opens a model's leaves as `directories.model_slices` gives them, without reading their content.

    Args:
      path: the model directory.
      manifest: its manifest.
      source: names the directory in errors.

    Raises:
      UserError: a leaf is missing, or not in the manifest.
    """
    shared, experts = directories.model_slices(directories.open_params(path), manifest.roster, source)
    check_leaves(shared, manifest.shared, source)
    for expert in manifest.experts:
        check_leaves(experts[expert.name], expert.leaves, f"{source}: expert {expert.name}")
    return shared, experts


def check_model(manifest: directories.Model, shared: dict[str, Slice], experts: dict[str, dict[str, Slice]]) -> None:
    """Reads every leaf that `open_model` opened; raises UserError where one is not what the manifest says."""
    check_content({"": shared, **experts}, manifest.stored)


def check_content(groups: Mapping[str, Mapping[str, Slice]], named: Mapping[str, Mapping[str, str]]) -> None:
    """Reads groups of leaves and compares them with the digests that are named for each group."""
    with progress_bar() as progress:
        task = progress.add_task("digests", total=sum(map(len, groups.values())))
        for group, leaves in groups.items():
            for leaf, part in leaves.items():
                check_digests({leaf: digest_slice(part, directories.digest_name(leaf))}, named[group], leaves)
                progress.advance(task)


def check_leaves(leaves: Mapping[str, Slice], digests: Mapping[str, str], source: str) -> None:
    """Raises UserError unless exactly the leaves that a manifest names are there."""
    odd = leaves.keys() ^ digests.keys()
    if odd:
        state = "missing" if min(odd) in digests else "not in its manifest"
        raise UserError(f"{source}: leaf {min(odd)} is {state}; copy the directory again from its source")


def write_merged_router(
    directory: epath.Path, router: Mapping[str, Mapping[str, Slice]], manifest: directories.Model
) -> None:
    """Writes what `directories.merged_router` reads; raises UserError where it is not what the manifest says."""
    leaves = directories.model_leaves({}, router)
    digests = write_tree(directory / directories.MERGED_ROUTER, leaves, directories.digest_name)
    for name, found in zip(router, directories.split_digests(digests, list(router))[1], strict=True):
        check_digests(found, manifest.stored_router[name], router[name])


def check_digests(found: Mapping[str, str], named: Mapping[str, str], slices: Mapping[str, Slice]) -> None:
    """Raises UserError where the content of a leaf is not what the manifest says."""
    for leaf, digest in found.items():
        check_digest(slices[leaf].name, digest, named[leaf])


def cast_slices(
    manifest: directories.Model, shared: dict[str, Slice], experts: dict[str, dict[str, Slice]], dtype: str | None
) -> ModelSlices:
    """What `open_model` opened, cast to `dtype` as it is read; the same where it is None."""
    if dtype is None:
        return shared, experts
    given = {"": shared, **experts}
    groups = {
        group: {leaf: part.as_dtype(jnp.dtype(dtype), stored[leaf]) for leaf, part in given[group].items()}
        for group, stored in manifest.stored.items()
    }
    return groups.pop(""), groups


def cast_router(
    manifest: directories.Model, router: dict[str, dict[str, Slice]], dtype: str | None
) -> tuple[directories.Model, dict[str, dict[str, Slice]]]:
    """Casts the router that a tuned model keeps as it was merged; the manifest then says so.

    Raises:
      UserError: it is not what the manifest says, or a value is too large for `dtype`.
    """
    if dtype is None:
        return manifest, router
    cast, casts = {}, {}
    for name, leaves in router.items():
        stored, before = manifest.stored_router[name], manifest.merged_router_casts.get(name, {})
        cast[name] = {leaf: part.as_dtype(jnp.dtype(dtype), stored[leaf]) for leaf, part in leaves.items()}
        found = {leaf: digest_slice(part, leaf) for leaf, part in cast[name].items()}
        casts[name] = new_casts(manifest.merged_router[name], before, cast[name], found)
    return dataclasses.replace(manifest, tuned={**manifest.tuned, "casts": casts}), cast


def with_casts(
    manifest: directories.Model,
    shared: Mapping[str, Slice],
    experts: Mapping[str, Mapping[str, Slice]],
    found_shared: Mapping[str, str],
    found_experts: Mapping[str, Mapping[str, str]],
) -> directories.Model:
    """The manifest with a record of every leaf that was cast on its way.

    Args:
      manifest: what the leaves were before.
      shared: shared leaves, as they were read.
      experts: each expert's.
      found_shared: {path: digest} of what was read of them.
      found_experts: {expert: {leaf: digest}}.

    Raises:
      UserError: a leaf that was not cast is not what the manifest says. Those that were are checked as they are read.
    """
    roster = [
        dataclasses.replace(e, casts=new_casts(e.leaves, e.casts, experts[e.name], found_experts[e.name]))
        for e in manifest.experts
    ]
    casts = new_casts(manifest.shared, manifest.casts, shared, found_shared)
    return dataclasses.replace(manifest, experts=tuple(roster), casts=casts)


def new_casts(
    published: Mapping[str, str], casts: Casts, slices: Mapping[str, Slice], found: Mapping[str, str]
) -> dict[str, Mapping[str, Any]]:
    """The casts of a set of leaves after they were read as `slices` say; errors are those of `with_casts`."""
    kept = {leaf: part for leaf, part in slices.items() if part.cast is None}
    check_digests({leaf: found[leaf] for leaf in kept}, stored_digests(published, casts), slices)
    return {
        leaf: casts[leaf] if leaf in kept else cast_record(casts, leaf, part, found[leaf])
        for leaf, part in sorted(slices.items())
        # What has become again what was published needs no record.
        if found[leaf] != published[leaf]
    }
