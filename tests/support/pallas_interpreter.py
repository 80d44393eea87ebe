"""Runs Pallas kernels, which only accelerators compile, by an interpreter, or by plain functions in their place."""

import contextlib
from unittest import mock

import jax
import jax.numpy as jnp
from jax.experimental import pallas


@contextlib.contextmanager
def interpreted():
    """Within it every Pallas kernel that is traced is interpreted, on any device."""
    compiled = pallas.pallas_call
    with mock.patch.object(
        pallas, "pallas_call", lambda *args, **options: compiled(*args, **{**options, "interpret": True})
    ):
        yield


@contextlib.contextmanager
def hopper_interpreted():
    """Within it Pallas kernels for Hopper GPUs that are traced are interpreted, as if there were one; from jax 0.11."""
    from jax.experimental.pallas.mosaic_gpu import force_gpu_interpret_mode

    gpu = mock.Mock(core_count=2)
    with force_gpu_interpret_mode(), mock.patch.object(jax, "devices", return_value=[gpu]):
        yield


@contextlib.contextmanager
def hopper_stand_ins():
    """Replaces JAX's grouped matmuls for Hopper GPUs by plain functions; tokens without a group get NaN."""
    library = "jax.experimental.pallas.ops.gpu"
    with (
        mock.patch(f"{library}.ragged_dot_mgpu.ragged_dot", _ragged_dot),
        mock.patch(f"{library}.transposed_ragged_dot_mgpu.transposed_ragged_dot", _transposed_ragged_dot),
    ):
        yield


def _ragged_dot(x, kernels, *, group_sizes, transpose_rhs=False, **_):
    y = jax.lax.ragged_dot(x, kernels.swapaxes(1, 2) if transpose_rhs else kernels, group_sizes)
    return jnp.where((jnp.arange(len(x)) < group_sizes.sum())[:, None], y, jnp.nan)


def _transposed_ragged_dot(x, cotangent, *, group_sizes, **_):
    group = jnp.searchsorted(jnp.cumsum(group_sizes), jnp.arange(len(x)), side="right")
    is_of = (group[:, None] == jnp.arange(len(group_sizes))).astype(x.dtype)
    return jnp.einsum("RE,RD,RF->EDF", is_of, x, cotangent)
