"""What Hugging Face's form has no place for, kept in a folder of the exported directory.

The folder `flexolmo/` holds the manifest (`model.json`: names, data cards, digests), the leaves without a tensor of
theirs (biases, and an anchor's router row), of a tuned model the router as merged, and, where there are, a certificate
and the sample of public data. With it an exported directory can be imported again without a loss. transformers and vLLM
do not look into it.
"""

from collections.abc import Mapping
from typing import NamedTuple

from etils import epath

from flexolmo_jax.checkpoint import model_directory
from flexolmo_jax.checkpoint.casts import check_digests
from flexolmo_jax.checkpoint.manifests import ModelManifest, write_manifest
from flexolmo_jax.checkpoint.model_directory import write_experts, write_merged_router, write_statistics
from flexolmo_jax.checkpoint.params import Slice
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
    manifest: ModelManifest
    leaves: dict[str, dict[str, Slice]]


def unplaced(manifest: ModelManifest) -> tuple[str, ...]:
    """The leaves of an expert for which Hugging Face's form of that model has no tensor."""
    return (ROUTER_BIAS,) if len(manifest.experts) > 1 else (ROUTER_BIAS, ROUTER_WEIGHT)


def write_sidecar(
    directory: epath.Path,
    manifest: ModelManifest,
    experts: Mapping[str, Mapping[str, Slice]],
    merged_router: Mapping[str, Mapping[str, Slice]] | None,
    statistics: Mapping[str, Mapping[str, Slice]],
) -> None:
    """Writes the folder into a directory.

    Args:
      directory: the directory that is being exported.
      manifest: of the model, as it is exported.
      experts: {expert: {leaf: slice}}, all leaves.
      merged_router: of a tuned model, what `model_directory.open_merged_router` gives.
      statistics: what `model_directory.open_statistics` gives.

    Raises:
      UserError: a leaf is not what the manifest says.
    """
    folder = directory / FOLDER
    own = {name: {leaf: leaves[leaf] for leaf in unplaced(manifest)} for name, leaves in experts.items()}
    found = write_experts(folder / model_directory.PARAMS, {}, own)
    for expert in manifest.experts:
        check_digests(found[expert.name], expert.stored, own[expert.name])
    write_statistics(folder, statistics, manifest)
    if merged_router:
        write_merged_router(folder, merged_router, manifest)
    write_manifest(folder / model_directory.MODEL_FILE, manifest)


def open_sidecar(opened: HuggingFace, flag: str) -> Sidecar | None:
    """Opens the folder of an opened directory, where there is one.

    Raises:
      UserError: it is damaged, or describes another model than the directory holds.
    """
    folder = epath.Path(opened.path) / FOLDER
    if not (folder / model_directory.MODEL_FILE).exists():
        return None
    manifest = model_directory.read_model(folder)
    architecture = Architecture.from_dict(manifest.architecture, str(folder))
    if architecture != opened.config.architecture or len(manifest.experts) != len(opened.experts):
        raise UserError(f"{flag}={folder}: describes another model than config.json; remove the folder")
    stored = model_directory.open_params(folder)
    _, leaves = model_directory.split_experts(stored, manifest.roster, f"{flag}={folder}")
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
    certificate = model_directory.CERTIFICATE_FILE
    if (source / certificate).exists():
        (source / certificate).copy(directory / certificate)
    model_directory.copy_files(source / model_directory.PUBLIC, directory / model_directory.PUBLIC)


def restore(sidecar: Sidecar, directory: epath.Path) -> None:
    """Brings back into a model directory what lies beside its parameters and its manifest.

    Raises:
      UserError: the router as merged, or the public sample, is not what was exported.
    """
    if sidecar.manifest.tuned:
        routers = model_directory.open_merged_router(sidecar.path, sidecar.manifest)
        write_merged_router(directory, routers, sidecar.manifest)
    write_statistics(directory, model_directory.open_statistics(sidecar.path, sidecar.manifest), sidecar.manifest)
    if (sidecar.path / model_directory.PUBLIC).exists():
        Corpus.open(sidecar.path / model_directory.PUBLIC).verify()
    copy_beside(sidecar.path, directory)
