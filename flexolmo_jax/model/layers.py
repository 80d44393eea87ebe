"""The norm that every block uses, and the name of what the feed-forward keeps for its backward pass."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from flexolmo_jax.model.leaves import parameter

# Name of the outputs of the feed-forward's matmuls, for rematerialization: they take most of the time.
MLP_RESIDUALS = "mlp_residuals"


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
