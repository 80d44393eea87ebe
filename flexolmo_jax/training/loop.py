"""The training loop: anchor, expert, router tuning and joint training differ in their data and partition only."""

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
from etils import epath
from jax.sharding import NamedSharding
from ml_collections import ConfigDict

from flexolmo_jax import distributed
from flexolmo_jax.checkpoint.digests import document_digest
from flexolmo_jax.checkpoint.model_directory import check_model, open_model
from flexolmo_jax.checkpoint.train_state import Best, Checkpoints, latest_whole_step
from flexolmo_jax.data.batches.pipeline import EvaluationBatches, TrainingBatches
from flexolmo_jax.data.corpus import Corpus, verify_corpora
from flexolmo_jax.errors import UserError
from flexolmo_jax.model.flops import train_step_flops
from flexolmo_jax.model.loss import make_loss_step
from flexolmo_jax.training import workdir as workdirs
from flexolmo_jax.training.clock import Clock
from flexolmo_jax.training.inputs import placed_batches
from flexolmo_jax.training.metrics import Reported, Reporter, TooManySkippedError
from flexolmo_jax.training.profile import PROFILE, Profile
from flexolmo_jax.training.publish import publish
from flexolmo_jax.training.run import Run, read_run
from flexolmo_jax.training.state import initial_leaves
from flexolmo_jax.training.step import Leaves, compile_step, initial_state
from flexolmo_jax.training.watchdog import Watchdog


def train(config: ConfigDict, workdir: epath.PathLike, *, verify: bool = False) -> epath.Path | None:
    """Trains what the configuration describes, resuming from the last checkpoint in `workdir`.

    Args:
      config: of the run.
      workdir: its directory, in which one run at a time may work, and which all its processes see.
      verify: compare every token file with its digest before anything else; without it the corpora trained on are
        compared before the output is written.

    Returns:
      The output, `workdir/model` or `workdir/contribution`; None after SIGTERM, which saves a
      checkpoint first, so that the same call resumes from there.

    Raises:
      TypeError: the configuration is no `ConfigDict`.
      UserError: the configuration (`ArgumentError`, a ValueError), the data, the start or the workdir is not fit for
        this run, or a value is not finite.
      ProcessesError: of the processes of the run, some are lost, or disagree.
    """
    workdir = epath.Path(workdir)
    workdirs.check_place(workdir)
    if jax.process_count() != distributed.count():
        raise UserError(
            f"train: the devices belong to {jax.process_count()} processes, which have not joined; give distributed, "
            "or call flexolmo_jax.distributed.start first"
        )
    with distributed.agreed("configuration"):
        run = read_run(config)
    _check_alike(run)
    output = _finished(run, workdir)
    if output:
        return output
    try:
        with workdirs.handle_sigterm() as sigterm, workdirs.locked(workdir), jax.set_mesh(run.program.mesh):
            output = _finished(run, workdir)  # of the run that had the lock until now
            return output or _train(run, workdir, sigterm, verify)
    except workdirs.Terminated:
        return None


def _check_alike(run: Run) -> None:
    """All processes have read the same configuration and data."""
    digests = distributed.gather("configuration", document_digest(run.record))
    others = [str(process) for process, digest in enumerate(digests) if digest != digests[0]]
    if others:
        raise UserError(
            f"config: process {', '.join(others)} has read another configuration or other data than process 0; all of "
            "them need the same"
        )


def _finished(run: Run, workdir: epath.Path) -> epath.Path | None:
    """The output of a run that has ended, as process 0 sees it."""

    def find() -> str | None:
        output = workdirs.finished(workdir, run.record)
        return output and os.fspath(output)

    output = distributed.from_primary("finished", find)
    return epath.Path(output) if output else None


