"""Floating-point operations of a step, counted from the sizes alone.

A matmul takes 2 for each multiply-add. Its backward pass takes as much again for each of its two operands that needs a
gradient: a trainable leaf does, and an activation that a trainable leaf lies below. Frozen weights need none, nor does
what lies below the lowest trainable leaf. So a step costs, over all matmuls m and tokens,

    sum of 2 m (1 + [left operand needs a gradient] + [right operand needs one])

with these multiply-adds m for a token of a block (D d_model, C = D / H a head, G key heads, F d_ff, S length):

    query, out     D D           scores Q K', and what they gather from V    D (S + 1) / 2 each
    key, value     D G C each    router                                      D for each row
    gate, up, down D F each, for the top-k of stacked experts, and for all of the other layouts

and D V for the head. (S + 1) / 2 is the number of positions that a token of a row sees, on average. What a program
computes beyond that is not counted: keys that causality masks, activations computed again for the backward pass, the
gradient of what enters the first block where a loop over blocks takes it along, experts beyond the top-k; nor are
norms, softmaxes and other work that is not a matmul.
"""

from collections.abc import Collection

from flexolmo_jax.model.architecture import ANCHOR, Architecture, Layout


def train_step_flops(
    architecture: Architecture, layout: Layout, trainable: Collection[str], batch: int, length: int
) -> float:
    """FLOPs of a training step.

    Args:
      architecture: sizes of the model.
      layout: how its experts are laid out.
      trainable: paths of the trainable leaves; without any, the result is that of a forward pass.
      batch: rows of the step.
      length: tokens in a row, each row a document.
    """
    return batch * length * _token(architecture, layout, trainable, keys=(length + 1) / 2)


def recomputed_flops(architecture: Architecture, layout: Layout, remat: str, batch: int, length: int) -> float:
    """FLOPs that a training step computes again for its backward pass, beyond those that it needs.

    Args:
      architecture: sizes of the model.
      layout: how its experts are laid out.
      remat: a key of `decoder.REMAT_POLICIES`.
      batch: rows of the step.
      length: tokens in a row.
    """
    arch, narrow = architecture, architecture.num_kv_heads * architecture.head_dim
    router = 2 * arch.d_model * layout.num_experts if layout != ANCHOR else 0
    flops = {
        "projections": 4 * arch.d_model * (arch.d_model + narrow) + router,
        "attention": 2 * arch.d_model * (length + 1),
        "experts": 6 * layout.top_k * arch.d_model * arch.d_ff,
    }
    return batch * length * arch.num_layers * float(sum(flops[part] for part in computed_again(remat, layout)))


def computed_again(remat: str, layout: Layout) -> set[str]:
    """What of a block the backward pass computes again: of "projections" (with the router), "attention" and "experts".

    Args:
      remat: a key of `decoder.REMAT_POLICIES`.
      layout: how the experts are laid out.
    """
    dispatched = layout.kind == "stacked" and layout.top_k < layout.num_experts  # else they are plain matmuls
    return {
        "none": set(),
        "dots": set(),
        "feed_forward": {"projections"},
        "kernels": {"projections"} if dispatched else {"projections", "experts"},
        "full": {"projections", "attention", "experts"},
    }[remat]


def decode_step_flops(architecture: Architecture, layout: Layout, rows: int, keys: float) -> float:
    """FLOPs of decoding one token for each of `rows` rows, each of which sees `keys` positions."""
    return rows * _token(architecture, layout, (), keys)


def _token(arch: Architecture, layout: Layout, trainable: Collection[str], keys: float) -> float:
    """FLOPs of one token."""
    total, x = 0.0, "embedding" in trainable
    for _ in range(arch.num_layers):
        flops, x = _block(arch, layout, {path.removeprefix("blocks/") for path in trainable}, x, keys)
        total += flops
    head = "embedding" if arch.tied_embeddings else "head"
    normed = x or "final_norm/scale" in trainable
    return total + _matmul(arch.d_model * arch.vocab_size, normed, head in trainable)


def _block(arch: Architecture, layout: Layout, trainable: Collection[str], x: bool, keys: float) -> tuple[float, bool]:
    """FLOPs of one token in a block, and whether what leaves it needs a gradient, as `x` says of what enters it."""
    width, narrow = arch.d_model, arch.num_kv_heads * arch.head_dim

    def trains(*leaves: str) -> bool:
        return any(leaf in trainable for leaf in leaves)

    total = _matmul(width * width, x, trains("attention/query"))
    total += _matmul(width * narrow, x, trains("attention/key"))
    total += _matmul(width * narrow, x, trains("attention/value"))
    query = x or trains("attention/query", "attention/query_norm/scale")
    key = x or trains("attention/key", "attention/key_norm/scale")
    value = x or trains("attention/value")
    total += _matmul(width * keys, query, key)
    total += _matmul(width * keys, query or key, value)
    gathered = query or key or value
    total += _matmul(width * width, gathered, trains("attention/out"))
    x = gathered or trains("attention/out", "attention_norm/scale")

    mixed = x
    for name in layout.sets:
        experts = layout.num_experts if layout.kind == "stacked" else 1
        computed = layout.top_k if layout.kind == "stacked" else 1
        gate, up, down = (trains(f"moe/{name}/{leaf}") for leaf in ("gate", "up", "down"))
        row, bias = (trains(f"moe/{name}/router/{leaf}") for leaf in ("weight", "bias"))
        if layout != ANCHOR:  # alone, its weight is 1 whatever the router says
            total += experts * _matmul(width, x, row)
            mixed = mixed or row or bias
        total += computed * _matmul(width * arch.d_ff, x, gate)
        total += computed * _matmul(width * arch.d_ff, x, up)
        total += computed * _matmul(arch.d_ff * width, x or gate or up, down)
        mixed = mixed or gate or up or down
    return total, mixed or trains("moe_norm/scale")


def _matmul(multiply_adds: float, left: bool, right: bool) -> float:
    """FLOPs of a matmul, forward and backward; `left` and `right` say which operands need a gradient."""
    return 2 * multiply_adds * (1 + left + right)
