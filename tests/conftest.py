"""Eight emulated devices for every test; a test that wants fewer takes the first ones."""

import jax

jax.config.update("jax_num_cpu_devices", 8)
