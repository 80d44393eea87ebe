"""Tiny corpora and tiny runs, shared by the tests of training; each is made once, whatever the number of workers."""

import contextlib
import fcntl
import functools
import importlib
import json
import os
import pathlib
import re
import signal
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple
from unittest import mock

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax.serialization import msgpack_restore, msgpack_serialize
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import ConfigDict

from flexolmo_jax import cli, sharding
from flexolmo_jax.checkpoint.model_directory import open_params
from flexolmo_jax.checkpoint.params import read_block
from flexolmo_jax.checkpoint.train_state import Checkpoints
from flexolmo_jax.combine.merge import merge
from flexolmo_jax.data.corpus import Corpus
from flexolmo_jax.data.corpus_writer import write_corpus
from flexolmo_jax.data.tokenization.tokenizer import byte_tokenizer
from flexolmo_jax.training import loop
from flexolmo_jax.training.metrics import Reporter

ROOT = pathlib.Path(__file__).parents[2]
# Of a process that needs the package and no torch.
PYTHONPATH = os.pathsep.join(map(str, (ROOT, ROOT / "tests" / "support" / "without_torch")))
STEPS, EVERY = 12, 3
# Metrics of the machine and of its clock.
OF_MACHINE = re.compile(r"time$|tokens_per_second|step_seconds|seconds/|goodput|memory/|flops_per_second|mfu")

# Over configs/*.py:tiny, as the command line would give them.
TINY = {
    "model.num_layers": 2,
    "model.d_model": 32,
    "model.num_heads": 2,
    "model.num_kv_heads": 2,
    "model.d_ff": 48,
    "steps": STEPS,
    "data.sequence_length": 32,
    "data.batch_size": 8,
    "optimizer.warmup_steps": 2,
    "optimizer.weight_decay": 0.1,
    "checkpoint.every": EVERY,
    "log.every": 1,
}


def write_words(path, seed: int, documents: int = 48) -> Corpus:
    """Writes a corpus of words drawn from twelve made-up ones; another seed has other words."""
    rng = np.random.default_rng(seed)
    words = ["".join(chr(97 + letter) for letter in rng.integers(0, 26, size)) for size in rng.integers(2, 7, 12)]
    texts = [" ".join(rng.choice(words, size)) for size in rng.integers(3, 30, documents)]
    with once(path) as is_there:
        return Corpus.open(path) if is_there else write_corpus(path, texts, byte_tokenizer())


def make_config(name: str, **overrides):
    """configs/NAME.py:tiny made tinier; overrides are `section__key=value`."""
    config = importlib.import_module(f"configs.{name}").get_config("tiny")
    config.update_from_flattened_dict(TINY | {key.replace("__", "."): value for key, value in overrides.items()})
    return config


def as_flags(name: str, **overrides) -> list[str]:
    """The same as `make_config`, as flags of `flexolmo train`."""
    values = TINY | {key.replace("__", "."): value for key, value in overrides.items()}
    return [f"--config=configs/{name}.py:tiny", *(f"--config.{key}={value}" for key, value in values.items())]


