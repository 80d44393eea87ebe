"""Floating-point operations of a step, counted from the sizes alone, and bytes that decoding reads.

A matmul takes 2 FLOPs for each multiply-add. Its backward pass takes as many again for each of its two operands that
needs a gradient: a trainable leaf does, and so does an activation computed from a trainable leaf. Frozen weights need
none, nor does anything below the lowest trainable leaf. So a step costs, over all matmuls m and tokens,

    sum of 2 m (1 + [left operand needs a gradient] + [right operand needs one])

with these multiply-adds m for a token in a block (D d_model, C = D / Q head size, Q query heads, H key-value heads,
S length):

    query, out     D D           scores, and the weighted sum of values      D (S + 1) / 2 each
    key, value     D H C each    leaves of the router                        their size, for each expert
    leaves of an expert          their size, for the top k of stacked experts, and for all of the other layouts

and D V for the head. (S + 1) / 2 is the number of positions that a token sees, on average. Work beyond that is not
counted: keys that causality masks, activations recomputed for the backward pass, the gradient of the first block's
input where a loop over blocks computes it, experts beyond the top k; nor is work that is not a matmul, such as norms
and softmaxes.
"""

import math
from collections.abc import Collection, Mapping

import jax

from flexolmo_jax.checkpoint.manifests import ROUTER
from flexolmo_jax.model.architecture import Architecture, Layout
from flexolmo_jax.model.leaves import Leaf
from flexolmo_jax.model.moe import expert_leaves
from flexolmo_jax.model.selectors import is_derived, uses_router


def train_step_flops(
    architecture: Architecture, layout: Layout, trainable: Collection[str], batch: int, length: int
) -> float:
    """FLOPs of a training step.

    Args:
      architecture: sizes of the model.
      layout: layout of its experts.
      trainable: paths of the trainable leaves; without any, the result is that of a forward pass.
      batch: sequences of the step.
      length: tokens in a sequence, each of which is one document.
    """
    return batch * length * _token(architecture, layout, trainable, keys=(length + 1) / 2)


def recomputed_flops(architecture: Architecture, layout: Layout, remat: str, batch: int, length: int) -> float:
    """FLOPs that a training step recomputes for its backward pass, beyond those that it needs.

    Args:
      architecture: sizes of the model.
      layout: layout of its experts.
      remat: a key of `decoder.REMAT_POLICIES`.
      batch: sequences of the step.
      length: tokens in a sequence.
    """
    arch, kv_size = architecture, architecture.num_kv_heads * architecture.head_dim
    sizes = {name: _multiply_adds(name, leaf) for name, leaf in expert_leaves(arch).items()}
    router = sum(size for name, size in sizes.items() if name.startswith(ROUTER))
    expert, routed = sum(sizes.values()) - router, layout.num_experts if _routes(layout) else 0
    flops = {
        "projections": 4 * arch.d_model * (arch.d_model + kv_size) + 2 * router * routed,
        "attention": 2 * arch.d_model * (length + 1),
        "experts": 2 * expert * layout.top_k,
    }
    return batch * length * arch.num_layers * float(sum(flops[part] for part in recomputed_parts(remat, layout)))


def recomputed_parts(remat: str, layout: Layout) -> set[str]:
    """The parts of a block that the backward pass recomputes: "projections" (with the router), "attention", "experts".

    Args:
      remat: a key of `decoder.REMAT_POLICIES`.
      layout: layout of the experts.
    """
    dispatched = layout.kind == "stacked" and layout.top_k < layout.num_experts  # otherwise they are plain matmuls
    return {
        "none": set(),
        "dots": set(),
        "feed_forward": {"projections"},
        "kernels": {"projections"} if dispatched else {"projections", "experts"},
        "full": {"projections", "attention", "experts"},
    }[remat]


def decode_step_flops(architecture: Architecture, layout: Layout, batch: int, keys: float) -> float:
    """FLOPs of decoding one token for each of `batch` sequences, each of which sees `keys` positions."""
    return batch * _token(architecture, layout, (), keys)


