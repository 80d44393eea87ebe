"""An engine that compiles few programs, and those fast."""

import pytest

from tests.support.fast_engine import fast_engine


@pytest.fixture(scope="package", autouse=True)
def _fast_engine():
    with fast_engine():
        yield
