"""One bucket for all short sequences: lengths share compiled programs."""

from unittest import mock

import pytest

from flexolmo_jax.inference import engine


@pytest.fixture(scope="package", autouse=True)
def _share_programs():
    with mock.patch.object(engine, "MIN_BUCKET", 64):
        yield
