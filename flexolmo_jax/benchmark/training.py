"""The training step, as `training.loop` takes it, on random leaves and random tokens."""

import operator
import time
from typing import Any

import jax
import numpy as np

from flexolmo_jax.benchmark import machine
from flexolmo_jax.benchmark.subject import Spec
from flexolmo_jax.model.flops import train_step_flops
from flexolmo_jax.training.run import Program, make_program
from flexolmo_jax.training.state import initial_state, split
from flexolmo_jax.training.step import Batch, Leaves, compile_step


class TrainStep:
    """A `Subject`: forward and backward pass, and optimizer."""

    def __init__(self, spec: Spec):
        """Reads the configuration; nothing is computed yet."""
        self._config = machine.restored(spec.config)

    def build(self) -> dict[str, Any]:
        """Compiles the step and takes it once."""
        config = self._config
        program = make_program(config)
        model = program.model
        with jax.set_mesh(program.mesh):
            trainable, self._frozen = random_leaves(program, config.seed)
            self._state = initial_state(trainable, program.optimizer, program.state)
            self._batch = random_batch(program, config.seed)
            start = time.perf_counter()
            self._step = compile_step(program.step, self._state, self._frozen, self._batch)
            compile_seconds = time.perf_counter() - start
        self.step()
        self.wait()
        batch, length = config.data.batch_size, config.data.sequence_length
        return {
            **machine.devices(),
            "compile_seconds": compile_seconds,
            "tokens": batch * length,
            "flops": train_step_flops(model.architecture, model.layout, program.trainable, batch, length),
            "limit_of": f"{config.compute.dtype} matmul",
            "temporary_bytes": self._step.memory_analysis().temp_size_in_bytes,
        }

    def step(self) -> None:
        """Dispatches a step, to which the state of the one before is donated."""
        self._state, self._metrics = self._step(self._state, self._frozen, self._batch)

    def wait(self) -> None:
        """Waits for the last step."""
        jax.block_until_ready((self._state, self._metrics))

    def token(self) -> float:
        """Not of a training step."""
        raise NotImplementedError

    def limit(self) -> float:
        """FLOP/s of a large matmul in the dtype of the step."""
        return machine.matmul_rate(self._config.compute.dtype)

    def device_memory(self) -> int | None:
        """Peak bytes in use on the first device."""
        return machine.device_memory()


def random_leaves(program: Program, seed: int) -> tuple[Leaves, Leaves]:
    """Fresh leaves as (trainable, frozen), made where they lie, in the dtypes in which a run holds them."""
    abstract = program.state.trainable, program.frozen
    dtypes, where = (jax.tree.map(operator.attrgetter(what), abstract) for what in ("dtype", "sharding"))

    def draw(key: jax.Array) -> tuple[Leaves, Leaves]:
        leaves = split(program.model.init_flat(key), program.trainable)
        return jax.tree.map(lambda leaf, dtype: leaf.astype(dtype), leaves, dtypes)

    return jax.jit(draw, out_shardings=where)(jax.random.key(seed))


def random_batch(program: Program, seed: int) -> Batch:
    """Rows of one document each, without padding."""
    shape = program.batch["tokens"].shape
    rng = np.random.default_rng(seed)
    tokens, targets = rng.integers(0, program.model.architecture.vocab_size, (2, *shape), np.int32)
    positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    batch = {"tokens": tokens, "targets": targets, "segment_ids": np.ones(shape, np.int32), "positions": positions}
    return jax.device_put(batch, {name: rows.sharding for name, rows in program.batch.items()})