def decode_step_bytes(
    architecture: Architecture, layout: Layout, params: Mapping[str, jax.Array], batch: int, keys: float
) -> float:
    """Bytes that decoding one token for each of `batch` sequences must read: weights, and `keys` cached positions.

    Of the embedding and of a selector's tables each sequence reads one vector; of stacked experts those are read that
    its tokens choose, as many as independent choices would reach.
    """
    arch = architecture
    reached = 1 - (1 - layout.top_k / layout.num_experts) ** batch
    looked_up = not arch.tied_embeddings
    tables = {path for path in params if is_derived(path) or (looked_up and path == "embedding")}
    weights = sum(
        leaf.nbytes * (reached if "/experts/" in path else 1) for path, leaf in params.items() if path not in tables
    )
    cache = 2 * arch.num_layers * arch.num_kv_heads * arch.head_dim * params["embedding"].itemsize
    vectors = sum(params[path].nbytes / len(params[path]) for path in tables)
    return weights + batch * (keys * cache + vectors)


def _token(arch: Architecture, layout: Layout, trainable: Collection[str], keys: float) -> float:
    """FLOPs of one token."""
    total, x_needs = 0.0, "embedding" in trainable
    block_trainable = {path.removeprefix("blocks/") for path in trainable}
    for _ in range(arch.num_layers):
        flops, x_needs = _block(arch, layout, block_trainable, x_needs, keys)
        total += flops
    head = "embedding" if arch.tied_embeddings else "head"
    normed = x_needs or "final_norm/scale" in trainable
    return total + _matmul(arch.d_model * arch.vocab_size, normed, head in trainable)


def _block(
    arch: Architecture, layout: Layout, trainable: Collection[str], x_needs: bool, keys: float
) -> tuple[float, bool]:
    """FLOPs of one token in a block, and whether its output needs a gradient, given whether its input does."""
    width, kv_size = arch.d_model, arch.num_kv_heads * arch.head_dim

    def trains(*leaves: str) -> bool:
        return any(leaf in trainable for leaf in leaves)

    total = _matmul(width * width, x_needs, trains("attention/query"))
    total += _matmul(width * kv_size, x_needs, trains("attention/key"))
    total += _matmul(width * kv_size, x_needs, trains("attention/value"))
    query = x_needs or trains("attention/query", "attention/query_norm/scale")
    key = x_needs or trains("attention/key", "attention/key_norm/scale")
    value = x_needs or trains("attention/value")
    total += _matmul(width * keys, query, key)
    total += _matmul(width * keys, query or key, value)
    attended = query or key or value
    total += _matmul(width * width, attended, trains("attention/out"))
    x_needs = attended or trains("attention/out", "attention_norm/scale")

    mixed = x_needs
    for name in layout.sets:
        prefix, is_stacked = f"moe/{name}/", layout.kind == "stacked"
        needs: dict[str, bool] = {}  # whether the output of a leaf's matmul needs a gradient
        for leaf_name, leaf in expert_leaves(arch).items():
            if leaf_name.startswith(ROUTER) and not _routes(layout):
                continue
            count = (layout.num_experts if leaf_name.startswith(ROUTER) else layout.top_k) if is_stacked else 1
            left, right = x_needs or any(needs[i] for i in leaf.inputs), trains(prefix + leaf_name)
            total += count * _matmul(_multiply_adds(leaf_name, leaf), left, right)
            needs[leaf_name] = left or right
        mixed = mixed or any(needs.values())
    return total, mixed or trains("moe_norm/scale")


def _routes(layout: Layout) -> bool:
    """Whether router weights play a part: not for an expert alone, nor where a selector chooses."""
    return layout.num_experts > 1 and uses_router(layout.selection)


def _multiply_adds(name: str, leaf: Leaf) -> int:
    """Multiply-adds of a leaf's matmul for one token: of a router's vectors too, which are a matrix when stacked."""
    is_matmul = len(leaf.shape) >= (1 if name.startswith(ROUTER) else 2)
    return math.prod(leaf.shape) if is_matmul else 0


def _matmul(multiply_adds: float, left: bool, right: bool) -> float:
    """FLOPs of a matmul, forward and backward, given which operands need a gradient."""
    return 2 * multiply_adds * (1 + left + right)
