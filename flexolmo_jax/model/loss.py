"""The losses of a batch: of the head's predictions, with the cross-entropy, and of the router.

The logits of a whole batch never exist at once: the loss is computed chunk by chunk along the sequence. The gradient is
taken in the forward pass, while a chunk's logits are at hand, so that nothing is recomputed and neither the logits nor
their gradient, [batch, length, vocab], are kept.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from flexolmo_jax.model.decoder import Decoder, Output


def chunk_length(platform: str) -> int:
    """Positions of a sequence whose logits exist at once on the devices of a platform (`sharding.platform_of`).

    Each chunk reads the head and, where the head is trained, reads and writes its gradient. Accelerators take long
    chunks, since their memory bandwidth is the limit. CPUs take short ones, whose logits stay in the caches.
    """
    return 128 if platform == "cpu" else 512


class HeadLoss(NamedTuple):
    """Sums over the tokens of the mask, float32: the minimised loss, and its terms before their weights."""

    loss: jax.Array
    cross_entropy: jax.Array
    z_loss: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def head_loss(
    hidden_BxSxD: jax.Array,
    head_DxV: jax.Array,
    targets_BxS: jax.Array,
    mask_BxS: jax.Array,
    z_weight: float | jax.Array,
    chunk: int,
) -> HeadLoss:
    """Cross-entropy, plus z-loss times its weight, of the logits hidden @ head.

    The cross-entropy is the negative log likelihood of the targets in nats. The z-loss is the squared log partition
    function (docs/method.md, "Settings of the published run"). Gradients flow through `loss` alone, to
    the hidden states and the head.

    Args:
      hidden_BxSxD: the head's input, in the dtype of the computation; logits are float32.
      head_DxV: the head, in the same dtype.
      targets_BxS: int32 token ids.
      mask_BxS: float32, 1 where a token counts.
      z_weight: weight of the z-loss.
      chunk: positions whose logits exist at once (`chunk_length`).
    """

    def add(sums, slices):
        hidden_BxWxD, targets_BxW, mask_BxW = slices
        losses, _ = _chunk_loss(hidden_BxWxD, targets_BxW, mask_BxW, head_DxV, z_weight)
        return jax.tree.map(jnp.add, sums, losses), None

    return jax.lax.scan(add, _zero_loss(), _split_chunks(chunk, hidden_BxSxD, targets_BxS, mask_BxS))[0]


def _forward(hidden_BxSxD, head_DxV, targets_BxS, mask_BxS, z_weight, chunk):
    """The losses, and the gradients of `loss`. The gradient of a frozen head is dead code, which XLA removes."""

    def add(total, slices):
        sums, d_head_DxV = total
        hidden_BxWxD, targets_BxW, mask_BxW = slices
        losses, softmax = _chunk_loss(hidden_BxWxD, targets_BxW, mask_BxW, head_DxV, z_weight)
        exponentials_BxWxV, sum_BxW, log_normalizer_BxW = softmax
        # d loss / d logits = mask * ((1 + 2 z_weight log_normalizer) softmax - one-hot target)
        factor_BxW = mask_BxW * (1 + 2 * z_weight * log_normalizer_BxW) / sum_BxW
        d_logits_BxWxV = exponentials_BxWxV * factor_BxW[..., None]
        is_target_BxWxV = targets_BxW[..., None] == jnp.arange(head_DxV.shape[1])
        d_logits_BxWxV -= jnp.where(is_target_BxWxV, mask_BxW[..., None], 0)
        d_logits_BxWxV = d_logits_BxWxV.astype(head_DxV.dtype)
        d_head_DxV += jnp.einsum("BWD,BWV->DV", hidden_BxWxD, d_logits_BxWxV, preferred_element_type=jnp.float32)
        d_hidden_BxWxD = jnp.einsum("BWV,DV->BWD", d_logits_BxWxV, head_DxV)
        return (jax.tree.map(jnp.add, sums, losses), d_head_DxV), d_hidden_BxWxD

    start = (_zero_loss(), jnp.zeros(head_DxV.shape, jnp.float32))
    (sums, d_head_DxV), d_hidden = jax.lax.scan(add, start, _split_chunks(chunk, hidden_BxSxD, targets_BxS, mask_BxS))
    return sums, (_join_chunks(d_hidden, hidden_BxSxD.shape), d_head_DxV.astype(head_DxV.dtype))


def _backward(chunk, gradients, cotangents):
    d_hidden_BxSxD, d_head_DxV = ((gradient * cotangents.loss).astype(gradient.dtype) for gradient in gradients)
    return d_hidden_BxSxD, d_head_DxV, None, None, None


head_loss.defvjp(_forward, _backward)


def _chunk_loss(hidden_BxWxD, targets_BxW, mask_BxW, head_DxV, z_weight):
    """(losses of a chunk, (exp(logits - max), their sum, log partition function)).

    The gradient needs the exponentials too. They are computed on their own, since XLA's fused reduction on CPUs takes
    four times as long.
    """
    logits_BxWxV = jnp.einsum("BWD,DV->BWV", hidden_BxWxD, head_DxV, preferred_element_type=jnp.float32)
    largest_BxW = jnp.max(logits_BxWxV, axis=-1)
    exponentials_BxWxV = jnp.exp(logits_BxWxV - largest_BxW[..., None])
    sum_BxW = jnp.sum(exponentials_BxWxV, axis=-1)
    log_normalizer_BxW = largest_BxW + jnp.log(sum_BxW)
    target_BxW = jnp.take_along_axis(logits_BxWxV, targets_BxW[..., None], axis=-1)[..., 0]
    cross_entropy = jnp.sum((log_normalizer_BxW - target_BxW) * mask_BxW)
    z_loss = jnp.sum(jnp.square(log_normalizer_BxW) * mask_BxW)
    losses = HeadLoss(cross_entropy + z_weight * z_loss, cross_entropy, z_loss)
    return losses, (exponentials_BxWxV, sum_BxW, log_normalizer_BxW)


def _zero_loss():
    return HeadLoss(*jnp.zeros(len(HeadLoss._fields), jnp.float32))


def _split_chunks(chunk, *arrays_BxS):
    """[batch, length, ...] -> [chunks, batch, chunk, ...]; the last chunk, and its mask, are padded with zeros."""

    def split(x):
        batch, length = x.shape[:2]
        width = min(chunk, length)
        x = jnp.pad(x, [(0, 0), (0, -length % width)] + [(0, 0)] * (x.ndim - 2))
        return x.reshape(batch, -1, width, *x.shape[2:]).swapaxes(0, 1)

    return tuple(map(split, arrays_BxS))


def _join_chunks(chunks, shape):
    """The inverse of `_split_chunks`: an array of that shape, without the padding."""
    batch, length, *rest = shape
    return chunks.swapaxes(0, 1).reshape(batch, -1, *rest)[:, :length]


def token_mask(batch: dict[str, jax.Array]) -> jax.Array:
    """float32 [batch, length]: 1 for tokens, 0 for padding."""
    return (batch["segment_ids"] > 0).astype(jnp.float32)


def prediction_loss(
    model: Decoder, params: dict[str, jax.Array], out: Output, batch: dict[str, jax.Array], z_weight: float
) -> HeadLoss:
    """Loss of a batch's targets, summed over its tokens."""
    chunk = chunk_length(model.compute.platform)
    return head_loss(out.hidden_BxSxD, model.head(params), batch["targets"], token_mask(batch), z_weight, chunk)


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


