"""Reports the metrics of a run: metrics.jsonl, TensorBoard, Weights & Biases, and a progress bar."""

import hashlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import psutil
from etils import epath
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter

from flexolmo_jax import distributed
from flexolmo_jax.checkpoint.train_state import Best
from flexolmo_jax.chips import peak_flops
from flexolmo_jax.errors import UserError
from flexolmo_jax.progress import progress_bar
from flexolmo_jax.training.clock import Clock, began, seconds_of_steps
from flexolmo_jax.training.metrics_file import MetricsFile

LOG_LINES_EVERY = 10  # lines of metrics.jsonl for one line in a log
_GIB = 2**30


class TooManySkippedError(UserError):
    """A run stops after steps that were skipped; its state is that before them, and can be saved."""


class Reported(NamedTuple):
    """What a run's reports go by.

    Attributes:
      title: of the progress bar.
      roster: expert names, for the routing shares.
      steps: of the whole run.
      every: steps between lines of the logs; the first and the last step always have one.
      by_layer: whether the lines have the routing of each layer.
      skip_steps: how many consecutive steps may be skipped.
      flops: of a step, as `model.flops` counts them.
      wandb: project of Weights & Biases; "": none.
      data: what the first steps have taken of each source of data, {label: (tokens, epochs)}.
    """

    title: str
    roster: Sequence[str]
    steps: int
    every: int
    by_layer: bool = False
    skip_steps: int = 0
    flops: float = 0.0
    wandb: str = ""
    data: Callable[[int], Mapping[str, tuple[int, float]]] = lambda steps: {}


