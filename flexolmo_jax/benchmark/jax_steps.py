"""The steps of this program on random weights: a training step as a run takes it, and decoding by the engine."""

import dataclasses
import functools
import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from flexolmo_jax import distributed
from flexolmo_jax.benchmark.worker import Step
from flexolmo_jax.checkpoint.manifests import ANCHOR_NAME, BY_ROUTER, ExpertRecord, ModelManifest
from flexolmo_jax.inference.engine import Engine
from flexolmo_jax.inference.model import Model
from flexolmo_jax.inference.request import Request
from flexolmo_jax.model.decoder import Decoder
from flexolmo_jax.model.flops import decode_step_bytes, decode_step_flops, train_step_flops
from flexolmo_jax.model.leaves import INIT_STDDEV
from flexolmo_jax.model.selectors import is_derived
from flexolmo_jax.training.run import build_model, make_program
from flexolmo_jax.training.state import Initialization, initial_leaves
from flexolmo_jax.training.step import Batch, Program, compile_step, initial_state

_READ_BYTES = 400_000_000  # far beyond caches


class JaxStep(Step):
    """A step of this program."""

    def device_memory(self) -> int | None:
        """Peak bytes in use on the first device."""
        statistics = jax.local_devices()[0].memory_stats()
        return statistics["peak_bytes_in_use"] if statistics else None

    def agree(self, number: int) -> int:
        """That of the first process."""
        return distributed.from_primary("number", lambda: number)

    def _built(self, **metrics: Any) -> dict[str, Any]:
        device = jax.devices()[0]
        devices = {"platform": device.platform, "device": device.device_kind, "devices": jax.device_count()}
        processes = {"processes": jax.process_count()} if jax.process_count() > 1 else {}
        return {**devices, **processes, **metrics}


class TrainStep(JaxStep):
    """Forward and backward pass, and optimizer."""

    def build(self) -> dict[str, Any]:
        """Makes leaves, train state and a batch, with the shardings and dtypes of a run."""
        program = self._program = make_program(self._config)
        with jax.set_mesh(program.mesh):
            abstract: tuple[Any, Any] = (program.state.trainable, program.frozen)
            initialization = Initialization(self._config.seed, "", self._config.init)
            trainable, self._frozen = jax.tree.map(
                lambda leaf, like: leaf.astype(like.dtype),
                initial_leaves(program.model, *abstract, None, initialization),
                abstract,
            )
            self._state = initial_state(trainable, program.optimizer, program.state)
            self._batch = random_batch(program, self._config.seed)
        model, shape = program.model, (self._batch_size, self._length)
        return self._built(
            tokens=math.prod(shape),
            flops=train_step_flops(model.architecture, model.layout, program.trainable, *shape),
            limit_of=f"{self._config.compute.dtype} matmul",
        )

    @functools.cached_property
    def _compiled(self) -> jax.stages.Compiled:
        with jax.set_mesh(self._program.mesh):
            return compile_step(self._program.step, self._state, self._frozen, self._batch)

    def step(self) -> None:
        """Dispatches a step, to which the state of the one before is donated."""
        self._state, self._metrics = self._compiled(self._state, self._frozen, self._batch)

    def wait(self) -> None:
        """Waits for the last step."""
        jax.block_until_ready((self._state, self._metrics))

    def limit(self) -> float:
        """FLOP/s of a large matmul in the dtype of the step."""
        return matmul_rate(self._config.compute.dtype)


class Decoding(JaxStep):
    """A generation, prefill included, from prompts of half a sequence to a whole one."""

    def build(self) -> dict[str, Any]:
        """Makes a model and prompts."""
        self._new = self._length // 2
        self._timed = math.ceil(self._new * 3 / 4)
        decoder, _ = build_model(self._config)
        self._model = random_model(decoder, self._config, self._spec.selection)
        decoder = self._model.decoder
        shape = self._batch_size, self._length - self._new
        self._prompts = np.random.default_rng(self._config.seed).integers(0, self._config.model.vocab_size, shape)
        architecture, layout, params = decoder.architecture, decoder.layout, self._model.params
        keys = self._length - self._timed / 2
        return self._built(
            tokens=self._batch_size * self._new,
            flops=decode_step_flops(architecture, layout, self._batch_size, keys),
            bytes=decode_step_bytes(architecture, layout, params, self._batch_size, keys),
            limit_of="memory, read",
            experts=layout.num_experts,
        )

    def step(self) -> None:
        """Generates."""
        self._started().step(self._new)

    def token(self) -> float:
        """Seconds in which one token is decoded for every sequence, over the last three quarters of them."""
        engine = self._started()
        engine.step(self._new - self._timed)
        start = time.perf_counter()
        engine.step(self._timed)
        return (time.perf_counter() - start) / self._timed

    def limit(self) -> float:
        """Bytes per second at which memory is read."""
        return read_rate()

    def _started(self) -> Engine:
        """An engine that has read the prompts."""
        engine = Engine(self._model, slots=self._batch_size)
        engine.add([Request(prompt, self._new) for prompt in self._prompts.tolist()])
        return engine


