"""The one training loop: anchor, expert, router tuning and joint training differ in data and partition alone."""

import contextlib
import itertools
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax
from etils import epath
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from flexolmo_jax import sharding
from flexolmo_jax.checkpoint.model_directory import check_model, open_model
from flexolmo_jax.checkpoint.train_state import Checkpoints, latest_whole_step
from flexolmo_jax.data.corpus import verify_corpora
from flexolmo_jax.data.pipeline import Batch, evaluation_batches, training_batches
from flexolmo_jax.errors import UserError
from flexolmo_jax.model.loss import make_loss_step
from flexolmo_jax.training import workdir as workdirs
from flexolmo_jax.training.inputs import Inputs, read_inputs
from flexolmo_jax.training.metrics import Reporter
from flexolmo_jax.training.optimizer import warmup_steps
from flexolmo_jax.training.program import abstract_batch, configured_step
from flexolmo_jax.training.publish import publish
from flexolmo_jax.training.state import initial_leaves, initial_state, shardings
from flexolmo_jax.training.step import Leaves, compile_step
from flexolmo_jax.training.termination import Sigterm, Terminated, handle_sigterm

CHECKPOINTS = "checkpoints"  # in a workdir


def train(config: ConfigDict, workdir: epath.PathLike, *, verify: bool = False) -> epath.Path | None:
    """Trains what the configuration describes, going on from the last checkpoint in `workdir`.

    Args:
      config: the run's.
      workdir: its directory, which one run at a time may be at work in.
      verify: compare every token file with its digest before anything else; without it the corpora trained on are
        compared before the output is written.

    Returns:
      The output, `workdir/model` or `workdir/contribution`; None after SIGTERM, which saves a
      checkpoint first, so that the same call goes on from there.

    Raises:
      UserError: the configuration, the data, the start or the workdir is not fit for this run, or a value is not
        finite.
    """
    if jax.process_count() > 1:
        raise UserError(f"train: {jax.process_count()} processes; a run is one process with all of its devices")
    workdir = epath.Path(workdir)
    inputs = read_inputs(config)
    program = _program(config, inputs)
    record = workdirs.describe(config, inputs)
    output = workdir / ("contribution" if config.expert else "model")
    if workdirs.finished(workdir, record, inputs, output):
        return output
    try:
        with handle_sigterm() as sigterm, workdirs.locked(workdir), jax.set_mesh(program.mesh):
            if workdirs.finished(workdir, record, inputs, output):  # by whom had the lock until now
                return output
            if verify:
                verify_corpora([*inputs.training_corpora, *inputs.held_out.values()])
            leaves = _steps(config, inputs, program, workdir, record, sigterm)
            if leaves is None:
                return None
            if not verify:
                _verify_before_output(workdir, inputs)
            return publish(output, config, inputs, leaves)
    except Terminated:
        return None


class _Program(NamedTuple):
    """What a configuration computes, and where."""

    mesh: Mesh
    shardings: dict[str, NamedSharding]
    optimizer: optax.GradientTransformation
    train_step: Callable
    batch: dict[str, jax.ShapeDtypeStruct]


def _program(config: ConfigDict, inputs: Inputs) -> _Program:
    mesh = sharding.make_mesh(config.mesh)
    optimizer, train_step = configured_step(config, inputs.model)
    where = shardings(inputs, mesh, config.sharding_rules)
    return _Program(mesh, where, optimizer, train_step, abstract_batch(config, mesh))


def _steps(
    config: ConfigDict,
    inputs: Inputs,
    program: _Program,
    workdir: epath.Path,
    record: dict[str, Any],
    sigterm: Sigterm,
) -> Leaves | None:
    """Takes the steps that are left; returns all leaves after the last one, or None after SIGTERM."""
    rise = warmup_steps(config.optimizer, config.steps)
    if rise != config.optimizer.warmup_steps:
        given = f"--config.optimizer.warmup_steps={config.optimizer.warmup_steps}"
        sys.stderr.write(
            f"{given}: no shorter than the run; the learning rate rises for {rise} of {config.steps} steps\n"
        )
    batches = training_batches(inputs.corpora, config.data.sequence_length, config.data.batch_size, config.seed)
    batch_sharding = program.batch["tokens"].sharding
    first = latest_whole_step(workdir / CHECKPOINTS, batches.get_state()) or 0
    with (
        contextlib.ExitStack() as until_saved,
        Checkpoints(workdir / CHECKPOINTS, config.checkpoint.keep) as checkpoints,
    ):
        if inputs.manifest:
            check_model(inputs.manifest, *open_model(config.start_from, inputs.manifest))
        trainable, frozen = initial_leaves(config, inputs, program.shardings)
        workdirs.claim(workdir, record)
        state = initial_state(trainable, program.optimizer, program.mesh)
        if first:
            state, position = checkpoints.restore(first, state)
            batches.set_state(position)

        train_step = compile_step(program.train_step, state, frozen, program.batch)
        loss_step = jax.jit(make_loss_step(inputs.model))
        reporter = Reporter(workdir, config, inputs.roster, first)
        until_saved.enter_context(sigterm.waiting())
        with reporter, jax.transfer_guard("disallow"):
            for step in range(first + 1, config.steps + 1):
                state, metrics = train_step(state, frozen, _place(next(batches), batch_sharding))
                reporter.step(step, metrics)
                done = step == config.steps
                if inputs.held_out and (done or (config.evaluation.every and step % config.evaluation.every == 0)):
                    params = {**frozen, **state.trainable}
                    reporter.evaluation(step, _held_out_losses(config, inputs, loss_step, params, batch_sharding))
                stop = sigterm.received
                if stop or done or step % config.checkpoint.every == 0:
                    # Before the checkpoint is there: a rerun reports only the steps after it, and none is of a
                    # step whose figures are not finite.
                    reporter.flush()
                    checkpoints.save(step, state, batches.get_state())
                if stop and not done:
                    return None
    return {**frozen, **state.trainable}


def _verify_before_output(workdir: epath.Path, inputs: Inputs) -> None:
    """Compares the corpora trained on with their digests; where one differs the run never gives an output."""
    try:
        verify_corpora(inputs.training_corpora)
    except UserError as error:
        raise workdirs.refuse_output(workdir, error) from None


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
