"""Statistics of owners: leaves beside the parameters, from which a selector's tables are derived (docs/formats.md)."""

from collections.abc import Mapping

import numpy as np
from etils import epath

from flexolmo_jax.checkpoint.casts import Experts
from flexolmo_jax.checkpoint.digests import whole
from flexolmo_jax.checkpoint.manifests import ContributionManifest, ModelManifest
from flexolmo_jax.checkpoint.model_directory import STATISTICS, check_leaves
from flexolmo_jax.checkpoint.params import Slice, open_tree


def open_statistics(path: epath.PathLike, manifest: ModelManifest | ContributionManifest) -> Experts:
    """The statistics of a model's experts, or of a contribution's one, {expert: {leaf: slice}}; most have none.

    Raises:
      UserError: a leaf is missing, or not in the manifest.
    """
    folder = epath.Path(path) / STATISTICS
    stored = open_tree(folder) if folder.exists() else {}
    if isinstance(manifest, ContributionManifest):
        named, prefix = {manifest.name: manifest.statistics}, ""
    else:
        named, prefix = {e.name: e.statistics for e in manifest.experts}, "{}/"
    paths = {prefix.format(name) + leaf: (name, leaf) for name, leaves in named.items() for leaf in leaves}
    check_leaves(stored, dict.fromkeys(paths, ""), str(folder))
    experts: Experts = {name: {} for name in named}
    for leaf_path, (name, leaf) in paths.items():
        experts[name][leaf] = Slice(stored[leaf_path], None, f"{folder}: leaf {leaf_path}")
    return experts


def read_statistics(statistics: Mapping[str, Slice], selector: str) -> dict[str, np.ndarray]:
    """The arrays that a selector needs, of what `open_statistics` gives for an expert; none where there are none."""
    prefix = f"{selector}/"
    return {leaf: part.read(whole(part.shape)) for leaf, part in statistics.items() if leaf.startswith(prefix)}
