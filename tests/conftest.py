"""Eight emulated devices for every test; a test that wants fewer takes the first ones.

With JAX_PLATFORMS=cuda,cpu or tpu,cpu tests compute on what is there, with all bits of float32.
"""

import os
import tempfile

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS") or "cpu")
if jax.config.jax_platforms != "cpu":
    jax.config.update("jax_default_matmul_precision", "highest")


def pytest_configure(config):
    """Commands that run in processes of their own share compiled programs, and leave the user's alone."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        directory = tempfile.TemporaryDirectory(prefix="flexolmo-cache-", ignore_cleanup_errors=True)
        os.environ["XDG_CACHE_HOME"] = directory.name
        config.add_cleanup(directory.cleanup)
