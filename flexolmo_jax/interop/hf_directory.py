"""A directory in Hugging Face's form: weights, tokenizer, generation settings, and our own folder beside them.

The folder `flexolmo/` holds what Hugging Face's form has no place for: the manifest (`model.json`: names, data cards,
digests), the leaves without a tensor (biases, and an anchor's router weights), of a tuned model the router as merged,
and, where there are, statistics, a certificate and the sample of public data. With it an exported directory can be
imported again without a loss. transformers and vLLM do not look into it.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from flexolmo_jax.checkpoint import model_directory
from flexolmo_jax.checkpoint.copying import write_tree
from flexolmo_jax.checkpoint.manifests import ModelManifest, write_manifest
from flexolmo_jax.checkpoint.model_directory import model_trees, open_merged_router, trees_beside
from flexolmo_jax.checkpoint.params import Slice
from flexolmo_jax.checkpoint.statistics import open_statistics
from flexolmo_jax.data.corpus import Corpus
from flexolmo_jax.data.tokenization.tokenizer import load_tokenizer
from flexolmo_jax.errors import NotFoundError, UserError
from flexolmo_jax.interop.architectures import HuggingFaceArchitecture, read_config
from flexolmo_jax.interop.config import CONFIG_FILE, Config
from flexolmo_jax.interop.safetensors_io import Stored, open_tensors
from flexolmo_jax.interop.tensors import (
    ROUTER_WEIGHT,
    Tensor,
    each_tensor,
    expert_leaf_shapes,
    leaf_shapes,
    leaves_of,
    separate_experts,
)
from flexolmo_jax.model.architecture import Architecture

FOLDER = "flexolmo"
SETTINGS = model_directory.TOKENIZER_FOLDER  # in a model directory, the files of `SETTINGS_FILES` as they were imported
SETTINGS_FILES = model_directory.TOKENIZER_FILES


class Opened(NamedTuple):
    """An opened directory, all of it checked but the tensors' values.

    Attributes:
      path: where it is.
      kind: its architecture.
      config: what `config.json` says.
      table: {name: tensor}, experts one by one.
      stored: where each is stored.
      shared: {path: slice} of the leaves that all experts share.
      experts: {leaf: slice} of each expert; those without a tensor are not there.
      derived: {path: where it is stored} of the leaves that are derived when a model is loaded.
    """

    path: pathlib.Path
    kind: HuggingFaceArchitecture
    config: Config
    table: dict[str, Tensor]
    stored: dict[str, Stored]
    shared: dict[str, Slice]
    experts: list[dict[str, Slice]]
    derived: dict[str, Stored]


def open_directory(path: pathlib.Path, label: str | None = None) -> Opened:
    """Opens a local directory.

    Args:
      path: the directory.
      label: names it in errors about values; by default its path.

    Raises:
      UserError: it is missing, its configuration or a file is not read here, or a tensor is missing, unknown, or of
        another shape than the configuration implies.
    """
    if not path.is_dir():
        raise NotFoundError(f"{path}: no such directory; give a local directory in Hugging Face's form")
    kind, config = read_config(path)
    architecture = config.architecture
    stored = separate_experts(open_tensors(path), kind.names, architecture)
    head = kind.names.shared["head"]
    if architecture.tied_embeddings and head in stored:
        _check_tie(stored, head, kind.names.shared["embedding"])
        del stored[head]
    table, missing = {}, "is missing, which config.json implies; copy it again"
    for name, tensor in each_tensor(kind.names, architecture, config.num_experts):
        if name not in stored:
            raise UserError(f"{path}: tensor {name} {missing}")
        table[name] = tensor
    derived = {}
    for leaf, name in kind.names.derived.items():
        if name not in stored:
            raise UserError(f"{path}: tensor {name} {missing}")
        derived[leaf] = stored.pop(name)
    _check_tensors(path, table, stored)
    shared, experts = leaves_of(table, stored, leaf_shapes(architecture), label or str(path))
    return Opened(path, kind, config, table, stored, shared, experts, derived)


def absent_leaves(leaves: Mapping[str, Slice], architecture: Architecture, label: str) -> dict[str, Slice]:
    """Zeros for the leaves of an expert that a Hugging Face directory does not hold, in the dtype of its others."""
    dtype = leaves.get(ROUTER_WEIGHT, leaves["gate"]).dtype
    missing = {leaf: shape for leaf, shape in expert_leaf_shapes(architecture).items() if leaf not in leaves}
    return {leaf: Slice(np.zeros(shape, dtype), None, f"{label}: {leaf}") for leaf, shape in sorted(missing.items())}


def _check_tensors(path: pathlib.Path, table: Mapping[str, Tensor], stored: Mapping[str, Stored]) -> None:
    unknown = stored.keys() - table.keys()
    if unknown:
        raise UserError(f"{path}: tensor {min(unknown)} is not one of the model that config.json describes")
    dtypes: dict[str, tuple[str, np.dtype]] = {}
    for name, tensor in table.items():
        found = stored[name]
        if found.shape != tensor.shape:
            raise UserError(
                f"{path}: tensor {name} is {list(found.shape)} in {found.file.name}; "
                f"config.json implies {list(tensor.shape)}"
            )
        first, dtype = dtypes.setdefault(tensor.leaves[0].leaf, (name, found.dtype))
        if found.dtype != dtype:
            raise UserError(
                f"{path}: tensor {name} is {found.dtype.name}, {first} {dtype.name}; convert them to one dtype"
            )


def _check_tie(stored: Mapping[str, Stored], head_name: str, embedding_name: str) -> None:
    head, embedding = stored[head_name], stored.get(embedding_name)
    if embedding is None or head.shape != embedding.shape or not same_bytes(head.read(), embedding.read()):
        raise UserError(
            f"{head.file}: {head_name} is not {embedding_name}, and config.json ties them; "
            'set "tie_word_embeddings" to false there'
        )


def same_bytes(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays have one dtype, one shape and the same bits (so that -0 is not 0)."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    unsigned = np.dtype(f"u{a.dtype.itemsize}")
    return bool(np.array_equal(np.asarray(a).view(unsigned), np.asarray(b).view(unsigned)))


# The folder beside the weights.


class Sidecar(NamedTuple):
    """The folder `flexolmo/` of an exported directory.

    Attributes:
      path: where it is.
      manifest: of the model that was exported.
      leaves: {expert: {leaf: slice}} of the leaves without a tensor.
    """

    path: epath.Path
    manifest: ModelManifest
    leaves: dict[str, dict[str, Slice]]


def write_sidecar(
    directory: epath.Path,
    manifest: ModelManifest,
    leaves: Mapping[str, Mapping[str, Slice]],
    merged_router: Mapping[str, Mapping[str, Slice]] | None,
    statistics: Mapping[str, Mapping[str, Slice]],
) -> None:
    """Writes the folder into a directory.

    Args:
      directory: the directory that is being exported.
      manifest: of the model, as it is exported.
      leaves: {expert: {leaf: slice}} of the leaves without a tensor.
      merged_router: of a tuned model, what `model_directory.open_merged_router` gives.
      statistics: what `statistics.open_statistics` gives.

    Raises:
      UserError: a leaf is not what the manifest says.
    """
    folder = directory / FOLDER
    trees = model_trees(manifest, {}, leaves) | trees_beside(manifest, statistics, merged_router or {})
    for name, tree in trees.items():
        write_tree(folder / name, *tree)
    write_manifest(folder / model_directory.MODEL_FILE, manifest)


def open_sidecar(opened: Opened) -> Sidecar | None:
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
        raise UserError(f"{folder}: describes another model than config.json; remove the folder")
    stored = model_directory.open_params(folder)
    _, leaves = model_directory.split_experts(stored, manifest.roster, str(folder))
    expected = {leaf: part.shape for leaf, part in absent_leaves(opened.experts[0], architecture, "").items()}
    for name, found in leaves.items():
        if {leaf: part.shape for leaf, part in found.items()} != expected:
            raise UserError(f"{folder}: the leaves of {name} are not those of config.json's model; copy it again")
    return Sidecar(folder, manifest, leaves)


def copy_certificate_and_sample(source: epath.Path, directory: epath.Path) -> None:
    """Copies what may stand beside a model's parameters: its certificate, and its sample of public data."""
    certificate = model_directory.CERTIFICATE_FILE
    if (source / certificate).exists():
        (source / certificate).copy(directory / certificate)
    model_directory.copy_files(source / model_directory.PUBLIC, directory / model_directory.PUBLIC)


