"""What the tests of this folder share: whether transformers is asked, and how it computes."""

import importlib.util

import pytest

from flexolmo_jax.interop import parity


@pytest.fixture
def no_transformers(monkeypatch):
    """Leaves out the comparison of logits with transformers, which tests of their own make."""
    monkeypatch.setattr(parity, "transformers_installed", lambda: False)


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Threads of torch that wait for one another on busy cores take longer than the work."""
    if importlib.util.find_spec("torch"):
        import torch

        torch.set_num_threads(1)
