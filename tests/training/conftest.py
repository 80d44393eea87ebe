"""Runs in one process share their compiled steps."""

import functools

import pytest
from ml_collections import ConfigDict, FrozenConfigDict

from flexolmo_jax.training import loop, run
from tests.support import runs


def once_each(function):
    """The function, called once for equal arguments; configurations are equal by their values."""
    called = functools.cache(function)
    return lambda *arguments: called(*(FrozenConfigDict(x) if isinstance(x, ConfigDict) else x for x in arguments))


SHARED = [
    (module, name, once_each(getattr(module, name)))
    for module, name in (
        (run, "make_schedule"),
        (run, "make_optimizer"),
        (run, "make_train_step"),
        (loop, "make_loss_step"),
    )
]


@pytest.fixture(scope="module", autouse=True)
def shared_steps():
    """JAX traces the step of equal configurations once, since it is the same function."""
    with runs.whole_leaves(), pytest.MonkeyPatch.context() as patch:
        for module, name, function in SHARED:
            patch.setattr(module, name, function)
        yield
