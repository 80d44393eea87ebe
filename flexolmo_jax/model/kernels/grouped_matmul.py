"""Grouped matmul: routed tokens come in groups, one for each expert, and each group is multiplied by its own matrix.

The implementations, and their compiled programs with gradients:

- `ragged` (`jax.lax.ragged_dot`): a kernel on TPUs, but the gradient of the matrices is dense, so that its FLOPs grow
  with the number of groups. On NVIDIA GPUs and on CPUs everything is dense.
- `megablox` (Pallas, part of JAX): kernels for TPUs, forward and backward; they skip tiles without tokens.
- `mosaic` (Pallas, part of JAX): kernels for Hopper GPUs, forward and backward; only the gradient of the matrices skips
  tiles without tokens.
- `blocks`: a plain matmul for each block of tokens, on any device. At most one block a group is padding.
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

# Maximum tile: tokens, contracted dimension, columns; fits the 16 MiB of VMEM twice.
MEGABLOX_TILE = (512, 1024, 1024)
BLOCK_STEP = 64  # the tokens of a block are a multiple of this
MOSAIC_TILE = 128  # tokens, and columns
MOSAIC_TILING = {"block_m": MOSAIC_TILE, "block_n": MOSAIC_TILE, "block_k": 64, "max_concurrent_steps": 4}
MOSAIC_MAX_VISITED = 1.5  # tokens in visited tiles per expected token; above it, blocks are faster
COPY_TOKENS = 800  # an H200 copies a matrix in about the time it multiplies this many tokens by it (both passes)


def grouped_matmul(
    x_RxD: jax.Array,
    kernels_ExDxF: jax.Array,
    group_sizes_E: jax.Array,
    implementation: str,
    expected_routed: int | None = None,
) -> jax.Array:
    """Multiplies each routed token by the matrix of its group.

    Args:
      x_RxD: routed tokens, those of group 0 first, then those of group 1, and so on.
      kernels_ExDxF: one matrix for each group, in the dtype of x.
      group_sizes_E: int32, tokens in each group, at most R in total. The remaining rows have no group: there, x and the
        cotangent must be finite, and the output and the gradient of x are undefined.
      implementation: a key of `IMPLEMENTATIONS`.
      expected_routed: expected number of rows with a group; by default all. It changes no result.

    Returns:
      [R, F], in the dtype of x.
    """
    return IMPLEMENTATIONS[implementation](x_RxD, kernels_ExDxF, group_sizes_E, expected_routed or x_RxD.shape[0])


def _ragged(x_RxD: jax.Array, kernels_ExDxF: jax.Array, group_sizes_E: jax.Array, _: int) -> jax.Array:
    return jax.lax.ragged_dot(x_RxD, kernels_ExDxF, group_sizes_E)


def _megablox(x_RxD: jax.Array, kernels_ExDxF: jax.Array, group_sizes_E: jax.Array, _: int) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.megablox import gmm

    num_routed = x_RxD.shape[0]
    sizes = (num_routed, *kernels_ExDxF.shape[1:])
    tiling = tuple(_tile(size, maximum) for size, maximum in zip(sizes, MEGABLOX_TILE, strict=True))
    if num_routed % tiling[0]:
        x_RxD = jnp.pad(x_RxD, ((0, -num_routed % tiling[0]), (0, 0)))
    return gmm(x_RxD, kernels_ExDxF, group_sizes_E, x_RxD.dtype, tiling)[:num_routed]


def _tile(size: int, maximum: int) -> int:
    """The multiple of 128, at most `maximum`, that covers the size in the fewest tiles with the least padding."""
    return -(-size // -(-size // maximum) // 128) * 128


def _mosaic(x_RxD: jax.Array, kernels_ExDxF: jax.Array, group_sizes_E: jax.Array, expected_routed: int) -> jax.Array:
    if mosaic_fits(x_RxD.shape[0], expected_routed, kernels_ExDxF.shape, x_RxD.dtype):
        return _in_tiles(x_RxD, kernels_ExDxF, group_sizes_E)
    return _blocks(x_RxD, kernels_ExDxF, group_sizes_E, expected_routed)


def mosaic_fits(num_routed: int, expected_routed: int, kernels: Sequence[int], dtype: jnp.dtype) -> bool:
    """Whether the Hopper kernels take these shapes (`kernels` is [E, D, F]) and are faster than blocks.

    Except for the gradient of the matrices they visit every tile, and a tile of several groups once for each group.
    """
    num_groups, *sizes = kernels
    visited = num_routed + (num_groups - 1) * MOSAIC_TILE
    takes = jnp.dtype(dtype) == jnp.bfloat16 and not any(size % MOSAIC_TILE for size in sizes)
    return takes and visited <= MOSAIC_MAX_VISITED * expected_routed


@jax.custom_vjp
def _in_tiles(x_RxD: jax.Array, kernels_ExDxF: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    return _multiply_tiles(x_RxD, kernels_ExDxF, group_sizes_E)


def _multiply_tiles(
    x_RxD: jax.Array, kernels: jax.Array, group_sizes_E: jax.Array, transposed: bool = False
) -> jax.Array:
    from jax.experimental.pallas.ops.gpu.ragged_dot_mgpu import ragged_dot

    options = {"grid_block_n": 8, "transpose_rhs": transposed, **MOSAIC_TILING}
    # Without a barrier XLA runs a kernel twice, once to where the backward pass will read its output.
    return jax.lax.optimization_barrier(ragged_dot(x_RxD, kernels, group_sizes=group_sizes_E, **options))


def _in_tiles_forward(x_RxD, kernels_ExDxF, group_sizes_E):
    return _in_tiles(x_RxD, kernels_ExDxF, group_sizes_E), (x_RxD, kernels_ExDxF, group_sizes_E)


def _in_tiles_backward(residuals, d_out_RxF):
    from jax.experimental.pallas.ops.gpu.transposed_ragged_dot_mgpu import transposed_ragged_dot

    x_RxD, kernels_ExDxF, group_sizes_E = residuals
    d_x_RxD = _multiply_tiles(d_out_RxF, kernels_ExDxF, group_sizes_E, transposed=True)
    d_kernels_ExDxF = transposed_ragged_dot(
        x_RxD, d_out_RxF, group_sizes=group_sizes_E, grid_block_n=4, **MOSAIC_TILING
    )
    return d_x_RxD, d_kernels_ExDxF, None


_in_tiles.defvjp(_in_tiles_forward, _in_tiles_backward)


def _blocks(x_RxD: jax.Array, kernels_ExDxF: jax.Array, group_sizes_E: jax.Array, expected_routed: int) -> jax.Array:
    size = min(x_RxD.shape[0], block_tokens(expected_routed, kernels_ExDxF.shape[0]))
    return _in_blocks(size, x_RxD, kernels_ExDxF, group_sizes_E)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_blocks(size: int, x_RxD: jax.Array, kernels_ExDxF: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    return _multiply_blocks(size, x_RxD, kernels_ExDxF, group_sizes_E, "RD,DF->RF")


def _in_blocks_forward(size, x_RxD, kernels_ExDxF, group_sizes_E):
    return _in_blocks(size, x_RxD, kernels_ExDxF, group_sizes_E), (x_RxD, kernels_ExDxF, group_sizes_E)


def _in_blocks_backward(size, residuals, d_out_RxF):
    x_RxD, kernels_ExDxF, group_sizes_E = residuals
    d_x_RxD = _multiply_blocks(size, d_out_RxF, kernels_ExDxF, group_sizes_E, "RF,DF->RD")
    d_kernels_ExDxF = _sum_blocks(size, x_RxD, d_out_RxF, group_sizes_E).astype(kernels_ExDxF.dtype)
    return d_x_RxD, d_kernels_ExDxF, None


_in_blocks.defvjp(_in_blocks_forward, _in_blocks_backward)


def _multiply_blocks(
    size: int, x_RxD: jax.Array, kernels: jax.Array, group_sizes_E: jax.Array, equation: str
) -> jax.Array:
    """Multiplies each routed token by the matrix of its group (an einsum equation), in blocks of `size` tokens.

    A group's last block extends into the next group, which later overwrites these outputs.
    """
    num_routed = x_RxD.shape[0]
    x_RxD = jnp.pad(x_RxD, ((0, size), (0, 0)))

    def multiply(y, group, start, _):
        block = jax.lax.dynamic_slice_in_dim(x_RxD, start, size)
        return jax.lax.dynamic_update_slice_in_dim(y, jnp.einsum(equation, block, kernels[group]), start, 0)

    shape = jax.eval_shape(functools.partial(jnp.einsum, equation), x_RxD, kernels[0])
    return _fold(multiply, jnp.zeros(shape.shape, shape.dtype), *_block_table(group_sizes_E, num_routed, size))[
        :num_routed
    ]


def _sum_blocks(size: int, x_RxD: jax.Array, d_out_RxF: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    """The gradient of the matrices, float32 [E, D, F]: for each group, the sum of its tokens' outer products."""
    num_routed = x_RxD.shape[0]
    x_RxD, d_out_RxF = (jnp.pad(y, ((0, size), (0, 0))) for y in (x_RxD, d_out_RxF))

    def add(total_ExDxF, group, start, end):
        x_MxD = jax.lax.dynamic_slice_in_dim(x_RxD, start, size)
        x_MxD = jnp.where((start + jnp.arange(size) < end)[:, None], x_MxD, 0)
        d_out_MxF = jax.lax.dynamic_slice_in_dim(d_out_RxF, start, size)
        outer_DxF = jnp.einsum("MD,MF->DF", x_MxD, d_out_MxF, preferred_element_type=jnp.float32)
        outer_DxF += jax.lax.dynamic_index_in_dim(total_ExDxF, group, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(total_ExDxF, outer_DxF, group, 0)

    zeros_ExDxF = jnp.zeros((group_sizes_E.shape[0], x_RxD.shape[1], d_out_RxF.shape[1]), jnp.float32)
    return _fold(add, zeros_ExDxF, *_block_table(group_sizes_E, num_routed, size))


def _fold(body: Callable, carry: jax.Array, count: jax.Array, *columns_A: jax.Array) -> jax.Array:
    """Folds body(carry, *entries) -> carry over the first `count` entries of columns, which may be much longer.

    On a GPU the host waits before each iteration to know whether there is one.
    """
    return jax.lax.fori_loop(0, count, lambda i, carry: body(carry, *(column_A[i] for column_A in columns_A)), carry)


def block_tokens(num_routed: int, num_groups: int) -> int:
    """The number of tokens in a block that minimizes the estimated work.

    Groups of m tokens on average take m / b + 1 / 2 blocks of b tokens, but at least one. A block costs as much as the
    matmul of b tokens plus c = `COPY_TOKENS`, for copying its matrix and its gradient. The minimum is at
    b = sqrt(2 c m); for small groups, where most groups are a single block.
    """
    mean = num_routed / num_groups
    return BLOCK_STEP * max(1, round(min(math.sqrt(2 * COPY_TOKENS * mean), 1.5 * mean) / BLOCK_STEP))


def _block_table(group_sizes_E: jax.Array, num_routed: int, size: int) -> tuple[jax.Array, ...]:
    """(Number of blocks, group of each, its first token, the end of its group), in the order of tokens.

    There is room for as many blocks as the worst case of group sizes needs.
    """
    ends_E, blocks_E = jnp.cumsum(group_sizes_E), -(-group_sizes_E // size)
    last_block_E = jnp.cumsum(blocks_E)
    block_A = jnp.arange((num_routed + group_sizes_E.shape[0] * (size - 1)) // size)
    # A binary search would be a loop of its own.
    group_A = jnp.searchsorted(last_block_E, block_A, side="right", method="compare_all")
    in_group_A = block_A - (last_block_E - blocks_E)[group_A]
    start_A = (ends_E - group_sizes_E)[group_A] + in_group_A * size
    return last_block_E[-1], group_A, start_A, ends_E[group_A]


IMPLEMENTATIONS: dict[str, Callable[[jax.Array, jax.Array, jax.Array, int], jax.Array]] = {
    "ragged": _ragged,
    "megablox": _megablox,
    "mosaic": _mosaic,
    "blocks": _blocks,
}
# Of the implementations that do not compile everywhere: the platforms that they compile for (`sharding.platform_of`).
PLATFORMS = {"megablox": ("tpu",), "mosaic": ("hopper",)}


def choose(platform: str) -> str:
    """The fastest implementation on a platform (`sharding.platform_of`): a key of `IMPLEMENTATIONS`."""
    return {"tpu": "megablox", "hopper": "mosaic"}.get(platform, "blocks")
