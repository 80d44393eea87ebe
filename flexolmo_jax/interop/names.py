"""The map between our leaves and Hugging Face's tensors (`Olmo2ForCausalLM`, `FlexOlmoForCausalLM`).

Ours are stacked over layers, matrices are [in, out], and heads have an axis of their own. Theirs are a tensor for each
layer, matrices are [out, in], and the heads are folded. Experts are written one by one
(`mlp.experts.3.gate_proj.weight`), as `save_pretrained` writes them; newer versions of transformers hold them fused in
memory (`mlp.experts.gate_up_proj` [experts, 2 d_ff, d_model], gate first; `mlp.experts.down_proj`), and such files are
read too.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from flexolmo_jax.checkpoint.params import Slice
from flexolmo_jax.interop.safetensors_io import Stored
from flexolmo_jax.model.architecture import Architecture

# Of a leaf in a block: (Hugging Face's name, whether a matrix is transposed).
_BLOCK = {
    "blocks/attention/query": ("self_attn.q_proj", True),
    "blocks/attention/key": ("self_attn.k_proj", True),
    "blocks/attention/value": ("self_attn.v_proj", True),
    "blocks/attention/out": ("self_attn.o_proj", True),
    "blocks/attention/query_norm/scale": ("self_attn.q_norm", False),
    "blocks/attention/key_norm/scale": ("self_attn.k_norm", False),
    "blocks/attention_norm/scale": ("post_attention_layernorm", False),
    "blocks/moe_norm/scale": ("post_feedforward_layernorm", False),
}
_EXPERT = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
ROUTER_WEIGHT, ROUTER_BIAS = "router/weight", "router/bias"
HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"


class Part(NamedTuple):
    """A leaf of ours in one layer.

    Attributes:
      expert: position of the expert it belongs to, the anchor first, or None when all share it.
      leaf: its name: a path, or an expert's own leaf.
      layer: the layer, or None where the leaf has no such axis.
    """

    expert: int | None
    leaf: str
    layer: int | None


class Tensor(NamedTuple):
    """A tensor of theirs: the values of one part, transposed or not, or a row for each of several (the router).

    Attributes:
      shape: of theirs.
      transposed: whether ours, as a matrix, is its transpose.
      parts: what of ours it holds.
    """

    shape: tuple[int, ...]
    transposed: bool
    parts: tuple[Part, ...]

    def join(self, values: Sequence[np.ndarray]) -> np.ndarray:
        """The tensor of its parts' values; a view where it can be."""
        if len(self.parts) > 1:
            return np.stack(values)
        return values[0].reshape(self.shape[::-1]).T if self.transposed else values[0].reshape(self.shape)

    def split(self, tensor: np.ndarray, at: int, shape: Sequence[int]) -> np.ndarray:
        """The values of part `at`, in our shape of one layer; a view where it can be."""
        if len(self.parts) > 1:
            return tensor[at]
        return (tensor.T if self.transposed else tensor).reshape(shape)


def tensors(arch: Architecture, num_experts: int | None) -> dict[str, Tensor]:
    """{name: tensor} of a model in Hugging Face's form; `num_experts` None for a dense one (`Olmo2ForCausalLM`)."""
    return dict(each_tensor(arch, num_experts))


def each_tensor(arch: Architecture, num_experts: int | None) -> Iterator[tuple[str, Tensor]]:
    """The items of `tensors` one by one, for sizes that may be absurd."""
    d_model, d_ff = arch.d_model, arch.d_ff
    heads, kv_heads = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
    shapes = {
        "self_attn.q_proj": (heads, d_model),
        "self_attn.k_proj": (kv_heads, d_model),
        "self_attn.v_proj": (kv_heads, d_model),
        "self_attn.o_proj": (d_model, heads),
        "self_attn.q_norm": (heads,),
        "self_attn.k_norm": (kv_heads,),
        "post_attention_layernorm": (d_model,),
        "post_feedforward_layernorm": (d_model,),
        "gate_proj": (d_ff, d_model),
        "up_proj": (d_ff, d_model),
        "down_proj": (d_model, d_ff),
    }
    yield EMBEDDING, Tensor((arch.vocab_size, d_model), False, (Part(None, "embedding", None),))
    for layer in range(arch.num_layers):
        prefix = f"model.layers.{layer}."
        for leaf, (stem, transposed) in _BLOCK.items():
            yield f"{prefix}{stem}.weight", Tensor(shapes[stem], transposed, (Part(None, leaf, layer),))
        for expert in range(num_experts or 1):
            for leaf, stem in _EXPERT.items():
                name = f"{prefix}mlp.experts.{expert}.{stem}" if num_experts else f"{prefix}mlp.{stem}"
                yield f"{name}.weight", Tensor(shapes[stem], True, (Part(expert, leaf, layer),))
        if num_experts:
            rows = tuple(Part(expert, ROUTER_WEIGHT, layer) for expert in range(num_experts))
            yield f"{prefix}mlp.gate.weight", Tensor((num_experts, d_model), False, rows)
    yield "model.norm.weight", Tensor((d_model,), False, (Part(None, "final_norm/scale", None),))
    if not arch.tied_embeddings:
        yield HEAD, Tensor((arch.vocab_size, d_model), True, (Part(None, "head", None),))


