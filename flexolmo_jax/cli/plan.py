r"""Compiles a run's train step for TPUs or GPUs that need not be there, and shows the memory and time it takes.

    flexolmo plan --config=configs/expert.py:tiny --topology=v5e:2x4
    flexolmo plan --config=configs/expert.py:7b --topology=v5e:4x4 --config.data.grad_accum_steps=32 \
        --config.compute.remat=kernels --json=plan.json
    flexolmo plan --config=configs/expert.py:7b --topology=h200:1 --config.data.grad_accum_steps=512

No anchor, data or accelerator is needed: a configuration without --config.start_from is planned with fresh weights.
Memory and collectives are those of the compiled program; times are a roofline estimate, not a measurement:

    arithmetic    matmuls alone, at the chip's bfloat16 rate; a mixture's experts are chosen equally often. MFU (model
                  FLOPs utilization) leaves out what is recomputed
    HBM           each operation of the compiled program reads its operands and writes its results once; a loop whose
                  trips depend on data, as over blocks of tokens of one expert, counts as one trip
    interconnect  ring algorithms without latency, at one direction of each link that a group's shape can use
    at best       the three overlap perfectly; at worst, nothing does. Input and checkpoints are not counted

Needs libtpu (extra `plan`) for TPUs, and JAX's plugin for GPUs (extra `cuda`) for these.
"""

from absl import flags
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration, as FILE or FILE:ARGUMENT.")
_TOPOLOGY = flags.DEFINE_string(
    "topology",
    None,
    "Kind and shape of a TPU slice, or kind and number of a node's GPUs: v5e:4x4, v5p:2x4x4, h200:8, ...",
    required=True,
)
_JSON = flags.DEFINE_string("json", None, "File to write the results to.")
flags.mark_flags_as_required(["config"])
KEEPS_COMPILED = False  # it reads the compiled program, which a cache does not keep


def run() -> None:
    """Plans, and prints tables of memory, collectives and time, and advice."""
    import json

    from flexolmo_jax.cli.files import write_json
    from flexolmo_jax.cli.flags_of import as_flags
    from flexolmo_jax.planning import display
    from flexolmo_jax.planning.plan import plan
    from flexolmo_jax.progress import progress_bar
    from flexolmo_jax.tables import show

    with progress_bar("{task.description}") as bar:
        bar.add_task(f"compiling for {_TOPOLOGY.value}", total=None)
        made = plan(_CONFIG.value, _TOPOLOGY.value)
    made = made._replace(advice=[as_flags(sentence) for sentence in made.advice])
    print(display.heading(made))
    show(display.memory_table(made))
    if made.collectives:
        show(display.collectives_table(made))
    show(display.roofline_table(made))
    for sentence in (display.run_line(made), *made.advice, *([display.GPU_MEMORY] if made.chip.is_gpu else [])):
        print(sentence)
    if _JSON.value:
        write_json(_JSON.value, {"config": json.loads(_CONFIG.value.to_json()), **made.to_json()})
