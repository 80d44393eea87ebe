"""What the tests of this folder share: whether transformers is asked, and runs of the commands that must succeed."""

import pytest

from flexolmo_jax.interop import parity


@pytest.fixture
def no_transformers(monkeypatch):
    """Leaves out the comparison of logits with transformers, which tests of their own make."""
    monkeypatch.setattr(parity, "transformers_installed", lambda: False)
