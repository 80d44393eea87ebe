"""The steps of this program on random weights: a training step as a run takes it, and decoding by the engine."""

import dataclasses
import math
import operator
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from flexolmo_jax.benchmark import machine
from flexolmo_jax.benchmark.worker import Spec
from flexolmo_jax.checkpoint.manifests import ANCHOR_NAME, ExpertRecord, ModelManifest
from flexolmo_jax.inference.engine import Engine
from flexolmo_jax.inference.model import Model
from flexolmo_jax.inference.request import Request
from flexolmo_jax.model.decoder import Decoder
from flexolmo_jax.model.flops import decode_step_flops, train_step_flops
from flexolmo_jax.model.leaves import INIT_STDDEV
from flexolmo_jax.training.run import build_model, make_program
from flexolmo_jax.training.state import split
from flexolmo_jax.training.step import Batch, Leaves, Program, compile_step, initial_state

_NO_TOKEN = -1  # for EOS, so that no continuation ends early


class TrainStep:
    """A `worker.Step`: forward and backward pass, and optimizer."""

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

    def limit(self) -> float:
        """FLOP/s of a large matmul in the dtype of the step."""
        return machine.matmul_rate(self._config.compute.dtype)

    def device_memory(self) -> int | None:
        """Peak bytes in use on the first device."""
        return machine.device_memory()


class Decoding:
    """A `worker.Step`: a generation, prefill included, from prompts of half a sequence to a whole one."""

    def __init__(self, spec: Spec):
        """Reads the configuration; nothing is computed yet."""
        self._config = machine.restored(spec.config)
        self._batch, self._length = self._config.data.batch_size, self._config.data.sequence_length
        self._new = self._length // 2
        self._timed = math.ceil(self._new * 3 / 4)

    def build(self) -> dict[str, Any]:
        """Makes a model and generates once."""
        decoder, _ = build_model(self._config)
        self._model = random_model(decoder, self._config)
        shape = (self._batch, self._length - self._new)
        self._prompts = np.random.default_rng(self._config.seed).integers(0, self._config.model.vocab_size, shape)
        start = time.perf_counter()
        self.step()
        first = time.perf_counter() - start
        start = time.perf_counter()
        self.step()
        positions = self._length - self._timed / 2
        return {
            **machine.devices(),
            "compile_seconds": first - (time.perf_counter() - start),
            "tokens": self._batch * self._new,
            "flops": decode_step_flops(decoder.architecture, decoder.layout, self._batch, positions),
            "bytes": decode_step_bytes(decoder, self._model.params, self._batch, positions),
            "limit_of": "memory, read",
        }

    def step(self) -> None:
        """Generates."""
        self._started().step(self._new)

    def wait(self) -> None:
        """Nothing is left to wait for."""

    def token(self) -> float:
        """Seconds in which one token is decoded for every sequence, over the last three quarters of them."""
        engine = self._started()
        engine.step(self._new - self._timed)
        start = time.perf_counter()
        engine.step(self._timed)
        return (time.perf_counter() - start) / self._timed

    def limit(self) -> float:
        """Bytes per second at which memory is read."""
        return machine.read_rate()

    def device_memory(self) -> int | None:
        """Peak bytes in use on the first device."""
        return machine.device_memory()

    def _started(self) -> Engine:
        """An engine that has read the prompts."""
        engine = Engine(self._model, slots=self._batch)
        engine.add([Request(prompt, self._new) for prompt in self._prompts.tolist()])
        return engine


def random_leaves(program: Program, seed: int) -> tuple[Leaves, Leaves]:
    """Fresh leaves as (trainable, frozen), with the shardings and dtypes of a run."""
    abstract = program.state.trainable, program.frozen
    dtypes, shardings = (jax.tree.map(operator.attrgetter(name), abstract) for name in ("dtype", "sharding"))

    def draw(key: jax.Array) -> tuple[Leaves, Leaves]:
        leaves = split(program.model.init_flat(key), program.trainable)
        return jax.tree.map(lambda leaf, dtype: leaf.astype(dtype), leaves, dtypes)

    return jax.jit(draw, out_shardings=shardings)(jax.random.key(seed))


def random_batch(program: Program, seed: int) -> Batch:
    """Sequences of one document each, without padding."""
    shape, vocabulary = program.batch["tokens"].shape, program.model.architecture.vocab_size
    tokens, targets = np.random.default_rng(seed).integers(0, vocabulary, (2, *shape), np.int32)
    positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    batch = {"tokens": tokens, "targets": targets, "segment_ids": np.ones(shape, np.int32), "positions": positions}
    return jax.device_put(batch, {name: array.sharding for name, array in program.batch.items()})


def random_model(decoder: Decoder, config: ConfigDict) -> Model:
    """A model with random weights, as `flexolmo_jax.load` would hold it, in the dtype of the computation."""
    names = [ANCHOR_NAME, *(f"expert{i}" for i in range(1, decoder.layout.num_experts))]
    manifest = ModelManifest(
        architecture=dataclasses.asdict(decoder.architecture),
        experts=[ExpertRecord(name=name, leaves={}, card={}) for name in names],
        shared={},
        top_k=decoder.layout.top_k,
        tokenizer_digest="",
        eos_id=_NO_TOKEN,
    )

    model = Model(manifest, {}, dtype=config.compute.dtype)
    # One leaf at a time: a program that initializes all of them takes three times their memory.
    rng = np.random.default_rng(config.seed)
    for path, leaf in model.decoder.abstract().items():
        is_scale = path.endswith("scale")
        values = np.ones(leaf.shape) if is_scale else rng.standard_normal(leaf.shape, np.float32) * INIT_STDDEV
        model.params[path] = jnp.asarray(values, config.compute.dtype)
    return model


def decode_step_bytes(decoder: Decoder, params: dict[str, jax.Array], batch: int, positions: float) -> float:
    """Bytes that decoding one token for each sequence must read: weights, and so many positions of the cache.

    Of the embedding each sequence reads one vector; of stacked experts those are read that its tokens choose, as many
    as independent choices would reach.
    """
    arch, layout = decoder.architecture, decoder.layout
    reached = 1 - (1 - layout.top_k / layout.num_experts) ** batch
    looked_up = not arch.tied_embeddings
    weights = sum(
        leaf.nbytes * (reached if "/experts/" in path else 1)
        for path, leaf in params.items()
        if not (looked_up and path == "embedding")
    )
    itemsize = params["embedding"].itemsize
    cache = 2 * arch.num_layers * arch.num_kv_heads * arch.head_dim * itemsize
    return weights + batch * (positions * cache + looked_up * arch.d_model * itemsize)