def restore(sidecar: Sidecar, directory: epath.Path) -> None:
    """Brings back into a model directory what stands beside its parameters and its manifest.

    Raises:
      UserError: the router as merged, or the public sample, is not what was exported.
    """
    manifest, path = sidecar.manifest, sidecar.path
    router = open_merged_router(path, manifest) if manifest.tuned else {}
    for name, tree in trees_beside(manifest, open_statistics(path, manifest), router).items():
        write_tree(directory / name, *tree)
    if (sidecar.path / model_directory.PUBLIC).exists():
        Corpus.open(sidecar.path / model_directory.PUBLIC).verify()
    copy_certificate_and_sample(sidecar.path, directory)


# Tokenizer and generation settings. `tokenizer.json` is copied as it is. The small files around it are made from the
# manifest when a model is exported. Where an imported directory had others, the model directory keeps them, and they
# are exported again.


def read_tokenizer(source: pathlib.Path, config: Config) -> tuple[str, int]:
    """The tokenizer's digest ("" where there is none) and the id of EOS.

    Raises:
      UserError: no file says which token EOS is, or the tokenizer is damaged or larger than the embedding.
    """
    file = source / model_directory.TOKENIZER_FILE
    if not file.exists():
        if config.eos_id is None:
            raise UserError(f"{source / CONFIG_FILE}: lacks eos_token_id; add the id of the token that ends a document")
        return "", config.eos_id
    eos_label = f"eos_token_id in {source / CONFIG_FILE}"
    tokenizer = load_tokenizer(file, eos_id=config.eos_id, label=str(file), eos_label=eos_label)
    if tokenizer.vocab_size > config.architecture.vocab_size:
        raise UserError(
            f"{file}: has ids up to {tokenizer.vocab_size - 1}, and config.json a vocab_size of "
            f"{config.architecture.vocab_size}; copy the tokenizer again from the model's source"
        )
    return tokenizer.digest, tokenizer.eos_id