def read_metrics(workdir, of_machine: bool = False) -> list[dict]:
    """The lines of metrics.jsonl, without what differs from run to run unless `of_machine`."""
    lines = [json.loads(line) for line in (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()]
    return lines if of_machine else [{k: v for k, v in line.items() if not OF_MACHINE.match(k)} for line in lines]


def losses(workdir) -> dict[int, float]:
    """{step: loss}; a step that was reported twice is an error."""
    lines = [line for line in read_metrics(workdir) if "loss" in line]
    found = {line["step"]: line["loss"] for line in lines}
    assert len(found) == len(lines), "a step was reported twice"
    return found


class Run(NamedTuple):
    """A finished run: its configuration, workdir and output, and the leaves it ended with, {path: array}."""

    config: ConfigDict
    workdir: pathlib.Path
    output: pathlib.Path
    leaves: dict[str, np.ndarray]


def whole_leaves():
    """Orbax saves leaves whole inside; else it slices them for the devices with copies, and compiles every slice."""
    return mock.patch.object(ocp.type_handlers.get_type_handler(jax.Array), "_use_replica_parallel", False)


def train(config, workdir: pathlib.Path) -> Run:
    """Trains in this process, keeping the leaves that go to `publish`; a run that is there already is read."""
    file = workdir.with_suffix(".leaves")

    def publish(output, leaves, publication):
        file.write_bytes(msgpack_serialize(jax.device_get(leaves)))
        return original(output, leaves, publication)

    original = loop.publish
    with once(workdir), whole_leaves(), mock.patch.object(loop, "publish", publish):
        output = loop.train(config, workdir)
    return Run(config, workdir, pathlib.Path(output), msgpack_restore(file.read_bytes()))


@contextlib.contextmanager
def one_device():
    """Runs inside train on the first device alone: a step without collectives compiles in two thirds of the time."""
    make_mesh = sharding.make_mesh
    with mock.patch.object(sharding, "make_mesh", lambda sizes, _: make_mesh(sizes, jax.devices()[:1])):
        yield


@contextlib.contextmanager
def once(path: pathlib.Path):
    """Lets one worker at a time make `path`; yields whether it is there."""
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield path.exists()


def read_params(directory) -> dict[str, np.ndarray]:
    """{path: array} of a model or a contribution."""
    stored = open_params(directory)
    return {path: read_block(leaf, (slice(None),) * len(leaf.shape), path) for path, leaf in stored.items()}


class Runs:
    """A small journey, each part made when first asked for: corpora, anchor, expert, merge, tuned router."""

    def __init__(self, root: pathlib.Path):
        """Keeps everything under `root`, compiled programs included, which subprocesses share."""
        self.root = root
        settings = {
            "jax_compilation_cache_dir": str(root / "compilations"),
            "jax_persistent_cache_min_compile_time_secs": 0,
            "jax_persistent_cache_min_entry_size_bytes": -1,
        }
        for name, value in settings.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        self.environment = {name.upper(): str(value) for name, value in settings.items()}

    @functools.cached_property
    def public(self) -> Corpus:
        return write_words(self.root / "corpora" / "public", 0)

    @functools.cached_property
    def private(self) -> Corpus:
        return write_words(self.root / "corpora" / "own", 1)

    @functools.cached_property
    def held_out(self) -> Corpus:
        return write_words(self.root / "held_out", 2, documents=11)

    @functools.cached_property
    def anchor(self) -> Run:
        return train(make_config("anchor", **self.anchor_values), self.root / "anchor")

    @functools.cached_property
    def expert(self) -> Run:
        return train(make_config("pair", **self.expert_values), self.root / "expert")

    @functools.cached_property
    def solo(self) -> Run:
        return train(make_config("expert", **self.expert_values), self.root / "solo")

    @functools.cached_property
    def merged(self) -> pathlib.Path:
        """The anchor with the expert."""
        anchor, contributions, out = self.anchor.output, [self.expert.output], self.root / "merged"
        with once(out) as is_there:
            if not is_there:
                merge(anchor, contributions, out, top_k=2, selection="router")
        return out

    @functools.cached_property
    def router(self) -> Run:
        return train(make_config("router", **self.router_values), self.root / "router")

    @property
    def anchor_values(self) -> dict:
        return {
            "data__train": str(self.public.path),
            "evaluation__data": f"{self.held_out.path},{self.private.path}",
            "evaluation__every": 8,
            "publish__public_documents": 20,
        }

    @property
    def expert_values(self) -> dict:
        return {
            "start_from": str(self.anchor.output),
            "expert": "news",
            "data__train": str(self.private.path),
            "evaluation__data": str(self.held_out.path),
            "evaluation__every": 6,
        }

    @property
    def router_values(self) -> dict:
        return {
            "start_from": str(self.merged),
            "data__train": str(self.public.path),
            "compute__frozen_dtype": "bfloat16",
            "optimizer__schedule": "wsd",
            "optimizer__decay_fraction": 0.5,
        }


@functools.cache
def journey(base: pathlib.Path) -> Runs:
    """The one journey under pytest's base directory, which the workers share."""
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "journey"
    (root / "corpora").mkdir(parents=True, exist_ok=True)
    return Runs(root)


def kill(event: str, at: int, checkpoint: int, arguments: Sequence[str]) -> None:
    """The command line of `flexolmo train`, which kills its process in the midst of training.

    Args:
      event: "step" (after step `at`) or "save" (as soon as the checkpoint of step `at` is under way).
      at: a step.
      checkpoint: a step; the kill waits until its checkpoint is there.
      arguments: of the command line, the workdir last.
    """
    sys.argv = ["flexolmo", *arguments]
    workdir = pathlib.Path(arguments[-1].removeprefix("--workdir="))

    def kill_at_step(self, step, *rest):
        original(self, step, *rest)
        if step == at:
            while not (workdir / "checkpoints" / str(checkpoint)).exists():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)

    owner = {"step": Reporter, "save": Checkpoints}[event]
    original = getattr(owner, event)
    setattr(owner, event, kill_at_step)
    cli.main()
