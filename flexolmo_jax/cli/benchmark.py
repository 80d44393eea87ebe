r"""Measures what steps cost on this machine, with fresh weights and random tokens.

    flexolmo benchmark --config=configs/benchmark.py --versus=transformers
    flexolmo benchmark --config=configs/expert.py:7b --step=solo --config.data.batch_size=8 --json=solo.json
    flexolmo benchmark --config=configs/benchmark.py --step=decode --num_experts=1,4,16 --selection=ngram \
        --config.moe.top_k=1 --config.data.batch_size=1

A step trains what its name says: an anchor, an expert alone (solo) or in a pair, all of a mixture (joint), its router;
or it decodes tokens for a batch of prompts of half a sequence. FLOP/s count the matmuls that the step needs, and
nothing that it recomputes (formula in flexolmo_jax/model/flops.py). The limit is that of this machine, measured in
turns with the step: a large matmul in its dtype or, for decoding, the rate at which memory is read. Results are
medians. A share above 100% is no error: a small model's weights are read from caches, or the machine was less busy
while the step ran.

With --num_experts, models with so many experts, the anchor included, decode in turns with the first, and a table
compares the time of a token. --selection says what chooses their experts: a selector, or the router.

With --processes=2, two processes with half the cores each also train together, in turns with one process that has two
devices and all cores; a table compares them. Both are on the CPU.

With --versus=transformers the same sizes run there too, in turns, with each implementation of experts it has, compiled
and not. With data.grad_accum_steps above 1, transformers takes the batch at once and, uncompiled, in micro-batches too.
Peak memory is that of a process, with libraries and compiling; on a device, what it had in use. Both sides have their
memory in huge pages, unless GLIBC_TUNABLES in the environment says otherwise.
"""

from absl import flags
from ml_collections import config_flags

from flexolmo_jax.benchmark.run import STEPS
from flexolmo_jax.checkpoint.manifests import BY_ROUTER
from flexolmo_jax.model.selectors import SELECTIONS

_CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration, as FILE or FILE:ARGUMENT.")
_STEPS = flags.DEFINE_multi_enum("step", STEPS, STEPS, "What to measure; give the flag once for each. By default all.")
_RUNS = flags.DEFINE_integer("runs", 5, "Measurements of each step.", lower_bound=1)
_NUM_EXPERTS = flags.DEFINE_list(
    "num_experts", [], "For decoding: numbers of experts to compare, 1 for the anchor alone."
)
_SELECTION = flags.DEFINE_enum("selection", BY_ROUTER, SELECTIONS, "For decoding: what chooses experts.")
_VERSUS = flags.DEFINE_enum("versus", None, ["transformers"], "What to compare with (extra `interop`).")
_PROCESSES = flags.DEFINE_integer("processes", 1, "For training: processes that also do it together.", lower_bound=1)
_JSON = flags.DEFINE_string("json", None, "File to write the results to.")
flags.mark_flags_as_required(["config"])
KEEPS_COMPILED = False  # it measures compilation


def run() -> None:
    """Measures, and prints a table of the steps and, for each step, those of what it is compared with."""
    import importlib.util
    import json

    from flexolmo_jax.benchmark.results import description, experts_table, processes_table, steps_table, versus_table
    from flexolmo_jax.benchmark.run import benchmark
    from flexolmo_jax.cli.files import write_json
    from flexolmo_jax.errors import UserError
    from flexolmo_jax.progress import Stages
    from flexolmo_jax.tables import show

    missing = [name for name in ("torch", "transformers") if not importlib.util.find_spec(name)]
    if _VERSUS.value and missing:
        raise UserError(f"--versus=transformers: needs {missing[0]}; pip install 'flexolmo-jax[interop]'")
    with Stages("flexolmo benchmark") as stages:
        steps = list(dict.fromkeys(_STEPS.value))
        if _PROCESSES.value > 1 and not flags.FLAGS["step"].present:
            steps.remove("decode")
        results = benchmark(
            _CONFIG.value,
            steps,
            _RUNS.value,
            versus=bool(_VERSUS.value),
            say=stages.say,
            num_experts=_counts(),
            selection=_SELECTION.value,
            processes=_PROCESSES.value,
        )
    show(steps_table(results))
    for result in results:
        if result["step"] == "decode" and _NUM_EXPERTS.value:
            print()
            show(experts_table(result))
        if _PROCESSES.value > 1:
            print()
            show(processes_table(result))
        if _VERSUS.value:
            print()
            show(versus_table(result))
        for name, why in result["left_out"].items():
            print(f"{result['step']}: {name} is left out: {why}")
    if _JSON.value:
        configuration = json.loads(_CONFIG.value.to_json())
        write_json(_JSON.value, {**description(), "config": configuration, "steps": results})


def _counts() -> list[int]:
    """The numbers of --num_experts."""
    from flexolmo_jax.errors import ArgumentError

    for text in _NUM_EXPERTS.value:
        if not text.isdecimal():
            raise ArgumentError("num_experts", text, "must be integers, the anchor included")
    return [int(text) for text in _NUM_EXPERTS.value]
