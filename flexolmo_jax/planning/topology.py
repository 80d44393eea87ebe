"""Devices of a TPU slice that need not be there: XLA's TPU compiler takes their description instead."""

import importlib.util
import os

import jax
from jax.experimental import topologies

from flexolmo_jax.errors import UserError

# libtpu asks the machine it is on which TPU it has. These answer in its place, and keep its logs off the disk.
_ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_LOG_DIR": "disabled",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}


def topology_devices(name: str, slices: int = 1) -> list[jax.Device]:
    """The devices of `slices` slices, to compile for; programs cannot run on them.

    To be called before JAX has looked for devices: it then sees the host's CPU alone.

    Args:
      name: kind and shape of a slice, such as "v5e:4x4" or "v5p:2x4x4".
      slices: how many of them, joined by the data centre's network.

    Raises:
      UserError: libtpu is not installed, or it knows no such slice.
    """
    if not importlib.util.find_spec("libtpu"):
        raise UserError(
            f"--topology={name}: needs libtpu, the TPU compiler, which is not installed; "
            "pip install 'flexolmo-jax[plan]'"
        )
    for variable, value in _ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    jax.config.update("jax_platforms", "cpu")
    options = {"num_slices": slices} if slices > 1 else {}
    if set(name.partition(":")[2].split("x")) == {"1"}:
        options["chips_per_host_bounds"] = (1, 1, 1)  # else 2 x 2, of which a single chip is no multiple
    if name.startswith("v4:"):
        options["chip_config_name"] = "megacore"  # the two cores of a chip as one device, as where they are there
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices)
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        why = str(error).splitlines()[0].removeprefix("INVALID_ARGUMENT: ")
        raise UserError(
            f"--topology={name}: no slice that the TPU compiler knows ({why}); give one such as v5e:2x4 or v5p:2x4x4"
        ) from None
