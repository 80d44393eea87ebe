"""Devices, the cache of compiled programs, and the selections `fast` and `slow`.

Tests run on eight emulated devices; a test that needs fewer takes the first ones. With JAX_PLATFORMS=cuda,cpu or
tpu,cpu tests compute on the devices that are there, with all bits of float32.
"""

import gc
import os
import tempfile

_CACHE = None
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers have the environment of the process that starts them
    _CACHE = tempfile.TemporaryDirectory(prefix="flexolmo-tests-", ignore_cleanup_errors=True)
    # One cache of compiled programs for all workers and for the processes that tests start; not that of the user.
    os.environ["XDG_CACHE_HOME"] = _CACHE.name
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{_CACHE.name}/compiled")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    # Tests compute little and compile much: code that LLVM does not optimize, in one module, is ready in half the time.
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1")

import jax  # noqa: E402  it reads the environment
import pytest  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
# Few programs of a worker serve another process; to keep them all would take longer than the others save.
jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS") or "cpu")
if jax.config.jax_platforms != "cpu":
    jax.config.update("jax_default_matmul_precision", "highest")

# Folders and modules that compile little: `bash launch/test.sh --fast` runs their tests, except slow ones.
FAST = (
    *("tests/checkpoint", "tests/combine", "tests/data", "tests/evaluation/test_report.py"),
    *("tests/cli/test_clean.py", "tests/cli/test_flags_of.py", "tests/cli/test_main.py"),
    *("tests/serving/test_chat.py", "tests/serving/test_middleware.py", "tests/serving/test_parsing.py"),
    *("tests/test_chips.py", "tests/planning/test_hlo.py"),
    *("tests/training/test_optimizer.py", "tests/training/test_metrics.py"),
    *("tests/test_check_terms.py", "tests/test_configs.py", "tests/test_docs.py", "tests/test_launch.py"),
    "tests/test_progress.py",
)
# In these folders, but longer than all others.
LONG = (
    *("tests/checkpoint/test_train_state.py", "tests/combine/test_dtypes.py", "tests/data/batches/test_pipeline.py"),
    "tests/data/ingest/test_tokenizing.py",
)

# Those that take longest, to be begun first: each module has one worker, and none is to be left with one of these.
FIRST = (
    *("tests/training/test_layouts.py", "tests/test_quickstart.py", "tests/training/test_faults.py"),
    *("tests/test_launch_runs.py", "tests/training/test_processes.py", "tests/cli/test_benchmark.py"),
    *("tests/extensions/test_model_extensions.py", "tests/cli/test_compilation_cache.py", "tests/test_distributed.py"),
    *("tests/model/test_decoder.py", "tests/test_object_stores.py", "tests/training/test_step.py"),
    *("tests/training/test_loop.py", "tests/training/test_divergence.py", "tests/test_launch.py"),
)


def pytest_configure(config: pytest.Config) -> None:
    """Removes the cache of compiled programs at the end."""
    if _CACHE is not None:
        config.add_cleanup(_CACHE.cleanup)


def pytest_collection_finish() -> None:
    """Keeps what modules made from being searched for garbage again and again, which takes half a second each time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


def pytest_sessionfinish() -> None:
    """The same for all that is left: pytest ends with several collections."""
    gc.freeze()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks the tests of `FAST`, except those of `LONG`, and puts those of `FIRST` first."""
    fast, long = ([config.rootpath / path for path in paths] for paths in (FAST, LONG))
    for item in items:
        if any(map(item.path.is_relative_to, fast)) and item.path not in long:
            item.add_marker("fast")
    ranks = {config.rootpath / path: rank for rank, path in enumerate(FIRST)}
    items.sort(key=lambda item: ranks.get(item.path, len(FIRST)))
