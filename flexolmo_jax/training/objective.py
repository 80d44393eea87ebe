"""The loss: cross-entropy and its regularisers, as sums over tokens so that parts of a batch add up."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from flexolmo_jax.model.decoder import Decoder, Output
from flexolmo_jax.model.loss import prediction_loss, routing_shares


class LossWeights(NamedTuple):
    """Weights of the regularisers, per token (docs/method.md, "Settings of the published run")."""

    z_loss: float
    router_z_loss: float
    load_balancing: float


def router_z_loss(logits_LxBxSxE: jax.Array, mask_BxS: jax.Array) -> jax.Array:
    """Squared log partition function of the router's logits: mean over layers, sum over the tokens of the mask."""
    return jnp.sum(jnp.square(jax.nn.logsumexp(logits_LxBxSxE, axis=-1)) * mask_BxS) / logits_LxBxSxE.shape[0]


def load_balancing(router_weights_LxBxSxE: jax.Array, mask_BxS: jax.Array, top_k: int) -> jax.Array:
    """E * sum over experts of (share of tokens routed to it, counting top-k) * (its mean weight).

    Switch Transformer (arXiv 2101.03961), equation 4, over the tokens of all layers together; it is
    top_k when routing is uniform.
    """
    num_experts = router_weights_LxBxSxE.shape[-1]
    _, chosen = jax.lax.top_k(router_weights_LxBxSxE, top_k)
    routed = jax.nn.one_hot(chosen, num_experts).sum(axis=-2)
    mask = jnp.broadcast_to(mask_BxS, router_weights_LxBxSxE.shape[:-1])[..., None]
    count = jnp.maximum(jnp.sum(mask), 1)
    share_E, weight_E = (jnp.sum(y * mask, axis=(0, 1, 2)) / count for y in (routed, router_weights_LxBxSxE))
    return num_experts * jnp.sum(share_E * weight_E)


def objective(
    model: Decoder, params: dict[str, jax.Array], batch: dict[str, jax.Array], weights: LossWeights
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The training loss of a batch, summed over its tokens.

    Args:
      model: the decoder.
      params: flat dict of all leaves.
      batch: int32 [batch, length] arrays `tokens`, `targets`, `segment_ids` (0 is padding), `positions`.
      weights: weights of the regularisers.

    Returns:
      (loss, sums): `sums` holds `tokens`, `cross_entropy` (nats) and the regularisers before their
      weights, each a sum over tokens, and `routing_E`, the routing weight each expert got.
    """
    out: Output = model.apply_flat(params, batch["tokens"], batch["segment_ids"], batch["positions"])
    head, mask_BxS = prediction_loss(model, params, out, batch, weights.z_loss)
    tokens = jnp.sum(mask_BxS)
    router = {
        "router_z_loss": router_z_loss(out.router_logits_LxBxSxE, mask_BxS),
        "load_balancing": load_balancing(out.router_weights_LxBxSxE, mask_BxS, model.layout.top_k) * tokens,
    }
    loss = head.loss + sum(getattr(weights, name) * value for name, value in router.items())
    sums = {"tokens": tokens, "cross_entropy": head.cross_entropy, "z_loss": head.z_loss, **router}
    return loss, {**sums, "routing_E": routing_shares(out.router_weights_LxBxSxE, mask_BxS)}
