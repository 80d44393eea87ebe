"""A directory in Hugging Face's form, opened: its configuration, and its tensors as leaves of ours."""

import pathlib
from typing import NamedTuple

import numpy as np

from flexolmo_jax.checkpoint.manifests import digest_name
from flexolmo_jax.checkpoint.params import Slice
from flexolmo_jax.errors import UserError
from flexolmo_jax.interop import names
from flexolmo_jax.interop.config import Config, read_config
from flexolmo_jax.interop.safetensors_io import Stored, open_tensors
from flexolmo_jax.model.architecture import ANCHOR, Architecture
from flexolmo_jax.model.decoder import Decoder


class HuggingFace(NamedTuple):
    """An opened directory, all of it checked but the tensors' values.

    Attributes:
      path: where it lies.
      config: what `config.json` says.
      table: {name: tensor}, experts one by one.
      stored: where each lies.
      shared: {path: slice} of the leaves that all experts share.
      experts: {leaf: slice} of each expert; of a dense model without a router row; never with a bias.
    """

    path: pathlib.Path
    config: Config
    table: dict[str, names.Tensor]
    stored: dict[str, Stored]
    shared: dict[str, Slice]
    experts: list[dict[str, Slice]]


def open_hugging_face(path: pathlib.Path, flag: str, label: str | None = None) -> HuggingFace:
    """Opens a local directory.

    Args:
      path: the directory.
      flag: the flag that names it, for errors.
      label: what to call it in errors about tensors; by default flag and path.

    Raises:
      UserError: it is missing, its configuration or a file is not read here, or a tensor is missing, unknown, or of
        another shape than the configuration implies.
    """
    if not path.is_dir():
        raise UserError(f"{flag}={path}: no such directory; give a local directory in Hugging Face's form")
    config = read_config(path)
    stored = names.separate_experts(open_tensors(path), config.architecture.d_ff)
    if config.architecture.tied_embeddings and names.HEAD in stored:
        _check_tie(stored)
        del stored[names.HEAD]
    table = _table(path, config, stored)
    _check_tensors(path, table, stored)
    shapes = leaf_shapes(config.architecture)
    leaves = names.leaves(table, stored, shapes, label or f"{flag}={path}")
    shared = leaves.pop(None)
    return HuggingFace(path, config, table, stored, shared, [leaves[i] for i in range(len(leaves))])


def leaf_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """{leaf: shape} of a model; an expert's leaves under their own names."""
    abstract = Decoder(architecture, ANCHOR).abstract()
    return {digest_name(path): leaf.shape for path, leaf in abstract.items()}


def absent_leaves(leaves: dict[str, Slice], architecture: Architecture, label: str) -> dict[str, Slice]:
    """Zeros for the leaves of an expert that a Hugging Face directory does not hold, in the dtype of its others."""
    shapes, dtype = leaf_shapes(architecture), leaves.get(names.ROUTER_WEIGHT, leaves["gate"]).dtype
    missing = {names.ROUTER_WEIGHT, names.ROUTER_BIAS} - leaves.keys()
    return {leaf: Slice(np.zeros(shapes[leaf], dtype), None, f"{label}: {leaf}") for leaf in sorted(missing)}


def _table(path: pathlib.Path, config: Config, stored: dict[str, Stored]) -> dict[str, names.Tensor]:
    """`names.tensors`, up to the first that is missing: config.json may imply any number of them."""
    table = {}
    for name, tensor in names.each_tensor(config.architecture, config.num_experts):
        if name not in stored:
            raise UserError(f"{path}: tensor {name} is missing, which config.json implies; copy it again")
        table[name] = tensor
    return table


def _check_tensors(path: pathlib.Path, table: dict[str, names.Tensor], stored: dict[str, Stored]) -> None:
    unknown = stored.keys() - table.keys()
    if unknown:
        raise UserError(f"{path}: tensor {min(unknown)} is not one of the model that config.json describes")
    dtypes: dict[tuple[str, ...], tuple[str, np.dtype]] = {}
    for name, tensor in table.items():
        here = stored[name]
        if here.shape != tensor.shape:
            raise UserError(
                f"{path}: tensor {name} is {list(here.shape)} in {here.file.name}; "
                f"config.json implies {list(tensor.shape)}"
            )
        leaf = tensor.parts[0].leaf
        first, dtype = dtypes.setdefault(leaf, (name, here.dtype))
        if here.dtype != dtype:
            raise UserError(
                f"{path}: tensor {name} is {here.dtype.name}, {first} {dtype.name}; convert them to one dtype"
            )


def _check_tie(stored: dict[str, Stored]) -> None:
    head, embedding = stored[names.HEAD], stored.get(names.EMBEDDING)
    if embedding is None or head.shape != embedding.shape or not same_bytes(head.read(), embedding.read()):
        raise UserError(
            f"{head.file}: {names.HEAD} is not {names.EMBEDDING}, and config.json ties them; "
            'set "tie_word_embeddings" to false there'
        )


def same_bytes(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays have one dtype, one shape and the same bits (so that -0 is not 0)."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    unsigned = np.dtype(f"u{a.dtype.itemsize}")
    return bool(np.array_equal(np.asarray(a).view(unsigned), np.asarray(b).view(unsigned)))