def unused_eos(source: pathlib.Path, config: Config) -> list[str]:
    """A line where `config.json` names several tokens as EOS, of which the first is used."""
    file, ids = source / CONFIG_FILE, config.eos_ids
    return [f"{file}: names {len(ids)} tokens as EOS; the first, {ids[0]}, is used here"] if len(ids) > 1 else []


def import_tokenizer(source: pathlib.Path, directory: epath.Path, manifest: ModelManifest) -> None:
    """Copies the tokenizer into a model directory, and the settings that an export would not make again."""
    file = source / model_directory.TOKENIZER_FILE
    if file.exists():
        (directory / model_directory.TOKENIZER_FILE).write_bytes(file.read_bytes())
    made = _settings(directory, manifest)
    for name in SETTINGS_FILES:
        content = (source / name).read_bytes() if (source / name).is_file() else None
        if content is not None and content != made.get(name, "").encode():
            (directory / SETTINGS).mkdir(exist_ok=True)
            (directory / SETTINGS / name).write_bytes(content)


def export_tokenizer(model: epath.Path, directory: epath.Path, manifest: ModelManifest) -> bool:
    """Writes the tokenizer and the settings beside exported weights; returns whether the model has a tokenizer."""
    has_tokenizer = (model / model_directory.TOKENIZER_FILE).exists()
    if has_tokenizer:
        (model / model_directory.TOKENIZER_FILE).copy(directory / model_directory.TOKENIZER_FILE)
    for name, text in _settings(directory, manifest).items():
        (directory / name).write_text(text)
    for name in SETTINGS_FILES:
        if (model / SETTINGS / name).exists():
            (directory / name).write_bytes((model / SETTINGS / name).read_bytes())
    return has_tokenizer


def _settings(directory: epath.Path, manifest: ModelManifest) -> dict[str, str]:
    """{file: text} as made from the manifest, and from the tokenizer.json in `directory` where there is one."""
    # A document begins and ends with EOS, which pads as well.
    generation = {f"{role}_token_id": manifest.eos_id for role in ("bos", "eos", "pad")}
    documents: dict[str, dict[str, Any]] = {"generation_config.json": generation}
    file = directory / model_directory.TOKENIZER_FILE
    if file.exists():
        eos = load_tokenizer(file, eos_id=manifest.eos_id, label=str(file)).backend.id_to_token(manifest.eos_id)
        documents["tokenizer_config.json"] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": eos,
            "eos_token": eos,
            "pad_token": eos,
            "model_max_length": manifest.context_length,
            "clean_up_tokenization_spaces": False,
        }
    return {name: json.dumps(document, indent=2) + "\n" for name, document in documents.items()}
