"""Whether the leaves of a directory are the ones its manifest names."""

from collections.abc import Mapping

from etils import epath

from flexolmo_jax.checkpoint import directories
from flexolmo_jax.checkpoint.tree import Slice, digest_slice
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
    named = {"": manifest.shared, **{expert.name: expert.leaves for expert in manifest.experts}}
    check_content({"": shared, **experts}, named)


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


def check_digests(found: Mapping[str, str], named: Mapping[str, str], slices: Mapping[str, Slice]) -> None:
    """Raises UserError where the content of a leaf is not what the manifest says."""
    for leaf, digest in found.items():
        if digest != named[leaf]:
            raise UserError(
                f"{slices[leaf].name}: altered (its digest is {digest[:12]}, the manifest says {named[leaf][:12]}); "
                "copy it again from its source"
            )
