"""Devices, the cache of compiled programs, and the selections `fast` and `slow`.

Tests run on eight emulated devices; a test that needs fewer takes the first ones. With JAX_PLATFORMS=cuda,cpu or
tpu,cpu tests compute on the devices that are there, with all bits of float32.
"""

import os
import pathlib
import tempfile

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS") or "cpu")
if jax.config.jax_platforms != "cpu":
    jax.config.update("jax_default_matmul_precision", "highest")

# Folders and modules that compile little: `bash launch/test.sh --fast` runs their tests, except slow ones.
FAST = (
    *("tests/checkpoint", "tests/combine", "tests/data", "tests/evaluation/test_report.py"),
    *("tests/cli/test_flags_of.py", "tests/cli/test_main.py"),
    *("tests/serving/test_access.py", "tests/serving/test_chat.py", "tests/serving/test_schema.py"),
    *("tests/planning/test_chips.py", "tests/planning/test_hlo.py"),
    *("tests/training/test_optimizer.py", "tests/training/test_metrics.py"),
    *("tests/test_configs.py", "tests/test_launch.py", "tests/test_progress.py"),
)


def pytest_configure(config: pytest.Config) -> None:
    """Gives the commands that tests start as processes a cache of compiled programs of their own."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        directory = tempfile.TemporaryDirectory(prefix="flexolmo-cache-", ignore_cleanup_errors=True)
        os.environ["XDG_CACHE_HOME"] = directory.name
        config.add_cleanup(directory.cleanup)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks the tests of `FAST`."""
    folders = [config.rootpath / path for path in FAST]
    missing = [str(path) for path in folders if not path.exists()]
    if missing:
        raise pytest.UsageError(f"FAST in tests/conftest.py names {', '.join(missing)}, which does not exist")
    for item in items:
        if any(pathlib.Path(item.path).is_relative_to(path) for path in folders):
            item.add_marker("fast")
