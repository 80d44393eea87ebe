"""Parameters with their logical axes, the norm every block uses, and the feed-forward of one expert."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

INIT_STDDEV = 0.02
FED = "feed_forward"  # name of the products in it, for rematerialisation: they take most of the time


def parameter(
    module: nn.Module,
    name: str,
    shape: Sequence[int],
    axes: Sequence[str | None],
    init: nn.initializers.Initializer | None = None,
) -> jax.Array:
    """Declares a float32 parameter: shape, logical axes and initializer in one place.

    The default initializer is a truncated normal of scale 0.02, cut at two of it and symmetric about 0.
    """
    init = init or nn.initializers.truncated_normal(INIT_STDDEV)
    return module.param(name, nn.with_logical_partitioning(init, tuple(axes)), tuple(shape), jnp.float32)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last `len(axes)` dimensions, computed and scaled in float32."""

    eps: float
    axes: tuple[str | None, ...] = ("embed",)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns an array of x's shape and dtype."""
        over = tuple(range(-len(self.axes), 0))
        scale = parameter(self, "scale", x.shape[-len(self.axes) :], self.axes, nn.initializers.ones)
        x_float32 = x.astype(jnp.float32)
        variance = jnp.mean(jnp.square(x_float32), axis=over, keepdims=True)
        return (x_float32 * jax.lax.rsqrt(variance + self.eps) * scale.astype(jnp.float32)).astype(x.dtype)


def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """The hidden units of a feed-forward, silu(gate) * up (arXiv 2002.05202, section 2), of products of one shape."""
    return jax.nn.silu(gate) * up


def feed_forward(x: jax.Array, gate_DxF: jax.Array, up_DxF: jax.Array, down_FxD: jax.Array) -> jax.Array:
    """down(swiglu(gate(x), up(x))), over the last dimension of x."""
    gate, up = (checkpoint_name(x @ kernel, FED) for kernel in (gate_DxF, up_DxF))
    return checkpoint_name(swiglu(gate, up) @ down_FxD, FED)
