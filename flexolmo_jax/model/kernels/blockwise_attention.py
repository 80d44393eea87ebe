"""Causal attention in blocks of queries, for CPUs: what causality masks is skipped, and few scores exist at a time.

The algorithm is FlashAttention-2's (arXiv 2307.08691, section 3), in static blocks: a block of queries meets all keys
up to its end in one matmul. The backward pass computes scores anew from the logarithm of their normaliser.
Inside, heads stand before positions, and the G queries of one kv head are rows of one matmul.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

BLOCK_LENGTH = 128
MAX_BLOCKS = 8
# Names of what the backward pass needs, for rematerialisation: what attention gathers, and its normaliser.
ATTENDED, LOG_NORMALISER = "attended", "attention_log_normaliser"


@jax.custom_vjp
def blockwise(query_BxSxNxC, key_BxSxHxC, value_BxSxHxC, segment_ids_BxS):
    """Attention as `causal_attention` describes it, row after row; the length need not divide into blocks."""
    return _forward(query_BxSxNxC, key_BxSxHxC, value_BxSxHxC, segment_ids_BxS)[0]


def _forward(*inputs):
    out_BxSxNxC, log_normaliser_BxHxGxSx1 = jax.lax.map(lambda row: _attend(*row), inputs)
    out_BxSxNxC = checkpoint_name(out_BxSxNxC, ATTENDED)
    log_normaliser_BxHxGxSx1 = checkpoint_name(log_normaliser_BxHxGxSx1, LOG_NORMALISER)
    return out_BxSxNxC, (*inputs, out_BxSxNxC, log_normaliser_BxHxGxSx1)


def _backward(residuals, d_out_BxSxNxC):
    return *jax.lax.map(lambda row: _attend_backward(*row), (*residuals, d_out_BxSxNxC)), None


blockwise.defvjp(_forward, _backward)


def _attend(query_SxNxC, key_SxHxC, value_SxHxC, segment_ids_S):
    """A row's attention, and the logarithms of its normalisers, float32 [kv heads, group, length, 1]."""
    query_HxGxSxC, key_HxSxC, value_HxSxC = _heads_first(query_SxNxC, key_SxHxC, value_SxHxC)
    out, log_normaliser = [], []
    for rows, visible_RxT in _blocks(query_HxGxSxC, segment_ids_S):
        key_HxTxC, value_HxTxC = key_HxSxC[:, : rows.stop], value_HxSxC[:, : rows.stop]
        scores_HxRxT = _matmul("HRC,HTC->HRT", _rows(query_HxGxSxC, rows), key_HxTxC)
        scores_HxRxT = jnp.where(visible_RxT, scores_HxRxT, jnp.finfo(jnp.float32).min)
        highest_HxRx1 = jnp.max(scores_HxRxT, axis=-1, keepdims=True)
        weights_HxRxT = jnp.exp(scores_HxRxT - highest_HxRx1)
        normaliser_HxRx1 = jnp.sum(weights_HxRxT, axis=-1, keepdims=True)
        out_HxRxC = _matmul("HRT,HTC->HRC", weights_HxRxT.astype(value_HxTxC.dtype), value_HxTxC)
        out.append(_grouped(out_HxRxC / normaliser_HxRx1, rows))
        log_normaliser.append(_grouped(highest_HxRx1 + jnp.log(normaliser_HxRx1), rows))
    out_SxNxC = _heads_last(jnp.concatenate(out, axis=2)).astype(query_SxNxC.dtype)
    return out_SxNxC, jnp.concatenate(log_normaliser, axis=2)


