"""A router with other leaves and other features: the scaled cosine between a token's centred features and a center."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from flexolmo_jax.model.leaves import Leaf
from flexolmo_jax.model.routers import Router


class CosineRouter(Router):
    """The logit of an expert is exp(log_scale) cos(x - mean(x), center) + offset . x^2."""

    def leaves(self, architecture):
        """`center` and `offset` [d_model], and the scalar `log_scale`."""
        return {
            "center": Leaf((architecture.d_model,), (None,)),
            "offset": Leaf((architecture.d_model,), (None,), nn.initializers.zeros),
            "log_scale": Leaf((), (), nn.initializers.ones),
        }

    def logits(self, x_BxSxD, leaves):
        """See the class."""
        centred_BxSxD = x_BxSxD - x_BxSxD.mean(axis=-1, keepdims=True)
        cosine_BxSxE = jnp.einsum(
            "BSD,ED->BSE", _unit(centred_BxSxD), _unit(leaves["center"]), precision=jax.lax.Precision.HIGHEST
        )
        offset_BxSxE = jnp.einsum("BSD,ED->BSE", x_BxSxD**2, leaves["offset"], precision=jax.lax.Precision.HIGHEST)
        return jnp.exp(leaves["log_scale"]) * cosine_BxSxE + offset_BxSxE


def _unit(x):
    return x * jax.lax.rsqrt(jnp.sum(x**2, axis=-1, keepdims=True) + 1e-6)
