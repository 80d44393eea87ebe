"""Runs Pallas kernels, which only accelerators compile, by an interpreter."""

import contextlib
from unittest import mock

from jax.experimental import pallas


@contextlib.contextmanager
def interpreted():
    """Within it every Pallas kernel that is traced is interpreted, on any device."""
    compiled = pallas.pallas_call
    with mock.patch.object(
        pallas, "pallas_call", lambda *args, **options: compiled(*args, **{**options, "interpret": True})
    ):
        yield
