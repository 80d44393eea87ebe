"""Runs a benchmark: one step after the other, this program in turns with what it is compared with.

That is the implementations of transformers, and models with other numbers of experts.
"""

import contextlib
import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict, FrozenConfigDict

from configs.base import PARTITIONS
from flexolmo_jax.benchmark.worker import Place, Spec, Worker, Workers
from flexolmo_jax.checkpoint.manifests import BY_ROUTER
from flexolmo_jax.errors import ArgumentError, UserError
from flexolmo_jax.model.architecture import EXPERT_LAYOUTS
from flexolmo_jax.training.run import ANY_PLATFORM, build_model

FLEXOLMO = "flexolmo"
STEPS = ("anchor", "solo", "pair", "joint", "router", "decode")
# Of transformers: each `experts_implementation`, as it is and through `torch.compile`.
VARIANTS = tuple(itertools.product(("eager", "grouped_mm", "batched_mm"), (False, True)))
DENSE = (("", False), ("", True))
PATIENCE = 600  # seconds in which transformers must have taken a first step
PAUSE = 0.5  # seconds between measurements, in which the threads of the one before come to rest

Metrics = dict[str, Any]
Say = Callable[[str, int, int], None]


def benchmark(
    config: ConfigDict,
    steps: Sequence[str],
    runs: int,
    versus: bool = False,
    say: Say = lambda *_: None,
    num_experts: Sequence[int] = (),
    selection: str = BY_ROUTER,
    processes: int = 1,
) -> list[Metrics]:
    """Measures steps on this machine.

    Args:
      config: all that a step depends on; its partition is replaced by the step's.
      steps: some of `STEPS`.
      runs: how often each is measured.
      versus: whether to measure transformers too.
      say: called with what is being done, and how many sides are done and in all.
      num_experts: of the models that decode, in place of the configuration's; the first is this program's side, to
        which the others, sides such as "16 experts", are compared.
      selection: what chooses their experts, one of `model.selectors.SELECTIONS`.
      processes: above 1, so many with a part of the cores each take a step together, a side "2 processes", to be
        compared with one process that has as many devices, and all these cores.

    Returns:
      For each step {"step", "sides": {side: metrics}, "left_out": {side: why}}. Metrics are a worker's answers, a list
      for those asked in each run ("seconds", "token_seconds", "limit"), of other sides those of this program's in the
      runs taken in turns with it ("seconds_of_ours", "token_seconds_of_ours"), and what `_summary` makes of them.

    Raises:
      UserError: the configuration does not fit a step, or a step does not fit the machine.
    """
    if "decode" not in steps and (num_experts or selection != BY_ROUTER):
        value = ("num_experts", ",".join(map(str, num_experts))) if num_experts else ("selection", selection)
        raise ArgumentError(*value, "is for decoding alone; measure step=decode")
    if versus and selection != BY_ROUTER:
        raise ArgumentError("selection", selection, f"transformers has no selector; use {BY_ROUTER}, or no comparison")
    if processes > 1 and (versus or "decode" in steps):
        problem = "is for training steps alone, without a comparison; measure step=solo"
        raise ArgumentError("processes", processes, problem)
    # Refuses before time is spent.
    specs = [_specs(step, config, versus, num_experts, selection, processes) for step in steps]
    done, total = itertools.count(), sum(map(len, specs))
    return [_measure(sides, runs, lambda what: say(what, next(done), total)) for sides in specs]


def prepared(config: ConfigDict, step: str) -> FrozenConfigDict:
    """The configuration with which a step is measured; raises UserError if none fits."""
    for key in ("start_from", "expert"):
        if config[key]:
            raise ArgumentError(f"config.{key}", config[key], "a benchmark takes fresh weights; leave it empty")
    if step in ("joint", "router") and config.moe.num_experts < 2:
        problem = f"step={step} needs 2 at least; give them, or name other steps"
        raise ArgumentError("config.moe.num_experts", config.moe.num_experts, problem)
    config = config.copy_and_resolve_references()
    if step in EXPERT_LAYOUTS:
        config.expert_layout = step
    if step in ("anchor", *EXPERT_LAYOUTS):
        config.moe.num_experts = config.moe.top_k = 1
    if step == "decode":
        config.data.grad_accum_steps = 1  # of training steps alone
    config.partition = PARTITIONS.get(step, PARTITIONS["joint"])
    build_model(config, ANY_PLATFORM)  # to check it; the devices are for the workers
    return FrozenConfigDict(config)


def _specs(
    step: str, config: ConfigDict, versus: bool, num_experts: Sequence[int], selection: str, processes: int = 1
) -> dict[str, Spec]:
    """What to measure, by name; this program first."""
    if step != "decode":
        spec = Spec(FLEXOLMO, step, prepared(config, step))
        if processes == 1:
            return _versus(spec, versus)
        return {
            FLEXOLMO: spec._replace(place=Place(devices=processes)),
            f"{processes} processes": spec._replace(place=Place(processes=processes)),
        }
    models = []
    for count in dict.fromkeys(num_experts) or [config.moe.num_experts]:
        if count < 1:
            raise ArgumentError("num_experts", count, "it must be at least 1, for the anchor alone")
        of_count = config.copy_and_resolve_references()
        of_count.moe.num_experts, of_count.moe.top_k = count, min(config.moe.top_k, count)
        models.append(Spec(FLEXOLMO, step, prepared(of_count, step), selection=selection))
    return _versus(models[0], versus) | {f"{spec.config.moe.num_experts} experts": spec for spec in models[1:]}


