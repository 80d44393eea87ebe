"""The head and its loss in one, piece of the length after piece: the logits of all tokens never exist at once.

The gradient is taken in the forward pass, while a piece's logits are at hand: nothing is computed twice, and neither
logits nor their gradient, [batch, length, vocab], are kept.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp


def choose_piece(platform: str) -> int:
    """Positions of a row whose logits exist at once, on the devices of a platform (`sharding.platform_of`).

    Each piece reads the head and, where it is trained, reads and writes its gradient: long ones for accelerators, whose
    memory binds there. On a CPU short ones are faster, as their logits stay near its caches.
    """
    return 128 if platform == "cpu" else 512


class HeadLoss(NamedTuple):
    """Sums over the tokens of the mask, float32: what is minimised, and its terms before their weights."""

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
    piece: int,
) -> HeadLoss:
    """Cross-entropy, plus z-loss times its weight, of the logits hidden @ head.

    The cross-entropy is the negative log likelihood of the targets in nats; the z-loss is the squared log partition
    function (docs/method.md, "Settings of the published run"). Gradients flow through `loss` alone, to
    the hidden states and the head.

    Args:
      hidden_BxSxD: the head's input, in the dtype of the computation; logits are float32.
      head_DxV: the head, in the same dtype.
      targets_BxS: int32 token ids.
      mask_BxS: float32, 1 where a token counts.
      z_weight: weight of the z-loss.
      piece: positions of a row whose logits exist at once, as `choose_piece` says.
    """

    def add(sums, slices):
        return jax.tree.map(jnp.add, sums, _losses(*slices, head_DxV, z_weight)[0]), None

    return jax.lax.scan(add, _no_loss(), _pieces(piece, hidden_BxSxD, targets_BxS, mask_BxS))[0]


def _forward(hidden_BxSxD, head_DxV, targets_BxS, mask_BxS, z_weight, piece):
    """The losses, and the gradients of `loss`; that of a frozen head is dead code, which compiling removes."""

    def add(total, slices):
        sums, d_head_DxV = total
        hidden_BxPxD, targets_BxP, mask_BxP = slices
        losses, (exponentials_BxPxV, sum_BxP, log_normalizer_BxP) = _losses(*slices, head_DxV, z_weight)
        # d loss / d logits = mask * ((1 + 2 z_weight log_normalizer) softmax - one-hot target)
        factor_BxP = mask_BxP * (1 + 2 * z_weight * log_normalizer_BxP) / sum_BxP
        d_logits_BxPxV = exponentials_BxPxV * factor_BxP[..., None]
        is_target_BxPxV = targets_BxP[..., None] == jnp.arange(head_DxV.shape[1])
        d_logits_BxPxV -= jnp.where(is_target_BxPxV, mask_BxP[..., None], 0)
        d_logits_BxPxV = d_logits_BxPxV.astype(head_DxV.dtype)
        d_head_DxV += jnp.einsum("BPD,BPV->DV", hidden_BxPxD, d_logits_BxPxV, preferred_element_type=jnp.float32)
        d_hidden_BxPxD = jnp.einsum("BPV,DV->BPD", d_logits_BxPxV, head_DxV)
        return (jax.tree.map(jnp.add, sums, losses), d_head_DxV), d_hidden_BxPxD

    start = (_no_loss(), jnp.zeros(head_DxV.shape, jnp.float32))
    (sums, d_head_DxV), d_hidden = jax.lax.scan(add, start, _pieces(piece, hidden_BxSxD, targets_BxS, mask_BxS))
    return sums, (_joined(d_hidden, hidden_BxSxD.shape), d_head_DxV.astype(head_DxV.dtype))


def _backward(piece, gradients, d_sums):
    d_hidden_BxSxD, d_head_DxV = ((gradient * d_sums.loss).astype(gradient.dtype) for gradient in gradients)
    return d_hidden_BxSxD, d_head_DxV, None, None, None


head_loss.defvjp(_forward, _backward)


def _losses(hidden_BxPxD, targets_BxP, mask_BxP, head_DxV, z_weight):
    """(the losses of a piece, (exponentials of its logits less the largest, their sum, the log partition function)).

    The gradient takes the exponentials too, so that they are computed for themselves: XLA's library of reductions for
    CPUs would take four times as long for them.
    """
    logits_BxPxV = jnp.einsum("BPD,DV->BPV", hidden_BxPxD, head_DxV, preferred_element_type=jnp.float32)
    largest_BxP = jnp.max(logits_BxPxV, axis=-1)
    exponentials_BxPxV = jnp.exp(logits_BxPxV - largest_BxP[..., None])
    sum_BxP = jnp.sum(exponentials_BxPxV, axis=-1)
    log_normalizer_BxP = largest_BxP + jnp.log(sum_BxP)
    target_BxP = jnp.take_along_axis(logits_BxPxV, targets_BxP[..., None], axis=-1)[..., 0]
    cross_entropy = jnp.sum((log_normalizer_BxP - target_BxP) * mask_BxP)
    z_loss = jnp.sum(jnp.square(log_normalizer_BxP) * mask_BxP)
    losses = HeadLoss(cross_entropy + z_weight * z_loss, cross_entropy, z_loss)
    return losses, (exponentials_BxPxV, sum_BxP, log_normalizer_BxP)


def _no_loss():
    return HeadLoss(*jnp.zeros(len(HeadLoss._fields), jnp.float32))


def _pieces(piece, *arrays_BxS):
    """[batch, length, ...] -> [pieces, batch, piece, ...]; the last is filled up with zeros, so is its mask."""

    def cut(x):
        batch, length = x.shape[:2]
        width = min(piece, length)
        x = jnp.pad(x, [(0, 0), (0, -length % width)] + [(0, 0)] * (x.ndim - 2))
        return x.reshape(batch, -1, width, *x.shape[2:]).swapaxes(0, 1)

    return tuple(map(cut, arrays_BxS))


def _joined(pieces, shape):
    """Pieces as an array of that shape again."""
    batch, length, *rest = shape
    return pieces.swapaxes(0, 1).reshape(batch, -1, *rest)[:, :length]