def _train(run: Run, workdir: epath.Path, sigterm: workdirs.Sigterm, verify: bool) -> epath.Path | None:
    """Trains from the last checkpoint on, in a locked workdir; returns the output, or None after SIGTERM."""
    program, data, start, clock = run.program, run.data, run.start, Clock()
    if verify:
        distributed.from_primary("corpora", lambda: verify_corpora([*data.training, *data.held_out.values()]))
    for warning in run.warnings if distributed.is_primary() else ():
        sys.stderr.write(f"{warning}\n")
    batches = data.batches()
    batch_sharding = program.batch["tokens"].sharding
    folder = workdir / workdirs.CHECKPOINTS
    first = distributed.from_primary("checkpoint", lambda: latest_whole_step(folder, _position(0))) or 0
    with distributed.agreed("start"):
        if start:
            check_model(start.manifest, *open_model(start.path, start.manifest))
        trainable, frozen = initial_leaves(
            program.model, program.state.trainable, program.frozen, start, run.initialization
        )
    state = initial_state(trainable, program.optimizer, program.state)
    train_step = compile_step(program.step, state, frozen, program.batch)
    evaluate = functools.partial(_evaluate, run, jax.jit(make_loss_step(program.model)), batch_sharding)
    # Once all have compiled: the collectives of some devices fail where processes come to them far apart.
    distributed.from_primary("claim", lambda: workdirs.claim(workdir, run.record))

    publication, best = run.publication, None
    with (
        contextlib.ExitStack() as until_saved,
        Checkpoints(folder, run.checkpoint.keep) as checkpoints,
    ):
        if first:
            state, position = checkpoints.restore(first, state)
            first, best = position["step"], checkpoints.best
        inputs = placed_batches(batches, batch_sharding, range(first, run.steps), data.prefetch)
        until_saved.enter_context(contextlib.closing(inputs))
        until_saved.enter_context(sigterm.waiting())
        step = first
        reporter, watchdog = Reporter(workdir, _reported(run, batches), first, clock), Watchdog(run.faults.step_timeout)
        profile = Profile(workdir / PROFILE, run.profile.first, run.profile.steps)
        clock.has_started()
        saving = _saving_after_skips(lambda: checkpoints.save(step, state, _position(step), best))
        with reporter, watchdog, profile, jax.transfer_guard("disallow"), saving:
            while not _is_done(run, step, best):
                step += 1
                watchdog.beat(step)
                profile.begins(step)
                with clock.spending("data"):
                    batch = next(inputs)
                state, metrics = train_step(state, frozen, batch)
                reporter.step(step, metrics)
                if data.held_out and (step == run.steps or (run.evaluation.every and step % run.evaluation.every == 0)):
                    reporter.flush()  # so that the step's rate does not include the evaluation
                    with clock.spending("evaluation"):
                        losses = evaluate({**frozen, **state.trainable})
                    best = _better(run, best, step, losses)
                    reporter.evaluation(step, losses, best)
                stop, done = sigterm.asks_to_stop(step), _is_done(run, step, best)
                is_best = best is not None and best.step == step
                if stop or done or is_best or step % run.checkpoint.every == 0:
                    # Before the checkpoint is there: a rerun reports only the steps after it, and no checkpoint is of
                    # a step whose metrics are not finite.
                    reporter.store()
                    with clock.spending("checkpoint"):
                        checkpoints.save(step, state, _position(step), best)
                if stop and not done:
                    return None
        if best:
            if distributed.is_primary():
                name = publication.expert or "model"
                sys.stderr.write(
                    f"{name}: step {best.step} of {step} is the best, with held-out loss {best.loss:.4f}\n"
                )
            tokens = best.step * data.tokens_per_step
            card = {**publication.card, "trained_tokens": tokens, "best_step": best.step}
            publication = publication._replace(card=card)
            if best.step != step:
                del state  # so that there is never room needed for two
                state = checkpoints.restore_checked(best.step, program.state, _position(step))

    if not verify:
        # What is held out chooses what is published, where the best is kept.
        used = [*data.training, *(data.held_out.values() if best else ())]
        distributed.from_primary("corpora", lambda: _verify_used(used, workdir))
    name = workdirs.CONTRIBUTION if publication.expert else workdirs.MODEL
    return publish(workdir / name, {**frozen, **state.trainable}, publication)


def _position(step: int) -> dict[str, int]:
    """The data position after a step: the batch of a step is a function of its number."""
    return {"step": step}


def _reported(run: Run, batches: TrainingBatches) -> Reported:
    """What the reports of a run go by."""
    model, data = run.program.model, run.data
    return Reported(
        title=run.publication.expert or "model",
        roster=run.roster,
        steps=run.steps,
        every=run.log.every,
        by_layer=run.log.by_layer,
        skip_steps=run.faults.skip_steps,
        flops=train_step_flops(
            model.architecture, model.layout, run.program.trainable, data.batch_size, data.sequence_length
        ),
        wandb=run.log.wandb,
        data=batches.taken,
    )


@contextlib.contextmanager
def _saving_after_skips(save: Callable[[], None]) -> Iterator[None]:
    """Saves the state where too many consecutive steps were skipped: it is as if they had not been taken."""
    try:
        yield
    except TooManySkippedError:
        save()
        raise


def _verify_used(corpora: Sequence[Corpus], workdir: epath.Path) -> None:
    """As `verify_corpora`, after the training: where one is damaged the run may never give an output."""
    try:
        verify_corpora(corpora)
    except UserError as error:
        raise workdirs.refuse_output(workdir, error) from None


def _better(run: Run, best: Best | None, step: int, losses: Mapping[str, float]) -> Best | None:
    """The best evaluation after one more; of equal ones the first, and None where the run keeps none."""
    if not run.evaluation.keep_best:
        return None
    loss = sum(losses.values()) / len(losses)
    return Best(step, loss) if best is None or loss < best.loss else best


def _is_done(run: Run, step: int, best: Best | None) -> bool:
    """Whether a run ends after a step: its last one, or `patience` evaluations without a lower loss."""
    patience = run.evaluation.patience * run.evaluation.every
    return step == run.steps or (patience > 0 and best is not None and step - best.step >= patience)


def _evaluate(run: Run, loss_step: Callable, batch_sharding: NamedSharding, params: Leaves) -> dict[str, float]:
    """Mean nats per token of each held-out corpus, or of its first `evaluation.batches` batches (0: all)."""
    losses = {}
    for label, corpus in run.data.held_out.items():
        batches = EvaluationBatches(corpus, run.data.sequence_length, run.data.batch_size)
        numbers = range(len(batches))[: run.evaluation.batches or None]
        placed = placed_batches(batches, batch_sharding, numbers, run.data.prefetch)
        sums = jax.device_get([loss_step(params, batch) for batch in placed])
        losses[label] = sum(float(s["cross_entropy"]) for s in sums) / sum(float(s["tokens"]) for s in sums)
    return losses