class Reporter:
    """Reports the steps of one run: on disk, and as a progress bar or, in a log, a line now and then.

    Of a run with several processes the first one reports; the others wait for each step as it does.

    Attributes:
      clock: to be told what the run spends its time on.
    """

    def __init__(self, workdir: epath.Path, reported: Reported, first: int, clock: Clock | None = None):
        """Opens the logs in `workdir`, to resume after step `first`.

        Lines of later steps, left by a run that was killed after its last checkpoint, are dropped.

        Args:
          workdir: gets `metrics.jsonl` and `tensorboard/`.
          reported: what is reported.
          first: the step resumed from, or 0.
          clock: that runs since the run was started.
        """
        self._reported, self.clock = reported, clock or Clock()
        self._pending: tuple[int, Any] | None = None
        self._tokens, self._done_steps = 0.0, 0
        self._file = MetricsFile(workdir)
        self._reports = distributed.is_primary()
        kept, dropped = self._file.drop_later(first) if self._reports else ([], [])
        self.clock.spend("lost", seconds_of_steps(dropped))
        self._began, self._seconds_of_steps = began(kept), seconds_of_steps(kept)
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=first + 1, write_to_disk=self._reports)
        self._wandb = _start_wandb(reported, workdir) if reported.wandb and self._reports else None
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[summary]}"), TimeRemainingColumn())
        self._bar = progress_bar(TextColumn("{task.description}"), *columns)
        self._task = self._bar.add_task(reported.title, total=reported.steps, completed=first, summary="")
        if self._reports:
            self._bar.start()

    def step(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        """Takes the metrics of a step just dispatched, and reports the step before it, which is done."""
        self.flush()
        self._pending = (step, metrics)

    def flush(self) -> None:
        """Waits for the last step taken, and reports it.

        Raises:
          TooManySkippedError: more consecutive steps were skipped than may be.
          UserError: a metric of that step is not finite.
        """
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        metrics = jax.device_get(metrics)
        self._done_steps += 1
        if self._was_skipped(step, metrics):
            return
        self._tokens += float(metrics["tokens"])
        steps, every = self._reported.steps, self._reported.every
        if step % every and step not in (1, steps):
            return
        scalars = {**_of_routing(metrics, self._reported), **_of_data(self._reported.data(step)), **self._of_machine()}
        self._write(step, scalars)
        if not self._reports:
            return
        summary = f"loss {scalars['loss']:.3f}  {scalars['tokens_per_second']:,.0f} tokens/s"
        self._bar.update(self._task, completed=step, summary=summary)
        if self._bar.disable and (step == steps or step % (every * LOG_LINES_EVERY) == 0):
            self._bar.console.print(f"{self._reported.title} {step}/{steps} {summary}")

    def store(self) -> None:
        """Reports the last step, and sees to it that all lines are in metrics.jsonl."""
        self.flush()
        self._file.store()

    def evaluation(self, step: int, losses: Mapping[str, float], best: Best | None = None) -> None:
        """Reports held-out losses.

        Args:
          step: after which they were computed.
          losses: {label: nats per token}.
          best: the best evaluation so far, this one included, where a run keeps it.
        """
        self.flush()
        self._check_finite(step, {f"the held-out loss of {label}": nats for label, nats in losses.items()})
        of_best = {"best_step": best.step, "best_loss": best.loss} if best else {}
        self._write(step, {f"evaluation/{label}": nats for label, nats in losses.items()} | of_best)

    def _of_machine(self) -> dict[str, float]:
        """Rates, memory and where the time went, since the last line."""
        spent = self.clock.lap()
        seconds, steps = max(spent["seconds/steps"], 1e-9), max(self._done_steps, 1)
        self._seconds_of_steps += seconds
        now = time.time()
        self._began = min(self._began, now - sum(spent.values()) + spent["seconds/data"])
        metrics = {
            "tokens_per_second": self._tokens / seconds,
            "step_seconds": seconds / steps,
            **spent,
            "goodput": self._seconds_of_steps / max(now - self._began, 1e-9),
            "memory/host_gib": psutil.Process().memory_info().rss / _GIB,
        }
        of_devices = [device.memory_stats() or {} for device in jax.local_devices()]
        if peaks := [found["peak_bytes_in_use"] for found in of_devices if "peak_bytes_in_use" in found]:
            metrics["memory/device_peak_gib"] = max(peaks) / _GIB
        if self._reported.flops:
            metrics["flops_per_second"] = self._reported.flops * steps / seconds
            peak = peak_flops(jax.devices()[0].device_kind)
            if peak:
                metrics["mfu"] = metrics["flops_per_second"] / (peak * jax.device_count())
        self._tokens, self._done_steps = 0.0, 0
        return metrics

    def _was_skipped(self, step: int, metrics: dict[str, Any]) -> bool:
        """Whether the step changed nothing, which is reported; raises what `flush` does."""
        consecutive = int(metrics.get("consecutive_skipped", 0))
        if not consecutive:
            self._check_finite(step, metrics)
            return False
        if consecutive > self._reported.skip_steps:
            raise TooManySkippedError(
                f"step {step}: {consecutive} consecutive steps have a loss or a gradient norm that is not finite, or a "
                f"spike (loss {metrics['loss']:.4g}, norm {metrics['gradient_norm']:.4g}); stopped, and the state is "
                "saved as it was before them: check the data, or lower config.optimizer.learning_rate, in a new workdir"
            )
        self._write(step, {name: float(metrics[name]) for name in ("skipped", "consecutive_skipped")})
        return True

    def _check_finite(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Stops a run that has diverged; names the loss and the gradient's norm before what follows from them."""
        for name in sorted(metrics, key=lambda name: (name != "loss", name != "gradient_norm")):
            numbers = np.ravel(metrics[name])
            if not np.isfinite(numbers).all():
                number = numbers[~np.isfinite(numbers)][0]
                raise UserError(
                    f"step {step}: {name} is not finite ({number}); stopped, and the checkpoints of earlier "
                    "steps are kept: check the data, or lower config.optimizer.learning_rate, in a new workdir"
                )

    def _write(self, step: int, values: Mapping[str, float | list[float]]) -> None:
        """Appends one line to metrics.jsonl, and a point for each number to the others."""
        if not self._reports:
            return
        self._file.append({"step": step, "time": time.time(), **values})
        scalars = dict(_flat(values))
        for name, value in scalars.items():
            self._board.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log(scalars, step=step)

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(self, *exception) -> None:
        """Reports the last step, ends the progress bar, and closes the logs."""
        try:
            if exception[0] is None:
                self.flush()
        finally:
            self._bar.stop()
            self._file.store()
            self._board.close()
            if self._wandb:
                self._wandb.finish()


def _of_routing(metrics: dict[str, Any], reported: Reported) -> dict[str, float | list[float]]:
    """The metrics of a step, those of routing by expert and, where asked, by layer."""
    shares_LxE, entropy_L = np.asarray(metrics.pop("routing_LxE")), np.asarray(metrics.pop("router_entropy_L"))
    values: dict[str, float | list[float]] = {name: float(value) for name, value in metrics.items()}
    shares_E = np.mean(shares_LxE, axis=0)
    values |= {f"routing/{name}": float(share) for name, share in zip(reported.roster, shares_E, strict=True)}
    if len(reported.roster) > 1:
        values["router_entropy"] = float(np.mean(entropy_L))
        if reported.by_layer:
            values["layers/router_entropy"] = entropy_L.tolist()
            shares = zip(reported.roster, shares_LxE.T.tolist(), strict=True)
            values |= {f"layers/routing/{name}": share_L for name, share_L in shares}
    return values


def _of_data(taken: Mapping[str, tuple[int, float]]) -> dict[str, float]:
    """Tokens and epochs of each source of data so far."""
    tokens = {f"data/tokens/{label}": float(tokens) for label, (tokens, _) in taken.items()}
    return tokens | {f"data/epochs/{label}": epochs for label, (_, epochs) in taken.items()}


def _flat(values: Mapping[str, float | list[float]]) -> list[tuple[str, float]]:
    """Numbers by name; those of layers have the number of the layer at the end."""
    flat = []
    for name, value in values.items():
        if isinstance(value, list):
            flat += [(f"{name}/{layer:03}", of_layer) for layer, of_layer in enumerate(value)]
        else:
            flat.append((name, value))
    return flat


def _start_wandb(reported: Reported, workdir: epath.Path) -> Any:
    """A run of Weights & Biases, the same one whenever the workdir's run is resumed."""
    import wandb  # pyright: ignore[reportMissingImports]

    identity = hashlib.sha256(os.fspath(workdir).encode()).hexdigest()[:16]
    return wandb.init(project=reported.wandb, id=identity, name=reported.title, dir=os.fspath(workdir), resume="allow")