def _versus(spec: Spec, versus: bool) -> dict[str, Spec]:
    """The side of this program and, with `versus`, those of transformers.

    With `data.grad_accum_steps` above 1, transformers takes the batch at once, and uncompiled in as many micro-batches
    too; with all that is compiled besides, the processes would take twice the memory.
    """
    specs = {FLEXOLMO: spec}
    if not versus:
        return specs
    step, config = spec.step, spec.config
    count, at_once = config.data.grad_accum_steps, ConfigDict(config)
    at_once.data.grad_accum_steps = 1
    is_dense = step in ("anchor", "solo") or (step == "decode" and config.moe.num_experts == 1)
    variants = DENSE if is_dense else VARIANTS
    for is_divided, (experts, compiled) in itertools.product((False, True), variants):
        if is_divided and (compiled or count == 1):
            continue
        name = f"transformers, {experts or 'dense'}" + ", compiled" * compiled + f", {count} micro-batches" * is_divided
        chosen = config if is_divided else FrozenConfigDict(at_once)
        specs[name] = Spec("transformers", step, chosen, experts, compiled)
    return specs


def _measure(specs: Mapping[str, Spec], runs: int, begin: Callable[[str], None]) -> Metrics:
    """All metrics of a step.

    On the host this program takes turns with one other side after another, so that two at most hold memory; a device is
    held by one at a time.
    """
    specs = dict(specs)
    spec = specs.pop(FLEXOLMO)
    sides: dict[str, Metrics] = {}
    left_out = {}
    begin(f"{spec.step}: {FLEXOLMO}")
    with contextlib.ExitStack() as until_measured:
        reference_worker = Worker(spec)
        until_measured.callback(reference_worker.close)
        # Memory right then, before what is measured of the machine takes some.
        sides[FLEXOLMO] = reference = reference_worker.ask("begin") | reference_worker.ask("memory")
        workers: dict[str, Worker | Workers] = {FLEXOLMO: reference_worker}
        _take_turns(workers, sides, runs)
        if reference["platform"] != "cpu":
            workers.pop(FLEXOLMO).close()
        for name, spec in specs.items():
            begin(f"{spec.step}: {name}")
            with contextlib.closing(_worker(spec)) as worker:
                try:
                    built = worker.ask("begin", None if spec.side == FLEXOLMO else PATIENCE) | worker.ask("memory")
                except UserError as error:
                    left_out[name] = str(error)
                    continue
                sides[name] = built
                _take_turns({**workers, name: worker}, sides, runs)
            for key in {"seconds", "token_seconds"} & built.keys():
                built[f"{key}_of_ours"] = reference[key][-runs:]
    return {"step": spec.step, "sides": {name: _summary(side) for name, side in sides.items()}, "left_out": left_out}


def _worker(spec: Spec) -> Worker | Workers:
    """What measures a side."""
    return Workers(spec, spec.place.processes) if spec.place and spec.place.processes > 1 else Worker(spec)


def _take_turns(workers: Mapping[str, Worker | Workers], sides: Mapping[str, Metrics], runs: int) -> None:
    """Asks workers in turns, and adds their answers to the metrics of their sides."""
    for _, (name, worker) in itertools.product(range(runs), workers.items()):
        requests = {"seconds": "seconds"}
        if "limit_of" in sides[name] and "processes" not in sides[name]:
            requests = {"limit": "limit", **requests, **({"token": "token_seconds"} if "bytes" in sides[name] else {})}
        for request, key in requests.items():
            time.sleep(PAUSE)
            sides[name].setdefault(key, []).append(worker.ask(request))


def _summary(side: Metrics) -> Metrics:
    """Metrics with what follows from their medians.

    "step_seconds" is a training step's time, or that of decoding a token for each sequence; "tokens_per_second" counts
    all tokens of a step, of decoding the new ones; "ratio" is the seconds of a side to this program's in the same runs,
    and "token_ratio" the median over runs of that of decoding a token.
    """
    seconds = statistics.median(side["seconds"])
    ratio = seconds / statistics.median(side.get("seconds_of_ours", side["seconds"]))
    summary = {"tokens_per_second": side["tokens"] / seconds, "ratio": ratio}
    if "token_seconds" in side:
        tokens = side["token_seconds"]
        pairs = zip(tokens, side.get("token_seconds_of_ours", tokens), strict=True)
        summary["token_ratio"] = statistics.median(side_seconds / reference for side_seconds, reference in pairs)
    if "limit" in side:
        step = statistics.median(side.get("token_seconds", side["seconds"]))
        summary["step_seconds"], summary["flops_per_second"] = step, side["flops"] / step
        summary["share_of_limit"] = side.get("bytes", side["flops"]) / step / statistics.median(side["limit"])
    return {**summary, **side}
