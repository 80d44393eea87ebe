"""Grouped matmul and its gradients against one matmul for each group."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexolmo_jax import sharding
from flexolmo_jax.model.kernels import grouped_matmul
from tests.support.pallas_interpreter import hopper_interpreted, hopper_stand_ins, interpreted
from tests.support.tiny import COMPILE_FAST

ROUTED, D, F = 150, 20, 140
HERE = ("ragged", "blocks", "megablox", "mosaic")  # those that run without an accelerator; the last is blocks then
ON_HOPPER = sharding.platform_of(jax.devices()[0]) == "hopper"
GROUP_SIZES = {
    "even": (50, 50, 50),
    "uneven": (7, 0, 143),
    "one": (0, 150, 0),
    "tokens of no group": (3, 64, 10),
    "none": (0, 0, 0),
}


def random_arguments(dtype, num_routed=ROUTED, d=D, f=F):
    rng = np.random.default_rng(0)
    shapes = ((num_routed, d), (3, d, f), (num_routed, f))
    return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)


def group_by_group(x, kernels, cotangent, group_sizes):
    """(output, gradient of x, gradient of kernels), float64; zeros where a token has no group."""
    x, kernels, cotangent = (np.float64(a) for a in (x, kernels, cotangent))
    y, d_x, d_kernels = np.zeros_like(cotangent), np.zeros_like(x), np.zeros_like(kernels)
    start = 0
    for e, size in enumerate(group_sizes):
        group = slice(start, start + size)
        y[group] = x[group] @ kernels[e]
        d_x[group] = cotangent[group] @ kernels[e].T
        d_kernels[e] = x[group].T @ cotangent[group]
        start += size
    return y, d_x, d_kernels


def computed(implementation, x, kernels, cotangent, group_sizes):
    """The same by `grouped_matmul`."""
    group_sizes = jnp.asarray(group_sizes, jnp.int32)

    def with_gradients(x, kernels, cotangent):
        y, pull = jax.vjp(lambda x, w: grouped_matmul.grouped_matmul(x, w, group_sizes, implementation), x, kernels)
        return y, *pull(cotangent)

    with interpreted() if implementation == "megablox" else contextlib.nullcontext():
        return jax.jit(with_gradients, compiler_options=COMPILE_FAST)(x, kernels, cotangent)


def set_block_tokens(monkeypatch, size):
    monkeypatch.setattr(grouped_matmul, "BLOCK_STEP", size)
    monkeypatch.setattr(grouped_matmul, "COPY_TOKENS", 0)


@pytest.mark.parametrize("implementation", HERE)
@pytest.mark.parametrize("sizes", GROUP_SIZES)
def test_each_token_is_multiplied_by_the_matrix_of_its_group(monkeypatch, sizes, implementation):
    set_block_tokens(monkeypatch, 16)
    arguments = random_arguments(jnp.float32)
    actual = computed(implementation, *arguments, GROUP_SIZES[sizes])
    expected = group_by_group(*arguments, GROUP_SIZES[sizes])
    of_a_group = slice(sum(GROUP_SIZES[sizes]))
    for got, exact in zip(actual[:2], expected[:2], strict=True):
        np.testing.assert_allclose(got[of_a_group], exact[of_a_group], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(actual[2], expected[2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", HERE)
def test_bfloat16_stays_bfloat16_and_is_summed_in_float32(implementation):
    arguments = random_arguments(jnp.bfloat16)
    actual = computed(implementation, *arguments, GROUP_SIZES["uneven"])
    expected = group_by_group(*arguments, GROUP_SIZES["uneven"])
    for got, exact in zip(actual, expected, strict=True):
        assert got.dtype == jnp.bfloat16
        # Half a unit in the last of 8 binary places: only the result is rounded.
        assert np.all(np.abs(np.float64(got) - exact) <= 2**-8 * np.abs(exact) + 1e-3)


@pytest.mark.parametrize(
    "kernels_for_hopper",
    [
        hopper_stand_ins,
        pytest.param(
            contextlib.nullcontext if ON_HOPPER else hopper_interpreted,
            marks=pytest.mark.skipif(
                not ON_HOPPER and jax.__version_info__ < (0, 11), reason="needs a Hopper GPU, or jax 0.11 to interpret"
            ),
        ),
    ],
)
@pytest.mark.parametrize("sizes", [(100, 0, 200), (128, 128, 128), (0, 1, 383), (0, 0, 0)])
def test_kernels_for_hopper_multiply_by_group(sizes, kernels_for_hopper):
    x, kernels, cotangent = random_arguments(jnp.bfloat16, 3 * 256 + 40, 128, 256)
    assert grouped_matmul.mosaic_fits(len(x), len(x), kernels.shape, x.dtype)
    with kernels_for_hopper():
        actual = computed("mosaic", x, kernels, cotangent, sizes)
    for got, expected in zip(actual, group_by_group(x, kernels, cotangent, sizes), strict=True):
        of_a_group = slice(sum(sizes) if len(got) == len(x) else None)
        assert got.dtype == jnp.bfloat16
        assert np.all(np.abs(np.float64(got) - expected)[of_a_group] <= 2**-8 * np.abs(expected[of_a_group]) + 1e-3)


@pytest.mark.parametrize(
    ("num_routed", "expected_routed", "kernels", "dtype", "fits"),
    [
        (65_536, 65_536, (4, 2048, 8192), "bfloat16", True),
        (65_536, 65_536, (4, 2048, 8192), "float32", False),
        (65_536, 65_536, (4, 2048, 8200), "bfloat16", False),  # not in tiles
        (65_536, 32_768, (1, 2048, 8192), "bfloat16", False),  # half of them padding
        (1024, 1024, (64, 2048, 8192), "bfloat16", False),  # each expert's in a tile of its own
    ],
)
def test_kernels_for_hopper_are_taken_where_they_are_faster(num_routed, expected_routed, kernels, dtype, fits):
    assert grouped_matmul.mosaic_fits(num_routed, expected_routed, kernels, dtype) == fits


@pytest.mark.parametrize("size", [1, 7, 150, 1024])
def test_blocks_of_any_size_give_the_same(monkeypatch, size):
    set_block_tokens(monkeypatch, size)
    arguments = random_arguments(jnp.float32)
    actual = computed("blocks", *arguments, GROUP_SIZES["uneven"])
    for got, exact in zip(actual, group_by_group(*arguments, GROUP_SIZES["uneven"]), strict=True):
        np.testing.assert_allclose(got, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mean", [8, 64, 500, 2000, 16_000])
@pytest.mark.parametrize("num_groups", [4, 64])
def test_blocks_of_other_sizes_cost_little_less(mean, num_groups):
    """Of tokens that are divided about evenly: half of the groups have within a quarter of the mean."""
    rng = np.random.default_rng(0)
    groups = rng.poisson(mean * rng.gamma(7, 1 / 7, (200, num_groups)))

    def cost(size):
        return np.sum(-(-groups // size)) * (size + grouped_matmul.COPY_TOKENS)

    chosen = grouped_matmul.block_tokens(mean * num_groups, num_groups)
    assert chosen % grouped_matmul.BLOCK_STEP == 0
    others = range(grouped_matmul.BLOCK_STEP, 4 * mean + grouped_matmul.BLOCK_STEP, grouped_matmul.BLOCK_STEP)
    assert cost(chosen) <= 1.1 * min(cost(size) for size in others)


@pytest.mark.parametrize("num_groups", [1, 4, 64])
def test_at_most_one_block_a_group_is_padding(num_groups):
    """The work follows the tokens, not the groups; and no sizes of groups need more blocks than have room."""
    num_routed, size = 512, 16
    rng = np.random.default_rng(0)
    for group_sizes in (
        rng.multinomial(num_routed, rng.dirichlet([0.5] * num_groups)),
        rng.multinomial(100, [1 / num_groups] * num_groups),  # and tokens of no group
        np.array([num_routed] + [0] * (num_groups - 1)),
    ):
        num_grouped = sum(group_sizes)
        count, *table = grouped_matmul._block_table(jnp.asarray(group_sizes, jnp.int32), num_routed, size)
        assert num_grouped <= count * size < num_grouped + num_groups * size
        assert count <= len(table[0])
        of_row = np.full(num_routed, -1)
        for group, first, end in zip(*(column[:count] for column in table), strict=True):
            of_row[first : min(first + size, end)] = group
        np.testing.assert_array_equal(of_row[:num_grouped], np.repeat(np.arange(num_groups), group_sizes))
        assert (of_row[num_grouped:] == -1).all()


@pytest.mark.parametrize(
    ("size", "most", "tile"), [(4096, 1024, 1024), (11008, 1024, 1024), (1376, 1024, 768), (24, 1024, 128)]
)
def test_tiles_are_few_and_waste_little(size, most, tile):
    assert grouped_matmul._tile(size, most) == tile


def test_tpus_and_hopper_have_kernels_of_their_own():
    chosen = [grouped_matmul.choose(platform) for platform in ("tpu", "hopper", "gpu", "cpu")]
    assert chosen == ["megablox", "mosaic", "blocks", "blocks"]
