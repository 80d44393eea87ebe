"""What Hugging Face's form has no place for, kept in a folder of the exported directory.

The folder `flexolmo/` holds the manifest (`model.json`: names, data cards, digests), the leaves without a tensor of
theirs (biases, and an anchor's router row), of a tuned model the router as merged, and, where there are, a certificate
and the sample of public data. With it an exported directory can be imported again without a loss. transformers and vLLM
do not look into it.
"""

from collections.abc import Mapping
from typing import NamedTuple

from etils import epath

from flexolmo_jax.checkpoint import directories
from flexolmo_jax.checkpoint.tree import Slice, open_tree, write_tree
from flexolmo_jax.checkpoint.verify import check_digests, write_merged_router
from flexolmo_jax.data.corpus import Corpus
from flexolmo_jax.errors import UserError
from flexolmo_jax.interop.hugging_face import HuggingFace, leaf_shapes
from flexolmo_jax.interop.names import ROUTER_BIAS, ROUTER_WEIGHT
from flexolmo_jax.model.architecture import Architecture

FOLDER = "flexolmo"


class Sidecar(NamedTuple):
    """The folder of an exported directory.

    Attributes:
      path: where it lies.
      manifest: of the model that was exported.
      leaves: {expert: {leaf: slice}} of the leaves without a tensor of theirs.
    """

    path: epath.Path
    manifest: directories.Model
    leaves: dict[str, dict[str, Slice]]


def unplaced(manifest: directories.Model) -> tuple[str, ...]:
    """The leaves of an expert for which Hugging Face's form of that model has no tensor."""
    return (ROUTER_BIAS,) if len(manifest.experts) > 1 else (ROUTER_BIAS, ROUTER_WEIGHT)


def write_sidecar(
    directory: epath.Path,
    manifest: directories.Model,
    experts: Mapping[str, Mapping[str, Slice]],
    merged_router: Mapping[str, Mapping[str, Slice]] | None,
) -> None:
    """Writes the folder into a directory.

    Args:
      directory: the directory that is being exported.
      manifest: of the model, as it is exported.
      experts: {expert: {leaf: slice}}, all leaves.
      merged_router: of a tuned model, what `directories.merged_router` gives.

    Raises:
      UserError: a leaf is not what the manifest says.
    """
    folder = directory / FOLDER
    own = {name: {leaf: leaves[leaf] for leaf in unplaced(manifest)} for name, leaves in experts.items()}
    tree = directories.model_leaves({}, own)
    digests = directories.split_digests(
        write_tree(folder / directories.PARAMS, tree, directories.digest_name), manifest.roster
    )[1]
    for expert, found in zip(manifest.experts, digests, strict=True):
        check_digests(found, expert.stored, own[expert.name])
    if merged_router:
        write_merged_router(folder, merged_router, manifest)
    manifest.write(folder)


def open_sidecar(opened: HuggingFace, flag: str) -> Sidecar | None:
    """Opens the folder of an opened directory, where there is one.

    Raises:
      UserError: it is damaged, or describes another model than the directory holds.
    """
    folder = epath.Path(opened.path) / FOLDER
    if not (folder / directories.MODEL_FILE).exists():
        return None
    manifest = directories.Model.read(folder, flag=flag)
    architecture = Architecture.from_dict(manifest.architecture, str(folder))
    if architecture != opened.config.architecture or len(manifest.experts) != len(opened.experts):
        raise UserError(f"{flag}={folder}: describes another model than config.json; remove the folder")
    stored = open_tree(folder / directories.PARAMS)
    _, leaves = directories.model_slices(stored, manifest.roster, f"{flag}={folder}")
    shapes = leaf_shapes(architecture)
    expected = {leaf: shapes[leaf] for leaf in unplaced(manifest)}
    for name, own in leaves.items():
        if {leaf: part.shape for leaf, part in own.items()} != expected:
            raise UserError(
                f"{flag}={folder}: the leaves of {name} are not those of config.json's model; copy it again"
            )
    return Sidecar(folder, manifest, leaves)


def copy_beside(source: epath.Path, directory: epath.Path) -> None:
    """Copies what may lie beside a model's parameters: its certificate, and its sample of public data."""
    certificate = directories.CERTIFICATE_FILE
    if (source / certificate).exists():
        (source / certificate).copy(directory / certificate)
    directories.copy_files(source / directories.PUBLIC, directory / directories.PUBLIC)


def restore(sidecar: Sidecar, directory: epath.Path) -> None:
    """Brings back into a model directory what lies beside its parameters and its manifest.

    Raises:
      UserError: the router as merged, or the public sample, is not what was exported.
    """
    if sidecar.manifest.tuned:
        routers = directories.merged_router(sidecar.path, sidecar.manifest)
        write_merged_router(directory, routers, sidecar.manifest)
    if (sidecar.path / directories.PUBLIC).exists():
        Corpus.open(sidecar.path / directories.PUBLIC).verify()
    copy_beside(sidecar.path, directory)
