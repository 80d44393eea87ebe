"""The engine with few programs, compiled fast: for tests on tiny models."""

import contextlib
from unittest import mock

import jax

from flexolmo_jax.inference import engine, steps
from tests.support.tiny import COMPILE_FAST


def jit_prefill(function):
    """`steps.prefill`, compiled with few optimizations."""
    return jax.jit(function, static_argnums=(0, 7), donate_argnums=2, compiler_options=COMPILE_FAST)


@contextlib.contextmanager
def fast_engine():
    """In the block, all short sequences share one bucket, and programs are compiled with few optimizations."""
    prefill = jit_prefill(steps.prefill.__wrapped__)
    decode = jax.jit(steps.decode.__wrapped__, static_argnums=0, donate_argnums=2, compiler_options=COMPILE_FAST)
    with (
        mock.patch.multiple(engine, MIN_BUCKET=64, prefill=prefill, decode=decode),
        mock.patch.multiple(steps, prefill=prefill, decode=decode),
    ):
        yield


@contextlib.contextmanager
def prompts_in_chunks(size, score_batch=steps.SCORE_BATCH):
    """In the block, prompts are read that many tokens at once, and scored that many positions at once."""

    def prefill(*args):  # a function of its own: programs with other chunks are not used for it, nor forgotten
        return steps.prefill.__wrapped__(*args)

    with (
        mock.patch.multiple(steps, CHUNK=size, SCORE_BATCH=score_batch),
        mock.patch.object(engine, "prefill", jit_prefill(prefill)),
    ):
        yield
