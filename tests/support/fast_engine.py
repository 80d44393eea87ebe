"""The engine with few programs, compiled fast: for tests on tiny models."""

import contextlib
from unittest import mock

import jax

from flexolmo_jax.inference import engine, steps
from tests.support.tiny import COMPILE_FAST


@contextlib.contextmanager
def fast_engine():
    """In the block, all short sequences share one bucket, and programs are compiled with few optimizations."""
    prefill = jax.jit(steps.prefill.__wrapped__, static_argnums=(0, 7), donate_argnums=2, compiler_options=COMPILE_FAST)
    decode = jax.jit(steps.decode.__wrapped__, static_argnums=0, donate_argnums=2, compiler_options=COMPILE_FAST)
    with (
        mock.patch.multiple(engine, MIN_BUCKET=64, prefill=prefill, decode=decode),
        mock.patch.multiple(steps, prefill=prefill, decode=decode),
    ):
        yield