def routing_shares(router_weights_LxBxSxE: jax.Array, mask_BxS: jax.Array) -> jax.Array:
    """Routing weight of each expert, float32 [experts]: mean over layers, sum over the tokens of the mask."""
    return jnp.einsum("LBSE,BS->E", router_weights_LxBxSxE, mask_BxS) / router_weights_LxBxSxE.shape[0]


def routing_by_layer(router_weights_LxBxSxE: jax.Array, mask_BxS: jax.Array) -> dict[str, jax.Array]:
    """Sums over the tokens of the mask: `routing_LxE`, each expert's weight, and `router_entropy_L`, nats."""
    entropy_LxBxS = -jnp.sum(jax.scipy.special.xlogy(router_weights_LxBxSxE, router_weights_LxBxSxE), axis=-1)
    return {
        "routing_LxE": jnp.einsum("LBSE,BS->LE", router_weights_LxBxSxE, mask_BxS),
        "router_entropy_L": jnp.einsum("LBS,BS->L", entropy_LxBxS, mask_BxS),
    }


def make_loss_step(model: Decoder) -> Callable[..., dict[str, jax.Array]]:
    """Builds `(params, batch, expert_mask=None) -> {tokens, cross_entropy, routing_E}`, sums over the batch."""

    def loss_step(
        params: dict[str, jax.Array], batch: dict[str, jax.Array], expert_mask: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        out = model.apply_flat(params, batch["tokens"], batch["segment_ids"], batch["positions"], expert_mask)
        mask_BxS = token_mask(batch)
        return {
            "tokens": jnp.sum(mask_BxS),
            "cross_entropy": prediction_loss(model, params, out, batch, z_weight=0.0).cross_entropy,
            "routing_E": routing_shares(out.router_weights_LxBxSxE, mask_BxS),
        }

    return loss_step