def random_batch(program: Program, seed: int) -> Batch:
    """Sequences of one document each, without padding."""
    shape, vocabulary = program.batch["tokens"].shape, program.model.architecture.vocab_size
    tokens, targets = np.random.default_rng(seed).integers(0, vocabulary, (2, *shape), np.int32)
    positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    batch = {"tokens": tokens, "targets": targets, "segment_ids": np.ones(shape, np.int32), "positions": positions}
    shardings = {name: array.sharding for name, array in program.batch.items()}
    return {
        name: jax.make_array_from_callback(shape, shardings[name], array.__getitem__) for name, array in batch.items()
    }


def random_model(decoder: Decoder, config: ConfigDict, selection: str = BY_ROUTER) -> Model:
    """A model with random weights, as `flexolmo_jax.load` would hold it, in the dtype of the computation.

    A selector's tables are random too, so that it chooses now one expert, now another.
    """
    names = [ANCHOR_NAME, *(f"expert{i}" for i in range(1, decoder.layout.num_experts))]
    manifest = ModelManifest(
        architecture=dataclasses.asdict(decoder.architecture),
        experts=[ExpertRecord(name=name, leaves={}, card={}) for name in names],
        shared={},
        top_k=decoder.layout.top_k,
        tokenizer_digest="",
        eos_id=-1,  # no token, so that no continuation ends early
        selection=selection if len(names) > 1 else BY_ROUTER,
    )

    model = Model(manifest, {}, dtype=config.compute.dtype)
    # One leaf at a time, the largest first: drawing takes two or three times a leaf's memory.
    rng = np.random.default_rng(config.seed)
    for path, leaf in sorted(model.decoder.abstract().items(), key=lambda item: item[1].size, reverse=True):
        is_scale = path.endswith("scale")
        values = np.ones(leaf.shape) if is_scale else rng.standard_normal(leaf.shape, np.float32) * INIT_STDDEV
        model.params[path] = jnp.asarray(values, jnp.float32 if is_derived(path) else config.compute.dtype)
    return model


def matmul_rate(dtype: str) -> float:
    """FLOP/s of a large matmul that is sharded over all devices."""
    size, repeats = (2048, 4) if jax.default_backend() == "cpu" else (8192, 100)
    count = jax.device_count()
    mesh = jax.make_mesh((count,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded, replicated = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    # Random numbers: a GPU spends less power on others, and runs at a higher clock.
    draw = jax.jit(jax.random.normal, static_argnums=(1, 2), out_shardings=sharded)
    x = draw(jax.random.key(0), (count * size, size), dtype)
    y = jax.device_put(draw(jax.random.key(1), (count * size, size), dtype)[:size] * size**-0.5, replicated)
    matmul = jax.jit(jnp.dot, out_shardings=sharded)
    x = matmul(x, y).block_until_ready()
    start = time.perf_counter()
    for _ in range(repeats):
        x = matmul(x, y)
    x.block_until_ready()
    return repeats * 2 * count * size**3 / (time.perf_counter() - start)


def read_rate() -> float:
    """Bytes per second at which the first device, or all cores of the host, read a large array."""
    if jax.default_backend() == "cpu":
        chunks = np.array_split(np.ones(_READ_BYTES // 4, np.float32), os.cpu_count() or 1)
        with ThreadPoolExecutor(len(chunks)) as pool:
            start = time.perf_counter()
            list(pool.map(np.sum, chunks))
            return _READ_BYTES / (time.perf_counter() - start)
    x, total, repeats = jnp.ones(_READ_BYTES // 4, jnp.float32), jax.jit(jnp.sum), 20
    total(x).block_until_ready()
    start = time.perf_counter()
    jax.block_until_ready([total(x) for _ in range(repeats)])
    return repeats * _READ_BYTES / (time.perf_counter() - start)
