"""The one training loop: anchor, expert, router tuning and joint training differ in data and partition alone."""

import contextlib
import itertools
import json
import signal
from collections.abc import Callable, Iterator
from typing import Any

import jax
from etils import epath
from flax.traverse_util import flatten_dict
from jax.sharding import NamedSharding
from ml_collections import ConfigDict

from flexolmo_jax import sharding
from flexolmo_jax.checkpoint import directories
from flexolmo_jax.checkpoint.manager import Checkpoints
from flexolmo_jax.checkpoint.tree import combined_digest
from flexolmo_jax.checkpoint.verify import check_model, open_model
from flexolmo_jax.data.pipeline import Batch, evaluation_batches, training_batches
from flexolmo_jax.errors import UserError
from flexolmo_jax.training.inputs import Inputs, read_inputs
from flexolmo_jax.training.metrics import Reporter
from flexolmo_jax.training.program import abstract_batch, configured_step
from flexolmo_jax.training.publish import publish
from flexolmo_jax.training.state import initial_leaves, initial_state, shardings
from flexolmo_jax.training.step import Leaves, compile_step, make_loss_step

CONFIG_FILE = "config.json"
# What may differ when a run is resumed: where it runs and what it keeps, not what it computes.
MAY_CHANGE = ("mesh", "sharding_rules", "checkpoint", "log")


def train(config: ConfigDict, workdir: epath.PathLike) -> epath.Path | None:
    """Trains what the configuration describes, going on from the last checkpoint in `workdir`.

    Returns:
      The product, `workdir/model` or `workdir/contribution`; None after SIGTERM, which saves a
      checkpoint first, so that the same call goes on from there.

    Raises:
      UserError: the configuration, the data, the start or the workdir is not fit for this run.
    """
    if jax.process_count() > 1:
        raise UserError(f"train: {jax.process_count()} processes; a run is one process with all of its devices")
    workdir = epath.Path(workdir)
    inputs = read_inputs(config)
    mesh = sharding.make_mesh(config.mesh)
    where = shardings(inputs, mesh, config.sharding_rules)
    optimizer, train_step = configured_step(config, inputs.model)
    abstract = abstract_batch(config, mesh)
    batch_sharding = abstract["tokens"].sharding
    record = _describe(config, inputs)
    _check_workdir(workdir, record)
    product = workdir / ("contribution" if config.expert else "model")
    if product.exists():
        return product

    with jax.set_mesh(mesh), Checkpoints(workdir / "checkpoints", config.checkpoint.keep) as checkpoints:
        first = checkpoints.latest_step() or 0
        if inputs.manifest and not first:
            source = f"--config.start_from={config.start_from}"
            check_model(inputs.manifest, *open_model(config.start_from, inputs.manifest, source))
        trainable, frozen = initial_leaves(config, inputs, where)
        _claim(workdir, record)
        state = initial_state(trainable, optimizer, mesh)
        batches = training_batches(inputs.corpora, config.data.sequence_length, config.data.batch_size, config.seed)
        if first:
            state, position = checkpoints.restore(first, state)
            batches.set_state(position)

        train_step = compile_step(train_step, state, frozen, abstract)
        loss_step = jax.jit(make_loss_step(inputs.model))
        reporter = Reporter(workdir, config, inputs.roster, first)
        with reporter, _sigterm() as terminated, jax.transfer_guard("disallow"):
            for step in range(first + 1, config.steps + 1):
                state, metrics = train_step(state, frozen, _place(next(batches), batch_sharding))
                reporter.step(step, metrics)
                done = step == config.steps
                if inputs.held_out and (done or (config.evaluation.every and step % config.evaluation.every == 0)):
                    params = {**frozen, **state.trainable}
                    reporter.evaluation(step, _held_out_losses(config, inputs, loss_step, params, batch_sharding))
                stop = terminated()
                if stop or done or step % config.checkpoint.every == 0:
                    reporter.flush()  # before the checkpoint is there: a rerun reports only the steps after it
                    checkpoints.save(step, state, batches.get_state())
                if stop and not done:
                    return None
        return publish(product, config, inputs, {**frozen, **state.trainable})


def _held_out_losses(
    config: ConfigDict, inputs: Inputs, loss_step: Callable, params: Leaves, batch_sharding: NamedSharding
) -> dict[str, float]:
    """Mean nats per token of each held-out corpus (its first `config.evaluation.batches` batches)."""
    losses = {}
    for label, corpus in inputs.held_out.items():
        batches = evaluation_batches(corpus, config.data.sequence_length, config.data.batch_size)
        batches = itertools.islice(batches, config.evaluation.batches or None)
        sums = jax.device_get([loss_step(params, _place(batch, batch_sharding)) for batch in batches])
        losses[label] = sum(float(s["cross_entropy"]) for s in sums) / sum(float(s["tokens"]) for s in sums)
    return losses


def _place(batch: Batch, batch_sharding: NamedSharding) -> dict[str, jax.Array]:
    """Puts a global batch on the devices; each takes its own rows."""
    with jax.transfer_guard("allow"):
        return {
            name: jax.make_array_from_callback(rows.shape, batch_sharding, rows.__getitem__)
            for name, rows in batch.items()
        }


def _describe(config: ConfigDict, inputs: Inputs) -> dict[str, Any]:
    """What `config.json` records: the configuration, and the content of what its paths name."""
    corpora = itertools.chain(*(group for group, _ in inputs.corpora), inputs.held_out.values())
    files = {f"{corpus.path}/{file['name']}": file["sha256"] for corpus in corpora for file in corpus.files}
    return {
        **json.loads(config.to_json()),
        "content of start_from": _start_digest(inputs.manifest) if inputs.manifest else "",
        "content of the corpora": combined_digest(files),
    }


def _check_workdir(workdir: epath.Path, record: dict[str, Any]) -> None:
    """Raises UserError when the workdir holds another run."""
    file = workdir / CONFIG_FILE
    if not file.exists():
        return
    try:
        before = flatten_dict(json.loads(file.read_text()), sep=".")
    except (ValueError, AssertionError):
        raise UserError(f"{file}: damaged; remove the workdir to start anew") from None
    record = flatten_dict(record, sep=".")
    changed = sorted(
        key
        for key in record.keys() | before.keys()
        if key.split(".")[0] not in MAY_CHANGE and record.get(key) != before.get(key)
    )
    if changed:
        raise UserError(
            f"--workdir={workdir}: holds another run (config.json differs in: {', '.join(changed)}); "
            "name another workdir, or repeat that run's flags"
        )


def _claim(workdir: epath.Path, record: dict[str, Any]) -> None:
    """Writes `config.json`, unless the run has it already."""
    file = workdir / CONFIG_FILE
    if not file.exists():
        temporary = file.with_name(f".{CONFIG_FILE}.incomplete")
        temporary.write_text(json.dumps(record, indent=2) + "\n")
        temporary.replace(file)


def _start_digest(manifest: directories.Model) -> str:
    """Of all leaves of all experts, whatever the path of the model directory."""
    return combined_digest({**manifest.shared, **{expert.name: expert.digest for expert in manifest.experts}})


@contextlib.contextmanager
def _sigterm() -> Iterator[Callable[[], bool]]:
    """Yields a function that says whether SIGTERM has come; the step under way is finished first."""
    received = []
    before = signal.signal(signal.SIGTERM, lambda *_: received.append(True))
    try:
        yield lambda: bool(received)
    finally:
        signal.signal(signal.SIGTERM, before)
