"""Reports the metrics of a run: metrics.jsonl, TensorBoard, and a progress bar."""

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter

from flexolmo_jax import distributed
from flexolmo_jax.checkpoint.train_state import Best
from flexolmo_jax.errors import UserError
from flexolmo_jax.progress import progress_bar

METRICS_FILE = "metrics.jsonl"
LOG_LINES_EVERY = 10  # lines of metrics.jsonl for one line in a log


class TooManySkippedError(UserError):
    """A run stops after steps that were skipped; its state is that before them, and can be saved."""


class Reporter:
    """Reports the steps of one run: on disk, and as a progress bar or, in a log, a line now and then.

    Of a run with several processes the first one reports; the others wait for each step as it does.
    """

    def __init__(
        self,
        workdir: epath.Path,
        title: str,
        roster: Sequence[str],
        steps: int,
        every: int,
        first: int,
        skip_steps: int = 0,
    ):
        """Opens the logs in `workdir`, to resume after step `first`.

        Lines of later steps, left by a run that was killed after its last checkpoint, are dropped.

        Args:
          workdir: gets `metrics.jsonl` and `tensorboard/`.
          title: of the progress bar.
          roster: expert names, for the routing shares.
          steps: of the whole run.
          every: steps between lines of the logs; the first and the last step always have one.
          first: the step resumed from, or 0.
          skip_steps: how many consecutive steps may be skipped.
        """
        self._title, self._roster, self._steps, self._every = title, roster, steps, every
        self._skip_steps = skip_steps
        self._pending: tuple[int, Any] | None = None
        self._tokens, self._since = 0.0, time.perf_counter()
        self._file = workdir / METRICS_FILE
        self._reports = distributed.is_primary()
        if self._reports and self._file.exists():
            kept = [line for line in self._file.read_text().splitlines() if _step_of(line) <= first]
            temporary = self._file.with_name(f".{METRICS_FILE}.incomplete")
            temporary.write_text("".join(f"{line}\n" for line in kept))
            temporary.replace(self._file)
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=first + 1, write_to_disk=self._reports)
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[summary]}"), TimeRemainingColumn())
        self._bar = progress_bar(TextColumn("{task.description}"), *columns)
        self._task = self._bar.add_task(self._title, total=steps, completed=first, summary="")
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
        if self._was_skipped(step, metrics):
            return
        self._tokens += float(metrics["tokens"])
        if step % self._every and step not in (1, self._steps):
            return
        shares = np.atleast_1d(metrics.pop("routing_E"))
        scalars = {name: float(value) for name, value in metrics.items()}
        scalars |= {f"routing/{name}": float(share) for name, share in zip(self._roster, shares, strict=True)}
        now = time.perf_counter()
        scalars["tokens_per_second"] = self._tokens / max(now - self._since, 1e-9)
        self._tokens, self._since = 0.0, now
        self._write(step, scalars)
        if not self._reports:
            return
        summary = f"loss {scalars['loss']:.3f}  {scalars['tokens_per_second']:,.0f} tokens/s"
        self._bar.update(self._task, completed=step, summary=summary)
        if self._bar.disable and (step == self._steps or step % (self._every * LOG_LINES_EVERY) == 0):
            self._bar.console.print(f"{self._title} {step}/{self._steps} {summary}")

    def _was_skipped(self, step: int, metrics: dict[str, Any]) -> bool:
        """Whether the step changed nothing, which is reported; raises what `flush` does."""
        consecutive = int(metrics.get("consecutive_skipped", 0))
        if not consecutive:
            self._check_finite(step, metrics)
            return False
        if consecutive > self._skip_steps:
            raise TooManySkippedError(
                f"step {step}: {consecutive} consecutive steps have a loss or a gradient norm that is not finite, or a "
                f"spike (loss {metrics['loss']:.4g}, norm {metrics['gradient_norm']:.4g}); stopped, and the state is "
                "saved as it was before them: check the data, or lower config.optimizer.learning_rate, in a new workdir"
            )
        self._write(step, {name: float(metrics[name]) for name in ("skipped", "consecutive_skipped")})
        return True

    def evaluation(self, step: int, losses: Mapping[str, float], best: Best | None = None) -> None:
        """Reports held-out losses; the time they took does not count as that of training.

        Args:
          step: after which they were computed.
          losses: {label: nats per token}.
          best: the best evaluation so far, this one included, where a run keeps it.
        """
        self.flush()
        self._check_finite(step, {f"the held-out loss of {label}": nats for label, nats in losses.items()})
        of_best = {"best_step": best.step, "best_loss": best.loss} if best else {}
        self._write(step, {f"evaluation/{label}": nats for label, nats in losses.items()} | of_best)
        self._tokens, self._since = 0.0, time.perf_counter()

    def _check_finite(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Stops a run that has diverged; names the loss and the gradient's norm before what follows from them."""
        for name in sorted(metrics, key=lambda name: (name != "loss", name != "gradient_norm")):
            if not np.isfinite(metrics[name]).all():
                raise UserError(
                    f"step {step}: {name} is not finite ({metrics[name]}); stopped, and the checkpoints of earlier "
                    "steps are kept: check the data, or lower config.optimizer.learning_rate, in a new workdir"
                )

    def _write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Appends one line to metrics.jsonl, and a TensorBoard point for each scalar."""
        if not self._reports:
            return
        with self._file.open("a") as file:
            file.write(json.dumps({"step": step, **scalars}) + "\n")
        for name, value in scalars.items():
            self._board.add_scalar(name, value, step)

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(self, *exception) -> None:
        """Reports the last step, ends the progress bar, and closes the logs."""
        try:
            if exception[0] is None:
                self.flush()
        finally:
            self._bar.stop()
            self._board.close()


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")  # the torn last line of a run that was killed
