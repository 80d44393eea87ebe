"""The map between our leaves and the tensors of a Hugging Face directory, derived from the leaves' declarations.

Ours are stacked over layers, matrices are [in, out], and heads have an axis of their own. Theirs are a tensor for each
layer, matrices are [out, in], and the heads are folded. Experts are stored one by one, or stacked on a first axis.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from flexolmo_jax.checkpoint.manifests import digest_name
from flexolmo_jax.checkpoint.params import Slice
from flexolmo_jax.interop.safetensors_io import Stored
from flexolmo_jax.model.architecture import ANCHOR, Architecture
from flexolmo_jax.model.decoder import Decoder
from flexolmo_jax.model.moe import ROUTER, expert_leaves
from flexolmo_jax.model.selectors import LOG_SCALE

# Leaves of an expert that a directory may lack.
ROUTER_WEIGHT, ROUTER_BIAS = ROUTER + "weight", ROUTER + "bias"
# Of the leaves that are matrices: how many of their first axes are inputs.
_INPUT_AXES = {
    "head": 1,
    "blocks/attention/query": 1,
    "blocks/attention/key": 1,
    "blocks/attention/value": 1,
    "blocks/attention/out": 2,
}


class TensorNames(NamedTuple):
    """How an architecture names its tensors; names have `{layer}` and `{expert}` in place of numbers.

    Attributes:
      shared: {path of a leaf that all experts share: name}.
      expert: name of a matrix of an expert's feed-forward, with `{leaf}` in place of the leaf's name. In a mixture, a
        name without `{expert}` is that of one tensor which stacks the experts on its first axis.
      router: the same for the leaves of the router; None: there is no router.
      leaves: {an expert's leaf: its name}, where that is not the one which the leaf's declaration gives.
      fused: {name: leaves}, another layout of the same experts that is read: [experts, outputs of all these leaves,
        inputs].
      derived: {path of a leaf that is derived when a model is loaded: name}; what is read is only compared with it.
    """

    shared: Mapping[str, str]
    expert: str
    router: str | None = None
    leaves: Mapping[str, str] = {}
    fused: Mapping[str, tuple[str, ...]] = {}
    derived: Mapping[str, str] = {}

    def of_expert(self, architecture: Architecture) -> dict[str, str]:
        """{an expert's leaf: name of its tensor}; a leaf without a tensor is not there."""
        names = {}
        for path, leaf in expert_leaves(architecture).items():
            name = self.leaves.get(path, leaf.hugging_face)
            template = self.router if path.startswith(ROUTER) else self.expert
            if name is not None and template is not None:
                names[path] = template.replace("{leaf}", name)
        return names


class LayerLeaf(NamedTuple):
    """A leaf of ours in one layer.

    Attributes:
      expert: position of the expert it belongs to, the anchor first, or None when all share it.
      leaf: its name: a path, or an expert's own leaf.
      layer: the layer, or None where the leaf has no layer axis.
    """

    expert: int | None
    leaf: str
    layer: int | None


class Tensor(NamedTuple):
    """A tensor of a Hugging Face directory.

    Attributes:
      shape: its shape.
      transposed: whether ours, as a matrix, is its transpose.
      leaves: what it holds: one leaf, or that of each expert, stacked on the first axis.
      stacked: whether it has that axis.
    """

    shape: tuple[int, ...]
    transposed: bool
    leaves: tuple[LayerLeaf, ...]
    stacked: bool = False

    def join(self, values: Sequence[np.ndarray]) -> np.ndarray:
        """The tensor of its leaves' values; a view where it can be."""
        shape = self.shape[1:] if self.stacked else self.shape
        arrays = map(np.asarray, values)  # a scalar of some dtypes has no methods
        values = [x.reshape(shape[::-1]).T if self.transposed else x.reshape(shape) for x in arrays]
        return np.stack(values) if self.stacked else values[0]

    def split(self, tensor: np.ndarray, position: int, shape: Sequence[int]) -> np.ndarray:
        """The values of the leaf at `position`, in our shape of one layer; a view where it can be."""
        values = np.asarray(tensor[position]) if self.stacked else tensor
        return (values.T if self.transposed else values).reshape(shape)


def leaf_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """{leaf: shape} of a model with one expert, and of a selector's; an expert's leaves under their own names."""
    abstract = Decoder(architecture, ANCHOR).abstract()
    return {digest_name(path): leaf.shape for path, leaf in abstract.items()} | {LOG_SCALE: ()}


def expert_leaf_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """{leaf: shape} of one expert, [layers, ...]."""
    return {path: (architecture.num_layers, *leaf.shape) for path, leaf in expert_leaves(architecture).items()}


def each_tensor(
    names: TensorNames, architecture: Architecture, num_experts: int | None
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a model one by one, as (name, tensor), since `num_experts` and layers may be absurdly many.

    Args:
      names: of the architecture.
      architecture: sizes.
      num_experts: the anchor included, or None for a dense model.
    """
    shapes = _tensor_shapes(names, architecture)

    def shared(layer: int | None) -> Iterator[tuple[str, Tensor]]:
        for leaf, name in names.shared.items():
            if leaf in shapes and ("{layer}" in name) == (layer is not None):
                yield name.format(layer=layer), Tensor(*shapes[leaf], (LayerLeaf(None, leaf, layer),))

    expert_names = names.of_expert(architecture)
    yield from shared(None)
    for layer in range(architecture.num_layers):
        yield from shared(layer)
        for expert in range(num_experts or 1):
            for leaf, name in expert_names.items():
                if "{expert}" in name or num_experts is None:
                    leaves = (LayerLeaf(expert, leaf, layer),)
                    yield name.format(layer=layer, expert=expert), Tensor(*shapes[leaf], leaves)
        for leaf, name in expert_names.items():
            if "{expert}" not in name and num_experts is not None:
                shape, transposed = shapes[leaf]
                leaves = tuple(LayerLeaf(expert, leaf, layer) for expert in range(num_experts))
                yield name.format(layer=layer), Tensor((num_experts, *shape), transposed, leaves, stacked=True)


def _tensor_shapes(names: TensorNames, architecture: Architecture) -> dict[str, tuple[tuple[int, ...], bool]]:
    """{leaf: (shape of its tensor of one layer and one expert, whether it is transposed)}."""
    shapes = {}
    one_layer = dataclasses.replace(architecture, num_layers=1)
    feed_forward = {leaf for leaf in expert_leaves(architecture) if not leaf.startswith(ROUTER)}  # all matrices
    for leaf, shape in leaf_shapes(one_layer).items():
        shape = shape[1:] if "{layer}" in names.shared.get(leaf, "{layer}") else shape
        inputs = 1 if leaf in feed_forward else _INPUT_AXES.get(leaf, 0)
        if inputs:
            shapes[leaf] = (math.prod(shape[inputs:]), math.prod(shape[:inputs])), True
        else:
            shapes[leaf] = shape if leaf == "embedding" or not shape else (math.prod(shape),), False
    return shapes


def separate_experts(stored: Mapping[str, Stored], names: TensorNames, architecture: Architecture) -> dict[str, Stored]:
    """Names every expert's matrices in fused tensors as if they were stored one by one."""
    shapes, expert_names = _tensor_shapes(names, architecture), names.of_expert(architecture)
    patterns = {re.escape(name).replace(r"\{layer\}", r"(\d+)"): leaves for name, leaves in names.fused.items()}
    found = {}
    for name, tensor in stored.items():
        matches = ((re.fullmatch(pattern, name), leaves) for pattern, leaves in patterns.items())
        match, leaves = next((pair for pair in matches if pair[0]), (None, ()))
        lengths = [shapes[leaf][0][0] for leaf in leaves]
        if not match or len(tensor.shape) != 3 or 0 in tensor.shape or tensor.shape[1] != sum(lengths):
            found[name] = tensor
            continue
        for expert in range(tensor.shape[0]):
            matrix, start = tensor.item(expert), 0
            for leaf, length in zip(leaves, lengths, strict=True):
                separate = expert_names[leaf].format(layer=match[1], expert=expert)
                found[separate] = matrix.range(start, start + length)
                start += length
    return found


class LazyLeaf:
    """A leaf of ours, read from its tensors when a block of it is asked for; a source for `params.Slice`.

    A block is a part of a layer's matrix, along our first axis, which is the tensor's last. So a tensor is kept in
    memory until the last of its blocks was read.
    """

    def __init__(self, shape: Sequence[int], dtype: np.dtype, layered: bool, read: Callable[[int], np.ndarray]):
        """Wraps a leaf.

        Args:
          shape: [layers, ...], or of the whole leaf where it has no layer axis.
          dtype: of the leaf.
          layered: whether it has one.
          read: layer -> its values, in the shape without the layer axis.
        """
        self.shape, self.dtype = tuple(shape), np.dtype(dtype)
        self._layered, self._read = layered, read
        self._layer: int | None = None
        self._values: np.ndarray | None = None

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        if not self._layered:
            return self._block(0, index, self.shape)
        layers = range(*index[0].indices(self.shape[0]))
        block = [len(range(*along.indices(size))) for along, size in zip(index[1:], self.shape[1:], strict=True)]
        values = np.empty((len(layers), *block), self.dtype)
        for i, layer in enumerate(layers):
            values[i] = self._block(layer, index[1:], self.shape[1:])
        return values

    def _block(self, layer: int, index: tuple[slice, ...], shape: tuple[int, ...]) -> np.ndarray:
        if self._layer != layer or self._values is None:
            self._layer, self._values = layer, self._read(layer)
        block = np.asarray(self._values[index])
        if all(along.indices(length)[1] == length for along, length in zip(index, shape, strict=True)):
            self._layer, self._values = None, None
        return block


def leaves_of(
    table: Mapping[str, Tensor],
    stored: Mapping[str, Stored],
    shapes: Mapping[str, Sequence[int]],
    label: str,
) -> tuple[dict[str, Slice], list[dict[str, Slice]]]:
    """Our leaves as slices that read their tensors.

    Args:
      table: {name: tensor}.
      stored: the tensors by the same names, of these shapes.
      shapes: what `leaf_shapes` gives.
      label: names the directory in errors.

    Returns:
      ({path: slice} of the shared leaves, [{leaf: slice}] of the experts, in their order).
    """
    places: dict[tuple[int | None, str], dict[int | None, tuple[str, int]]] = {}
    for name, tensor in table.items():
        for position, key in enumerate(tensor.leaves):
            places.setdefault((key.expert, key.leaf), {})[key.layer] = (name, position)
    shared: dict[str, Slice] = {}
    experts: dict[int, dict[str, Slice]] = {}
    for (expert, leaf), by_layer in places.items():
        layered = None not in by_layer
        shape = tuple(shapes[leaf])

        def read(layer, by_layer=by_layer, layered=layered, shape=shape):
            name, position = by_layer[layer if layered else None]
            return table[name].split(stored[name].read(), position, shape[1:] if layered else shape)

        names = [name for name, _ in by_layer.values()]
        lazy = LazyLeaf(shape, stored[names[0]].dtype, layered, read)
        name = names[0] if len(names) == 1 else re.sub(r"(?<=\.)\d+(?=\.)", "*", names[0], count=1)
        group = shared if expert is None else experts.setdefault(expert, {})
        group[leaf] = Slice(lazy, None, f"{label}: {name}")
    return shared, [experts[i] for i in range(len(experts))]


def tensor_values(tensor: Tensor, shared: Mapping[str, Slice], experts: Sequence[Mapping[str, Slice]]) -> np.ndarray:
    """The values of one tensor, read from our leaves; `experts` in their order."""
    values = []
    for key in tensor.leaves:
        leaf = _find(key, shared, experts)
        whole = tuple(slice(0, length) for length in leaf.shape)
        layer = () if key.layer is None else (slice(key.layer, key.layer + 1),)
        block = leaf.read(layer + whole[len(layer) :])
        values.append(block[0] if layer else block)
    return tensor.join(values)


def tensor_dtype(tensor: Tensor, shared: Mapping[str, Slice], experts: Sequence[Mapping[str, Slice]]) -> np.dtype:
    """The dtype of what `tensor_values` returns."""
    return _find(tensor.leaves[0], shared, experts).dtype


def _find(key: LayerLeaf, shared: Mapping[str, Slice], experts: Sequence[Mapping[str, Slice]]) -> Slice:
    return (shared if key.expert is None else experts[key.expert])[key.leaf]
