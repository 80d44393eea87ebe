"""Runs a benchmark: one step after the other, its sides in turns."""

import contextlib
import itertools
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from configs.base import PARTITIONS
from flexolmo_jax.benchmark.processes import Process
from flexolmo_jax.benchmark.subject import Spec
from flexolmo_jax.errors import UserError
from flexolmo_jax.training.run import ANY_PLATFORM, build_model

OURS = "flexolmo"
STEPS = ("anchor", "expert", "joint", "router", "decode")
# Of transformers: each `experts_implementation`, as it is and through `torch.compile`.
VARIANTS = tuple(itertools.product(("eager", "grouped_mm", "batched_mm"), (False, True)))
DENSE = (("", False), ("", True))
PATIENCE = 600  # seconds in which transformers must have taken a first step
HOPELESS = 10  # times the fastest: what is so slow in its first step is measured no further
PAUSE = 0.5  # seconds between measurements, in which the threads of the one before come to rest
COMPILE, MEASURE = "compile", "measure"  # kinds of parts, which take their own time

Figures = dict[str, Any]
Say = Callable[[str, int, int, float | None], None]


def benchmark(
    config: ConfigDict,
    steps: Sequence[str],
    runs: int,
    versus: bool = False,
    say: Say = lambda *_: None,
) -> list[Figures]:
    """Measures steps on this machine.

    Args:
      config: all that a step depends on; its partition is replaced by the step's.
      steps: some of `STEPS`.
      runs: how often each is measured.
      versus: whether to measure transformers too.
      say: called with what is being done, how many parts are done, how many there are, and the seconds that the others
        may take (None where that cannot be told yet). To compile a side is a part, and each of its runs.

    Returns:
      For each step {"step", "sides": {side: figures}, "left_out": {side: why}}. Figures are a worker's answers, a list
      where it was asked in each run ("seconds", "token_seconds", "limit"), of others than ours "seconds_of_ours" in the
      runs taken in turns with it, and what `_summary` makes of them.

    Raises:
      UserError: the configuration does not fit a step, or a step does not fit the machine.
    """
    configs = {step: prepared(config, step) for step in steps}  # refuses before time is spent
    specs = {step: _specs(step, configs[step], versus) for step in configs}
    count = sum(map(len, specs.values()))
    agenda = _Agenda(say, count, count - len(specs), runs)
    return [_measure(sides, runs, agenda) for sides in specs.values()]


class _Agenda:
    """The parts of a benchmark, of each kind: those that are left, and what those took that are done."""

    def __init__(self, say: Say, sides: int, others: int, runs: int):
        """Of `sides` in all, `others` are not ours; they are measured in turns with ours."""
        self._say = say
        self._left = {COMPILE: sides, MEASURE: (sides + others) * runs}
        self._took: dict[str, list[float]] = {COMPILE: [], MEASURE: []}
        self._begun: tuple[str, float] | None = None

    def begin(self, kind: str, what: str) -> None:
        """Ends the part before, and says what is begun."""
        now = time.monotonic()
        if self._begun:
            self._took[self._begun[0]].append(now - self._begun[1])
            self._left[self._begun[0]] -= 1
        self._begun = kind, now
        done, left = sum(map(len, self._took.values())), sum(self._left.values())
        # What has not been done once cannot be told.
        known = all(self._took[kind] for kind, count in self._left.items() if count)
        seconds = sum(count * statistics.mean(self._took[kind] or [0]) for kind, count in self._left.items())
        self._say(what, done, done + left, seconds if known else None)

    def drop(self, measurements: int) -> None:
        """Takes off what will not be measured."""
        self._left[MEASURE] -= measurements


def prepared(config: ConfigDict, step: str) -> dict[str, Any]:
    """The configuration with which a step is measured, as JSON gives it back; raises UserError where none fits."""
    if config.start_from or config.expert:
        key = "start_from" if config.start_from else "expert"
        raise UserError(f"--config.{key}={config[key]}: a benchmark takes fresh weights; leave it empty")
    if step in ("joint", "router") and config.moe.num_experts < 2:
        raise UserError(
            f"--config.moe.num_experts={config.moe.num_experts}: --step={step} needs 2 at least; "
            "give them, or name other steps"
        )
    config = config.copy_and_resolve_references()
    if step in ("anchor", "expert"):
        config.moe.num_experts = config.moe.top_k = 1
    if step == "decode":
        config.data.grad_accum_steps = 1  # of training steps alone
    config.partition = PARTITIONS.get(step, PARTITIONS["joint"])
    build_model(config, ANY_PLATFORM)  # to check it; the devices are for the workers
    return json.loads(config.to_json())


