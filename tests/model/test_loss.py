"""The head's loss in chunks against that of all logits at once."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flexolmo_jax.model.loss import head_loss

BATCH, LENGTH, D_MODEL, VOCAB = 2, 7, 6, 50
Z_WEIGHT, CHUNK = 0.3, 3


@pytest.fixture(scope="module")
def inputs():
    """(hidden, head, targets, mask); the second sequence ends in padding."""
    rng = np.random.default_rng(0)
    hidden, head = rng.normal(size=(BATCH, LENGTH, D_MODEL)), rng.normal(size=(D_MODEL, VOCAB))
    targets = rng.integers(0, VOCAB, (BATCH, LENGTH))
    mask = np.arange(LENGTH) < np.array([[LENGTH], [4]])
    return jnp.float32(hidden), jnp.float32(head), jnp.int32(targets), jnp.float32(mask)


def at_once(hidden, head, targets, mask):
    logits = hidden @ head
    cross_entropy = jnp.sum(optax.softmax_cross_entropy_with_integer_labels(logits, targets) * mask)
    z_loss = jnp.sum(jax.nn.logsumexp(logits, axis=-1) ** 2 * mask)
    return cross_entropy + Z_WEIGHT * z_loss, cross_entropy, z_loss


@pytest.mark.parametrize("chunk", [1, 3, 7, 128])
def test_losses_and_gradients_are_those_of_all_logits_at_once(inputs, chunk):
    def loss(function, scale):
        return lambda hidden, head: scale * function(hidden, head, *inputs[2:])[0]

    expected = jax.jit(lambda *args: at_once(*args))(*inputs)
    actual = jax.jit(lambda *args: head_loss(*args, Z_WEIGHT, chunk))(*inputs)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)
    expected = jax.jit(jax.grad(loss(at_once, 2.0), argnums=(0, 1)))(*inputs[:2])
    actual = jax.jit(jax.grad(loss(lambda *a: head_loss(*a, Z_WEIGHT, chunk), 2.0), argnums=(0, 1)))(*inputs[:2])
    for got, want in zip(actual, expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_even_logits_cost_the_logarithm_of_the_vocabulary(inputs):
    hidden, head, targets, mask = inputs
    sums = head_loss(hidden, jnp.zeros_like(head), targets, mask, 0.0, CHUNK)
    assert float(sums.loss) == pytest.approx(float(mask.sum()) * np.log(VOCAB), rel=1e-6)


def test_what_padding_holds_changes_nothing(inputs):
    hidden, head, targets, mask = inputs
    gradient = jax.grad(lambda hidden, targets: head_loss(hidden, head, targets, mask, Z_WEIGHT, CHUNK).loss)
    other = jnp.where(mask[..., None] > 0, hidden, 9.0), jnp.where(mask > 0, targets, 0)
    np.testing.assert_array_equal(gradient(*other), gradient(hidden, targets))
    assert not np.asarray(gradient(*other))[mask == 0].any()


def test_a_frozen_head_has_no_gradient_computed(inputs):
    """Matmuls in the program: logits, the gradient of the hidden states, and that of the head only if asked for."""
    loss = lambda hidden, head: head_loss(hidden, head, *inputs[2:], Z_WEIGHT, CHUNK).loss  # noqa: E731

    def matmuls(argnums):
        return jax.jit(jax.grad(loss, argnums)).lower(*inputs[:2]).as_text().count("stablehlo.dot_general")

    assert (matmuls(0), matmuls((0, 1))) == (2, 3)


def test_logits_of_all_tokens_never_exist():
    """Bytes of temporary memory, for a trained head: far below one array of all logits."""
    batch, length, d_model, vocab, chunk = 2, 4096, 8, 4096, 128
    shapes = [(batch, length, d_model), (d_model, vocab)]
    leaves = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    integers_and_mask = [jax.ShapeDtypeStruct((batch, length), dtype) for dtype in (jnp.int32, jnp.float32)]
    gradient = jax.jit(jax.grad(lambda *args: head_loss(*args, Z_WEIGHT, chunk).loss, argnums=(0, 1)))
    memory = gradient.lower(*leaves, *integers_and_mask).compile().memory_analysis()
    assert memory.temp_size_in_bytes < batch * length * vocab * 4 / 8


def test_bfloat16_gives_float32_losses_and_bfloat16_gradients(inputs):
    hidden, head = (y.astype(jnp.bfloat16) for y in inputs[:2])
    loss = lambda hidden, head: head_loss(hidden, head, *inputs[2:], Z_WEIGHT, CHUNK).loss  # noqa: E731
    value, gradients = jax.value_and_grad(loss, argnums=(0, 1))(hidden, head)
    assert value.dtype == jnp.float32
    assert [g.dtype for g in gradients] == [jnp.bfloat16, jnp.bfloat16]
    np.testing.assert_allclose(value, at_once(*inputs)[0], rtol=0.02)
