"""Grouped matmul: the rows of x come in groups, and each group is multiplied by a kernel of its own.

The implementations, and what the compiled program of a step with gradients showed of them:

- `ragged` (`jax.lax.ragged_dot`): for TPUs a kernel, but the gradient of the kernels is dense, so that the FLOPs grow
  with the number of groups. For NVIDIA GPUs, and for CPUs, all of it is dense.
- `megablox` (Pallas, part of JAX): kernels for TPUs, forward and backward; tiles without rows are not visited.
- `mosaic` (Pallas, part of JAX): kernels for Hopper GPUs, forward and backward; tiles without rows cost as much as any,
  but for the kernels' gradient.
- `blocks`: block after block of rows, each a plain matmul, on any device. At most a block a group is in vain.
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

MEGABLOX_TILE = (512, 1024, 1024)  # at most: rows, contracted dimension, columns; fits the 16 MiB of VMEM twice
BLOCK_ROWS = 64  # a block's are a multiple of these
MOSAIC_TILE = 128  # rows, and columns
MOSAIC_TILING = {"block_m": MOSAIC_TILE, "block_n": MOSAIC_TILE, "block_k": 64, "max_concurrent_steps": 4}
MOSAIC_VISITS = 1.5  # rows of visited tiles, of those that are expected: with more, blocks take less time
COPY_ROWS = 800  # an H200 multiplies about so many by a kernel while it copies one, on average over both passes


def grouped_matmul(
    x_RxD: jax.Array,
    kernels_ExDxF: jax.Array,
    group_sizes_E: jax.Array,
    implementation: str,
    expected_rows: int | None = None,
) -> jax.Array:
    """Multiplies each row by the kernel of its group.

    Args:
      x_RxD: rows, those of group 0 first, then those of group 1, and so on.
      kernels_ExDxF: one kernel a group, in the dtype of x.
      group_sizes_E: int32, rows of each group, at most R together. Rows beyond are of no group: what stands there
        in x, and in the gradient of the result, must be finite; in the result, and in the gradient of x, it is
        undefined.
      implementation: a key of `IMPLEMENTATIONS`.
      expected_rows: how many rows are of a group, about; by default all. It changes no result.

    Returns:
      [R, F], in the dtype of x.
    """
    return IMPLEMENTATIONS[implementation](x_RxD, kernels_ExDxF, group_sizes_E, expected_rows or x_RxD.shape[0])


def _ragged(x_RxD: jax.Array, kernels_ExDxF: jax.Array, group_sizes_E: jax.Array, _: int) -> jax.Array:
    return jax.lax.ragged_dot(x_RxD, kernels_ExDxF, group_sizes_E)


def _megablox(x_RxD: jax.Array, kernels_ExDxF: jax.Array, group_sizes_E: jax.Array, _: int) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.megablox import gmm

    num_rows = x_RxD.shape[0]
    sizes = (num_rows, *kernels_ExDxF.shape[1:])
    tiling = tuple(_tile(size, most) for size, most in zip(sizes, MEGABLOX_TILE, strict=True))
    if num_rows % tiling[0]:
        x_RxD = jnp.pad(x_RxD, ((0, -num_rows % tiling[0]), (0, 0)))
    return gmm(x_RxD, kernels_ExDxF, group_sizes_E, x_RxD.dtype, tiling)[:num_rows]


def _tile(size: int, most: int) -> int:
    """A multiple of 128, at most `most`, that covers the size in as few tiles as possible with little to spare."""
    return -(-size // -(-size // most) // 128) * 128


def _mosaic(x_RxD: jax.Array, kernels_ExDxF: jax.Array, group_sizes_E: jax.Array, expected_rows: int) -> jax.Array:
    if mosaic_fits(x_RxD.shape[0], expected_rows, kernels_ExDxF.shape, x_RxD.dtype):
        return _in_tiles(x_RxD, kernels_ExDxF, group_sizes_E)
    return _blocks(x_RxD, kernels_ExDxF, group_sizes_E, expected_rows)


def mosaic_fits(num_rows: int, expected_rows: int, kernels: Sequence[int], dtype: jnp.dtype) -> bool:
    """Whether the kernels for Hopper take such rows and kernels [E, D, F], and are faster than blocks.

    But for the kernels' gradient they visit every tile of rows, and a tile of several groups once for each.
    """
    num_groups, *sizes = kernels
    visited = num_rows + (num_groups - 1) * MOSAIC_TILE
    takes = jnp.dtype(dtype) == jnp.bfloat16 and not any(size % MOSAIC_TILE for size in sizes)
    return takes and visited <= MOSAIC_VISITS * expected_rows


@jax.custom_vjp
def _in_tiles(x_RxD: jax.Array, kernels_ExDxF: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    return _multiply_tiles(x_RxD, kernels_ExDxF, group_sizes_E)


def _multiply_tiles(
    x_RxD: jax.Array, kernels: jax.Array, group_sizes_E: jax.Array, transposed: bool = False
) -> jax.Array:
    from jax.experimental.pallas.ops.gpu.ragged_dot_mgpu import ragged_dot

    how = {"grid_block_n": 8, "transpose_rhs": transposed, **MOSAIC_TILING}
    # Without a barrier XLA has a kernel compute its result twice, once to where the backward pass will find it.
    return jax.lax.optimization_barrier(ragged_dot(x_RxD, kernels, group_sizes=group_sizes_E, **how))


def _in_tiles_forward(x_RxD, kernels_ExDxF, group_sizes_E):
    return _in_tiles(x_RxD, kernels_ExDxF, group_sizes_E), (x_RxD, kernels_ExDxF, group_sizes_E)


def _in_tiles_backward(saved, toward_RxF):
    from jax.experimental.pallas.ops.gpu.transposed_ragged_dot_mgpu import transposed_ragged_dot

    x_RxD, kernels_ExDxF, group_sizes_E = saved
    toward_RxD = _multiply_tiles(toward_RxF, kernels_ExDxF, group_sizes_E, transposed=True)
    toward_ExDxF = transposed_ragged_dot(x_RxD, toward_RxF, group_sizes=group_sizes_E, grid_block_n=4, **MOSAIC_TILING)
    return toward_RxD, toward_ExDxF, None


_in_tiles.defvjp(_in_tiles_forward, _in_tiles_backward)


def _blocks(x_RxD: jax.Array, kernels_ExDxF: jax.Array, group_sizes_E: jax.Array, expected_rows: int) -> jax.Array:
    size = min(x_RxD.shape[0], block_rows(expected_rows, kernels_ExDxF.shape[0]))
    return _in_blocks(size, x_RxD, kernels_ExDxF, group_sizes_E)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_blocks(size: int, x_RxD: jax.Array, kernels_ExDxF: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    return _multiply_blocks(size, x_RxD, kernels_ExDxF, group_sizes_E, "RD,DF->RF")


def _in_blocks_forward(size, x_RxD, kernels_ExDxF, group_sizes_E):
    return _in_blocks(size, x_RxD, kernels_ExDxF, group_sizes_E), (x_RxD, kernels_ExDxF, group_sizes_E)


def _in_blocks_backward(size, saved, toward_RxF):
    x_RxD, kernels_ExDxF, group_sizes_E = saved
    toward_RxD = _multiply_blocks(size, toward_RxF, kernels_ExDxF, group_sizes_E, "RF,DF->RD")
    toward_ExDxF = _sum_blocks(size, x_RxD, toward_RxF, group_sizes_E).astype(kernels_ExDxF.dtype)
    return toward_RxD, toward_ExDxF, None


_in_blocks.defvjp(_in_blocks_forward, _in_blocks_backward)


def _multiply_blocks(
    size: int, x_RxD: jax.Array, kernels: jax.Array, group_sizes_E: jax.Array, equation: str
) -> jax.Array:
    """Each row by the kernel of its group, as the equation says, in blocks of `size` rows.

    A group's last block reaches into the rows of the next group, which overwrites them when its turn comes.
    """
    num_rows = x_RxD.shape[0]
    x_RxD = jnp.pad(x_RxD, ((0, size), (0, 0)))

    def multiply(y, group, start, _):
        rows = jax.lax.dynamic_slice_in_dim(x_RxD, start, size)
        return jax.lax.dynamic_update_slice_in_dim(y, jnp.einsum(equation, rows, kernels[group]), start, 0)

    shape = jax.eval_shape(functools.partial(jnp.einsum, equation), x_RxD, kernels[0])
    return _fold(multiply, jnp.zeros(shape.shape, shape.dtype), *_block_table(group_sizes_E, num_rows, size))[:num_rows]


def _sum_blocks(size: int, x_RxD: jax.Array, toward_RxF: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    """The gradient of the kernels, float32 [E, D, F]: for each group, the sum of its rows' outer products."""
    num_rows = x_RxD.shape[0]
    x_RxD, toward_RxF = (jnp.pad(y, ((0, size), (0, 0))) for y in (x_RxD, toward_RxF))

    def add(total_ExDxF, group, start, end):
        rows = jax.lax.dynamic_slice_in_dim(x_RxD, start, size)
        rows = jnp.where((start + jnp.arange(size) < end)[:, None], rows, 0)
        toward = jax.lax.dynamic_slice_in_dim(toward_RxF, start, size)
        outer_DxF = jnp.einsum("RD,RF->DF", rows, toward, preferred_element_type=jnp.float32)
        outer_DxF += jax.lax.dynamic_index_in_dim(total_ExDxF, group, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(total_ExDxF, outer_DxF, group, 0)

    zeros_ExDxF = jnp.zeros((group_sizes_E.shape[0], x_RxD.shape[1], toward_RxF.shape[1]), jnp.float32)
    return _fold(add, zeros_ExDxF, *_block_table(group_sizes_E, num_rows, size))


def _fold(body: Callable, carry: jax.Array, count: jax.Array, *table_T: jax.Array) -> jax.Array:
    """Folds body(carry, *row) -> carry over the first `count` rows of a table, which may have room for many more.

    On a GPU the host waits before each to know whether there is one.
    """
    return jax.lax.fori_loop(0, count, lambda i, carry: body(carry, *(column_T[i] for column_T in table_T)), carry)


def block_rows(num_rows: int, num_groups: int) -> int:
    """The rows of a block with which the work is about least.

    Groups of m rows on average take m / b + 1 / 2 blocks of b rows, but at least one. A block costs as much as the
    matmul of b rows and of `COPY_ROWS`, c, which stand for the copies of its kernel and of its gradient. That is least
    for sqrt(2 c m); where groups are small, if most are a single block.
    """
    mean = num_rows / num_groups
    return BLOCK_ROWS * max(1, round(min(math.sqrt(2 * COPY_ROWS * mean), 1.5 * mean) / BLOCK_ROWS))


def _block_table(group_sizes_E: jax.Array, num_rows: int, size: int) -> tuple[jax.Array, ...]:
    """How many blocks there are; and of each its group, its first row, and the end of the group, in the order of rows.

    There is room for as many blocks as the worst division of rows into groups needs.
    """
    ends_E, blocks_E = jnp.cumsum(group_sizes_E), -(-group_sizes_E // size)
    last_block_E = jnp.cumsum(blocks_E)
    block_T = jnp.arange((num_rows + group_sizes_E.shape[0] * (size - 1)) // size)
    # A binary search would be a loop of its own.
    group_T = jnp.searchsorted(last_block_E, block_T, side="right", method="compare_all")
    in_group_T = block_T - (last_block_E - blocks_E)[group_T]
    start_T = (ends_E - group_sizes_E)[group_T] + in_group_T * size
    return last_block_E[-1], group_T, start_T, ends_E[group_T]


IMPLEMENTATIONS: dict[str, Callable[[jax.Array, jax.Array, jax.Array, int], jax.Array]] = {
    "ragged": _ragged,
    "megablox": _megablox,
    "mosaic": _mosaic,
    "blocks": _blocks,
}


def choose(platform: str) -> str:
    """The implementation for the devices of a platform (`sharding.platform_of`)."""
    return {"tpu": "megablox", "hopper": "mosaic"}.get(platform, "blocks")