def _attend_backward(
    query_SxNxC, key_SxHxC, value_SxHxC, segment_ids_S, out_SxNxC, log_normaliser_HxGxSx1, d_out_SxNxC
):
    """The gradients of a row's queries, keys and values."""
    query_HxGxSxC, key_HxSxC, value_HxSxC = _heads_first(query_SxNxC, key_SxHxC, value_SxHxC)
    d_out_HxGxSxC, _, _ = _heads_first(d_out_SxNxC, key_SxHxC, value_SxHxC, scale=1)
    # Summed over the head's size, it is what the softmax's gradient sums over the keys.
    shared_SxN = jnp.sum(out_SxNxC.astype(jnp.float32) * d_out_SxNxC.astype(jnp.float32), axis=-1)
    shared_HxGxSx1 = shared_SxN.T.reshape(log_normaliser_HxGxSx1.shape)
    # Scores stand transposed: they are the left side of two matmuls, those of keys and values, and of none transposed.
    length = key_HxSxC.shape[1]
    d_query, d_key_HxSxC, d_value_HxSxC = [], 0.0, 0.0
    for rows, visible_RxT in _blocks(query_HxGxSxC, segment_ids_S):
        key_HxTxC, value_HxTxC = key_HxSxC[:, : rows.stop], value_HxSxC[:, : rows.stop]
        query_HxRxC, d_out_HxRxC = _rows(query_HxGxSxC, rows), _rows(d_out_HxGxSxC, rows)
        log_normaliser_Hx1xR = _rows(log_normaliser_HxGxSx1, rows).swapaxes(1, 2)
        shared_Hx1xR = _rows(shared_HxGxSx1, rows).swapaxes(1, 2)
        scores_HxTxR = _matmul("HTC,HRC->HTR", key_HxTxC, query_HxRxC)
        d_weights_HxTxR = _matmul("HTC,HRC->HTR", value_HxTxC, d_out_HxRxC)
        weights_HxTxR = jnp.where(visible_RxT.T, jnp.exp(scores_HxTxR - log_normaliser_Hx1xR), 0)
        d_scores_HxTxR = weights_HxTxR * (d_weights_HxTxR - shared_Hx1xR)
        weights_HxTxR, d_scores_HxTxR = (y.astype(value_HxTxC.dtype) for y in (weights_HxTxR, d_scores_HxTxR))
        d_query.append(_grouped(_matmul("HTC,HTR->HCR", key_HxTxC, d_scores_HxTxR).swapaxes(1, 2), rows))
        later = ((0, 0), (0, length - rows.stop), (0, 0))
        d_key_HxSxC += jnp.pad(_matmul("HTR,HRC->HTC", d_scores_HxTxR, query_HxRxC), later)
        d_value_HxSxC += jnp.pad(_matmul("HTR,HRC->HTC", weights_HxTxR, d_out_HxRxC), later)
    d_query_SxNxC = query_SxNxC.shape[-1] ** -0.5 * _heads_last(jnp.concatenate(d_query, axis=2))
    d_inputs = (d_query_SxNxC, d_key_HxSxC.swapaxes(0, 1), d_value_HxSxC.swapaxes(0, 1))
    return tuple(y.astype(query_SxNxC.dtype) for y in d_inputs)


def _blocks(query_HxGxSxC, segment_ids_S):
    """Yields (the queries of a block as a slice, bool [group * queries, keys up to the block's end])."""
    group, length = query_HxGxSxC.shape[1:3]
    step = max(BLOCK_LENGTH, -(-length // MAX_BLOCKS))
    for start in range(0, length, step):
        end = min(start + step, length)
        visible_QxT = segment_ids_S[start:end, None] == segment_ids_S[:end]
        visible_QxT &= jnp.arange(start, end)[:, None] >= jnp.arange(end)
        yield slice(start, end), jnp.tile(visible_QxT, (group, 1))


def _heads_first(query_SxNxC, key_SxHxC, value_SxHxC, scale=None):
    """Queries times their scale, by default the root of the head's size, as [kv heads, group, length, size]."""
    length, _, size = query_SxNxC.shape
    query_SxHxGxC = query_SxNxC.reshape(length, key_SxHxC.shape[1], -1, size) * (scale or size**-0.5)
    return query_SxHxGxC.transpose(1, 2, 0, 3), key_SxHxC.swapaxes(0, 1), value_SxHxC.swapaxes(0, 1)


def _heads_last(out_HxGxSxC):
    _, _, length, size = out_HxGxSxC.shape
    return out_HxGxSxC.transpose(2, 0, 1, 3).reshape(length, -1, size)


def _rows(x_HxGxSxC, rows):
    """Some positions of an array, those of a group one after another: [kv heads, group * positions, size]."""
    heads, _, _, size = x_HxGxSxC.shape
    return x_HxGxSxC[:, :, rows].reshape(heads, -1, size)


def _grouped(x_HxRxC, rows):
    heads, _, size = x_HxRxC.shape
    return x_HxRxC.reshape(heads, -1, rows.stop - rows.start, size)


def _matmul(axes, a, b):
    return jnp.einsum(axes, a, b, preferred_element_type=jnp.float32)
