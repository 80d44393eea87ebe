"""Decoding by the engine, on random leaves: prompts of half a row, continued to a whole one."""

import dataclasses
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flexolmo_jax.benchmark import machine
from flexolmo_jax.benchmark.subject import Spec
from flexolmo_jax.checkpoint.manifests import ANCHOR_NAME, ExpertRecord, ModelManifest
from flexolmo_jax.inference.engine import Engine
from flexolmo_jax.inference.model import Model
from flexolmo_jax.inference.request import Request
from flexolmo_jax.model.decoder import Decoder
from flexolmo_jax.model.flops import decode_step_flops
from flexolmo_jax.model.layers import INIT_STDDEV
from flexolmo_jax.training.run import build_model

NO_TOKEN = -1  # for EOS, so that no continuation ends early


class Decoding:
    """A `Subject`: a step is a generation, the reading of its prompts included."""

    def __init__(self, spec: Spec):
        """Reads the configuration; nothing is computed yet."""
        self._config = machine.restored(spec.config)
        self._rows, self._length = self._config.data.batch_size, self._config.data.sequence_length
        self._new = self._length // 2

    def build(self) -> dict[str, Any]:
        """Makes a model and generates once."""
        decoder, _ = build_model(self._config)
        self._model = random_model(decoder, self._config)
        shape = (self._rows, self._length - self._new)
        self._prompts = np.random.default_rng(self._config.seed).integers(0, self._config.model.vocab_size, shape)
        start = time.perf_counter()
        self.step()
        compiled_in = time.perf_counter() - start
        start = time.perf_counter()
        self.step()
        keys = self._length - self._timed / 2
        return {
            **machine.devices(),
            "compile_seconds": compiled_in - (time.perf_counter() - start),
            "tokens": self._rows * self._new,
            "flops": decode_step_flops(decoder.architecture, decoder.layout, self._rows, keys),
            "bytes": decode_step_bytes(decoder, self._model.params, self._rows, keys),
            "limit_of": "memory, read",
        }

    def step(self) -> None:
        """Generates; nothing is left to wait for."""
        self._started().step(self._new)

    def wait(self) -> None:
        """Nothing is left to wait for."""

    def token(self) -> float:
        """Seconds in which one token is decoded for every row, over the last three quarters of them."""
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

    @property
    def _timed(self) -> int:
        return math.ceil(self._new * 3 / 4)

    def _started(self) -> Engine:
        """An engine that has read the prompts."""
        engine = Engine(self._model, slots=self._rows)
        engine.add([Request(prompt, self._new) for prompt in self._prompts.tolist()])
        return engine


def random_model(decoder: Decoder, config) -> Model:
    """A model with random weights, as `flexolmo_jax.load` would hold it, in the dtype of the computation."""
    names = [ANCHOR_NAME, *(f"expert{i}" for i in range(1, decoder.layout.num_experts))]
    manifest = ModelManifest(
        architecture=dataclasses.asdict(decoder.architecture),
        experts=[ExpertRecord(name=name, leaves={}, card={}) for name in names],
        shared={},
        top_k=decoder.layout.top_k,
        tokenizer_digest="",
        eos_id=NO_TOKEN,
    )
    model = Model(manifest, {}, dtype=config.compute.dtype)
    # One leaf at a time: a program that initializes all of them takes three times their memory.
    rng, dtype = np.random.default_rng(config.seed), config.compute.dtype
    for path, leaf in model.decoder.abstract().items():
        if path.endswith("scale"):
            model.params[path] = jnp.ones(leaf.shape, dtype)
        else:
            values = rng.standard_normal(leaf.shape, np.float32)
            values *= INIT_STDDEV
            model.params[path] = jnp.asarray(values, dtype)
    return model


def decode_step_bytes(decoder: Decoder, params: dict[str, jax.Array], rows: int, keys: float) -> float:
    """Bytes that decoding one token for each row must read: weights, and what the cache holds of `keys` positions.

    Of the embedding that is a row each; of stacked experts those that the rows' tokens choose, as many as independent
    choices would reach.
    """
    arch, layout = decoder.architecture, decoder.layout
    reached = 1 - (1 - layout.top_k / layout.num_experts) ** rows
    looked_up = not arch.tied_embeddings
    weights = sum(
        leaf.nbytes * (reached if "/experts/" in path else 1)
        for path, leaf in params.items()
        if not (looked_up and path == "embedding")
    )
    itemsize = params["embedding"].itemsize
    cache = 2 * arch.num_layers * arch.num_kv_heads * arch.head_dim * itemsize
    return weights + rows * (keys * cache + looked_up * arch.d_model * itemsize)
