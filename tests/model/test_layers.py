"""The norm and the initializer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict

from flexolmo_jax.model.layers import RMSNorm
from flexolmo_jax.model.leaves import INIT_STDDEV
from flexolmo_jax.model.moe import ExpertParameters
from flexolmo_jax.model.routers import ROUTER_STDDEV
from tests.support.tiny import ARCHITECTURE, COMPILE_FAST


@pytest.mark.parametrize("axes", [("embed",), ("heads", None)])
def test_norm_divides_by_the_root_mean_square_of_its_axes(axes):
    rng = np.random.default_rng(0)
    x, scale = rng.normal(size=(3, 5, 4, 6)), rng.normal(size=(4, 6)[-len(axes) :])
    over = tuple(range(-len(axes), 0))
    expected = x / np.sqrt(np.mean(x**2, axis=over, keepdims=True) + 0.5) * scale
    actual = RMSNorm(0.5, axes).apply({"params": {"scale": jnp.float32(scale)}}, jnp.float32(x))
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_norm_of_bfloat16_is_computed_in_float32():
    """One rounding at the end, and none of the mean or of the scaling."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(8, 512)), jnp.bfloat16)
    scale = jnp.float32(rng.normal(size=512))
    exact = np.float64(x) / np.sqrt(np.mean(np.float64(x) ** 2, axis=-1, keepdims=True) + 1e-6) * np.float64(scale)
    actual = RMSNorm(1e-6).apply({"params": {"scale": scale}}, x)
    assert actual.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float64(actual), exact, rtol=2**-8)


def test_fresh_leaves_are_normal_and_truncated_at_two_deviations_on_both_sides():
    module = ExpertParameters(ARCHITECTURE, (8,))
    leaves = jax.jit(
        lambda key: flatten_dict(nn.unbox(module.init(key)["params"]), sep="/"), compiler_options=COMPILE_FAST
    )(jax.random.key(0))
    assert not leaves.pop("router/bias").any()
    for name, leaf in leaves.items():
        stddev = ROUTER_STDDEV if name == "router/weight" else INIT_STDDEV
        leaf = np.asarray(leaf) / stddev
        assert abs(leaf.mean()) < 4 / np.sqrt(leaf.size), name
        # What is left of the deviation of a normal distribution cut at two of them.
        assert leaf.std() == pytest.approx(0.8796, rel=3 / np.sqrt(leaf.size)), name
        assert np.abs(leaf).max() <= 2.001, name