def separate_experts(stored: Mapping[str, Stored], d_ff: int) -> dict[str, Stored]:
    """Names every expert's matrices in fused tensors as if they were written one by one."""
    found = {}
    for name, tensor in stored.items():
        match = re.fullmatch(r"(model\.layers\.\d+\.mlp\.experts\.)(gate_up_proj|down_proj)", name)
        fused = match and len(tensor.shape) == 3 and 0 not in tensor.shape
        if not fused or (match[2] == "gate_up_proj" and tensor.shape[1] != 2 * d_ff):
            found[name] = tensor
            continue
        for expert in range(tensor.shape[0]):
            matrix, prefix = tensor.row(expert), f"{match[1]}{expert}."
            if match[2] == "down_proj":
                found[f"{prefix}down_proj.weight"] = matrix
            else:
                found[f"{prefix}gate_proj.weight"] = matrix.rows(0, d_ff)
                found[f"{prefix}up_proj.weight"] = matrix.rows(d_ff, 2 * d_ff)
    return found


class Layers:
    """A leaf of ours, read from their tensors when a block of it is asked for; a source for `params.Slice`.

    Blocks split a layer's matrix along rows, which are columns of theirs: the tensor at hand is kept until the last of
    its blocks was read.
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
        self._at, self._held = None, None

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        if not self._layered:
            return self._block(0, index, self.shape)
        layers, values = range(*index[0].indices(self.shape[0])), None
        for at, layer in enumerate(layers):
            block = self._block(layer, index[1:], self.shape[1:])
            if values is None:
                values = np.empty((len(layers), *block.shape), self.dtype)
            values[at] = block
        return values

    def _block(self, layer: int, index: tuple[slice, ...], shape: tuple[int, ...]) -> np.ndarray:
        if self._at != layer:
            self._at, self._held = layer, self._read(layer)
        block = self._held[index]
        if all(part.indices(length)[1] == length for part, length in zip(index, shape, strict=True)):
            self._at, self._held = None, None
        return block


def leaves(
    table: Mapping[str, Tensor],
    stored: Mapping[str, Stored],
    shapes: Mapping[str, Sequence[int]],
    label: str,
) -> dict[int | None, dict[str, Slice]]:
    """Our leaves as slices that read their tensors, {expert or None: {leaf: slice}}.

    Args:
      table: what `tensors` returned.
      stored: the tensors by the same names, of these shapes.
      shapes: {leaf: our shape}, the expert's leaves under their own names.
      label: names the directory in errors.
    """
    places: dict[tuple[int | None, str], dict[int | None, tuple[str, int]]] = {}
    for name, tensor in table.items():
        for at, part in enumerate(tensor.parts):
            places.setdefault((part.expert, part.leaf), {})[part.layer] = (name, at)
    found: dict[int | None, dict[str, Slice]] = {}
    for (expert, leaf), where in places.items():
        layered = None not in where
        shape = tuple(shapes[leaf])

        def read(layer, where=where, layered=layered, shape=shape):
            name, at = where[layer if layered else None]
            return table[name].split(stored[name].read(), at, shape[1:] if layered else shape)

        dtype = stored[next(iter(where.values()))[0]].dtype
        slices = found.setdefault(expert, {})
        slices[leaf] = Slice(Layers(shape, dtype, layered, read), None, f"{label}: {_described(where)}")
    return found


def tensor_values(tensor: Tensor, shared: Mapping[str, Slice], experts: Sequence[Mapping[str, Slice]]) -> np.ndarray:
    """The values of one of their tensors, read from our leaves; `experts` in their order."""
    values = []
    for part in tensor.parts:
        leaf = (shared if part.expert is None else experts[part.expert])[part.leaf]
        every = tuple(slice(0, length) for length in leaf.shape)
        layer = () if part.layer is None else (slice(part.layer, part.layer + 1),)
        block = leaf.read(layer + every[len(layer) :])
        values.append(block[0] if layer else block)
    return tensor.join(values)


def tensor_dtype(tensor: Tensor, shared: Mapping[str, Slice], experts: Sequence[Mapping[str, Slice]]) -> np.dtype:
    """The dtype of what `tensor_values` returns."""
    part = tensor.parts[0]
    return (shared if part.expert is None else experts[part.expert])[part.leaf].dtype


def _described(where: Mapping[int | None, tuple[str, int]]) -> str:
    """The tensors of a leaf, in short."""
    names = [name for name, _ in where.values()]
    return names[0] if len(names) == 1 else re.sub(r"layers\.\d+", "layers.*", names[0])
