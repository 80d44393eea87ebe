"""The scan over blocks against a plain loop."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexolmo_jax.model.decoder import scan_blocks

LAYERS, WIDTH = 4, 3
X, SHIFT = jnp.float32([[0.1, 0.2, 0.3], [-1, 0, 1]]), jnp.float32([0.5, 0, -0.5])


@pytest.fixture
def passed():
    """What the backward pass went through: (name, layer)."""
    return []


@pytest.fixture
def block(passed):
    """The function tanh(x @ frozen + x**2 @ kernel + shift), with a note of gradients of x and of `frozen`."""

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def noted(name, y, layer):
        return y

    def backward(name, layer, cotangent):
        def note(layer, cotangent):
            passed.append((name, int(layer)))
            return cotangent

        # Pure, so that it is not called where its result is not needed.
        return jax.pure_callback(note, cotangent, layer, cotangent), None

    noted.defvjp(lambda name, y, layer: (y, layer), backward)

    def block(leaves, x, shift):
        frozen = noted("frozen", leaves["frozen"], leaves["layer"])
        y = jnp.tanh(noted("x", x, leaves["layer"]) @ frozen + x**2 @ leaves["kernel"] + shift)
        return y, jnp.sum(y**3)

    return block


@pytest.fixture
def leaves():
    rng = np.random.default_rng(0)
    kernel, frozen = jnp.float32(rng.normal(0, 0.5, (2, LAYERS, WIDTH, WIDTH)))
    return {"kernel": kernel, "frozen": frozen, "layer": jnp.arange(LAYERS)}


def looped(block, leaves, x, shift):
    outputs = []
    for layer in range(LAYERS):
        x, output = block(jax.tree.map(lambda leaf: leaf[layer], leaves), x, shift)  # noqa: B023
        outputs.append(output)
    return x, jnp.stack(outputs)


@pytest.mark.parametrize("unroll", [1, 2])
@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("input_gradient", [True, False])
def test_it_is_a_loop_whose_backward_pass_may_end_at_the_first_blocks_leaves(
    block, leaves, passed, input_gradient, remat, unroll
):
    block = jax.checkpoint(block) if remat else block

    def run(apply, kernel, x):
        y, outputs = apply(block, {**leaves, "kernel": kernel}, x, SHIFT)
        return jnp.sum(y * jnp.arange(WIDTH)) + jnp.sum(outputs * jnp.arange(LAYERS)), (y, outputs)

    def both(apply):
        return jax.jit(jax.grad(lambda *inputs: run(apply, *inputs), (0, 1), has_aux=True))(leaves["kernel"], X)

    def scanned(*inputs):
        return scan_blocks(*inputs, LAYERS, unroll=unroll, input_gradient=input_gradient)

    (d_kernel, d_x), results = both(looped)
    jax.effects_barrier()
    passed.clear()
    (actual_d_kernel, actual_d_x), actual = both(scanned)
    jax.effects_barrier()
    for got, want in zip(actual, results, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6)
    np.testing.assert_allclose(actual_d_kernel, d_kernel, rtol=1e-5)
    assert np.abs(d_kernel).min(axis=(1, 2)).all()
    np.testing.assert_allclose(actual_d_x, d_x if input_gradient else np.zeros_like(d_x), rtol=1e-5)
    assert sorted(passed) == [("x", layer) for layer in range(0 if input_gradient else 1, LAYERS)]
