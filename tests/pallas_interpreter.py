"""Runs Pallas kernels, which only accelerators compile, by an interpreter."""

import contextlib
from unittest import mock

import jax
from jax._src.pallas.mosaic_gpu.interpret import params
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
    """Within it Pallas kernels for Hopper GPUs that are traced are interpreted, as if there were one."""
    gpu = mock.Mock(core_count=2)
    with params.force_gpu_interpret_mode(), mock.patch.object(jax, "devices", return_value=[gpu]):
        yield
