"""Eight emulated devices for every test; a test that wants fewer takes the first ones.

With JAX_PLATFORMS=cuda,cpu or tpu,cpu tests compute on what is there, with all bits of float32.
"""

import os

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS") or "cpu")
if jax.config.jax_platforms != "cpu":
    jax.config.update("jax_default_matmul_precision", "highest")
