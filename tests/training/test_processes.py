"""Each process feeds its devices their own sequences of the global batch."""

import os
import socket
import subprocess
import sys

import numpy as np

from tests.support import runs

PROGRAM = """
import sys
import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from flexolmo_jax import sharding
from flexolmo_jax.training import loop

jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
mesh = sharding.make_mesh({"data": -1, "fsdp": 1, "expert": 1, "tensor": 1})
sequences = NamedSharding(mesh, PartitionSpec(("data", "fsdp", "expert"), None))
batch = {"tokens": np.arange(24).reshape(8, 3)}
placed = next(loop._placed([batch], sequences))["tokens"]
print(*[int(sequence[0]) // 3 for shard in placed.addressable_shards for sequence in np.asarray(shard.data)])
"""


def test_every_sequence_goes_to_one_process():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    command, environment = [sys.executable, "-c", PROGRAM, address], {**os.environ, "PYTHONPATH": runs.PYTHONPATH}
    processes = [
        subprocess.Popen([*command, str(i)], env=environment, stdout=subprocess.PIPE, text=True) for i in range(2)
    ]
    sequences = [np.array(process.communicate(timeout=120)[0].split(), int) for process in processes]
    assert [len(indices) for indices in sequences] == [4, 4]
    assert sorted(np.concatenate(sequences)) == list(range(8))