def _specs(step: str, config: dict[str, Any], versus: bool) -> dict[str, Spec]:
    """What to measure, by name; ours first.

    Where `data.grad_accum_steps` has our step take micro-batches, transformers takes the batch at once, and uncompiled
    in as many micro-batches too; with all that is compiled besides, the processes would take twice the memory.
    """
    specs = {OURS: Spec(OURS, step, config)}
    if versus:
        parts = config["data"]["accumulate"]
        at_once = {**config, "data": {**config["data"], "accumulate": 1}}
        dense = step == "anchor" or (step == "decode" and config["moe"]["num_experts"] == 1)
        variants = DENSE if dense else VARIANTS
        for experts, compiled in variants:
            name = (experts or "dense") + (", compiled" if compiled else "")
            specs[name] = Spec("transformers", step, at_once, experts, compiled)
        for experts, compiled in variants:
            if parts > 1 and not compiled:
                specs[f"{experts or 'dense'}, {parts} parts"] = Spec("transformers", step, config, experts)
    return specs


def _measure(specs: Mapping[str, Spec], runs: int, agenda: _Agenda) -> Figures:
    """All figures of a step.

    On the host ours takes turns with one of the others after another, so that two at most hold memory; a device is held
    by one at a time.
    """
    step = specs[OURS].step
    sides: dict[str, Figures] = {}
    left_out: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        beside: dict[str, Process] = {}
        for name, spec in specs.items():
            agenda.begin(COMPILE, f"{step}: {name} compiles")
            process = Process(spec)
            stack.callback(process.close)
            try:
                # Memory right then, before what is measured of the machine takes some.
                built = process.ask("build", None if name == OURS else PATIENCE) | process.ask("memory")
                if name != OURS:
                    _check_pace(built, process, [figures for other, figures in sides.items() if other != OURS])
            except UserError as error:
                if name == OURS:
                    raise
                process.close()
                left_out[name] = str(error)
                agenda.drop(2 * runs)
                continue
            sides[name] = built
            if name != OURS and not beside:
                agenda.drop(runs)
            _rounds(step, {**beside, name: process}, sides, runs, agenda)
            if name != OURS:
                built["seconds_of_ours"] = sides[OURS]["seconds"][-runs:]
            if name == OURS and built["platform"] == "cpu":
                beside[name] = process
            else:
                process.close()
    return {"step": step, "sides": {name: _summary(figures) for name, figures in sides.items()}, "left_out": left_out}


def _check_pace(built: Figures, process: Process, others: Sequence[Figures]) -> None:
    """Raises UserError where a step takes so much longer than others' that measuring it would be a waste of time."""
    longest = HOPELESS * min((figures["first_seconds"] for figures in others), default=float("inf"))
    # Twice, so that a machine that was busy for a moment leaves nothing out.
    if built["first_seconds"] > longest and process.ask("step") > longest:
        raise UserError(f"more than {HOPELESS} times as slow as another")


def _rounds(
    step: str,
    processes: Mapping[str, Process],
    sides: Mapping[str, Figures],
    runs: int,
    agenda: _Agenda,
) -> None:
    """Asks processes in turns, and adds what they say to the figures of their sides."""
    for run, (name, process) in itertools.product(range(runs), processes.items()):
        agenda.begin(MEASURE, f"{step}: {name}, run {run + 1} of {runs}")
        measured = {"step": "seconds"}
        if name == OURS:
            measured = {"limit": "limit", **measured}
            if "bytes" in sides[name]:
                measured["token"] = "token_seconds"
        for request, key in measured.items():
            time.sleep(PAUSE)
            sides[name].setdefault(key, []).append(process.ask(request))


def _summary(figures: Figures) -> Figures:
    """Figures with what follows from their medians.

    "step_seconds" is a training step's time, or that of decoding a token for each row; "tokens_per_second" counts
    those of a batch, or those that a whole generation writes; "ratio" is ours to it of tokens/s, in the runs that were
    taken in turns; "share_of_limit" compares the step's FLOP/s or, of decoding, its bytes/s with the machine's.
    """
    seconds = statistics.median(figures["seconds"])
    step = statistics.median(figures.get("token_seconds", figures["seconds"]))
    ratio = seconds / statistics.median(figures.get("seconds_of_ours", figures["seconds"]))
    summary = {"tokens_per_second": figures["tokens"] / seconds, "ratio": ratio}
    if "limit" in figures:
        rate = figures.get("bytes", figures["flops"]) / step
        summary["step_seconds"] = step
        summary["flops_per_second"] = figures["flops"] / step
        summary["share_of_limit"] = rate / statistics.median(figures["limit"])
    return {**summary, **figures}
