"""The scan over blocks. Where nothing below them is trained, its backward pass ends at the first block's leaves."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def scan_blocks(
    block: Callable[[Any, jax.Array, Any], tuple[jax.Array, Any]],
    leaves: Any,
    x: jax.Array,
    context: Any,
    length: int,
    unroll: int = 1,
    input_gradient: bool = True,
) -> tuple[jax.Array, Any]:
    """Applies a block once for each layer.

    Args:
      block: (leaves of a layer, x, context) -> (x, output).
      leaves: pytree of stacked leaves, [layers, ...].
      x: what enters the first layer; each layer's has its shape and dtype.
      context: pytree of what all layers are given. Without `input_gradient` it has no gradient.
      length: the number of layers.
      unroll: layers per iteration of the loop.
      input_gradient: whether the gradient of x is needed. Otherwise it is 0, and what leads to it alone is not
        computed: the backward pass of one layer, but for that of its leaves.

    Returns:
      (x after the last layer, outputs [layers, ...]).
    """
    if input_gradient:
        return jax.lax.scan(lambda x, layer: block(layer, x, context), x, leaves, length, unroll=unroll)
    ending, is_first = _ending(block), jnp.arange(length) == 0
    return jax.lax.scan(lambda x, layer: ending(*layer, x, context), x, (is_first, leaves), length, unroll=unroll)


def _ending(block: Callable) -> Callable:
    """The block as a function of whether it is the first, and of what it takes: the first gives x no gradient."""

    @jax.custom_vjp
    def run(is_first, leaves, x, context):
        return block(leaves, x, context)

    def forward(is_first, leaves, x, context):
        out, vjp = jax.vjp(lambda leaves, x: block(leaves, x, context), leaves, x)
        return out, (is_first, vjp)

    def backward(residuals, toward):
        is_first, vjp = residuals

        def end():
            d_leaves, d_x = vjp(toward)
            return d_leaves, jnp.zeros_like(d_x)  # what has led to d_x alone is dead code

        return None, *jax.lax.cond(is_first, end, lambda: vjp(toward)), None

    run.defvjp(forward, backward)
    return run
