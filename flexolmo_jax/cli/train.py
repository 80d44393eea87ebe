r"""Trains what a configuration describes. The same command, run again, resumes from the last checkpoint.

    flexolmo train --config=configs/anchor.py:tiny --workdir=runs/anchor --config.data.train=corpora/public
    flexolmo train --config=configs/expert.py:tiny --workdir=runs/news --config.start_from=runs/anchor/model \
        --config.expert=news --config.data.train=corpora/news

Every key of a configuration stands in configs/base.py with its unit, and can be set with --config.KEY=VALUE.
A short trial needs --config.steps only: a warm-up that is no shorter than the run takes half of its steps.

A run over several hosts is one process on each: --distributed, on all of them, takes from the scheduler who they are
(Cloud TPU, GKE, SLURM, Open MPI, Kubernetes); without one, --coordinator, --num_processes and --process_id say so. All
see the same workdir and data.

The output is WORKDIR/contribution for an expert, and WORKDIR/model otherwise. On SIGTERM a checkpoint is saved, and
the exit status is 143; it is 2 for bad input, and for a loss that is not finite, and 75 where the processes of a run
have lost each other, to be run again. docs/runs.md says more.
"""

import sys

from absl import flags
from ml_collections import config_flags

SIGTERM_STATUS = 143  # 128 + SIGTERM, as shells and schedulers have it

_CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration, as FILE or FILE:ARGUMENT.")
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Directory of the run: checkpoints, metrics, and the output.", required=True
)
_VERIFY = flags.DEFINE_bool(
    "verify",
    False,
    "Compare every token file with its digest before anything else: reads the corpora once, at about 1 GB/s a core. "
    "Without it, those trained on are compared before the output is written.",
)
_DISTRIBUTED = flags.DEFINE_bool("distributed", False, "Run with the other processes that the scheduler has started.")
_COORDINATOR = flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0, where no scheduler says it.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes there are, with --coordinator.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")
flags.mark_flags_as_required(["config"])
MEMORY_REMEDY = (
    "lower --config.data.batch_size or --config.data.sequence_length, raise --config.data.grad_accum_steps, "
    "or set --config.compute.remat=full"
)


def run() -> None:
    """Trains, and prints the path of the output."""
    from flexolmo_jax import distributed
    from flexolmo_jax.training.loop import train

    place = (_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    if _DISTRIBUTED.value or place != ("", None, None):
        distributed.start(*place, distributed.Timeouts(**_CONFIG.value.distributed))
    output = train(_CONFIG.value, _WORKDIR.value, verify=_VERIFY.value)
    if output is None:
        sys.stderr.write(
            f"flexolmo train: stopped by SIGTERM; run the same command again to resume in {_WORKDIR.value}\n"
        )
        sys.exit(SIGTERM_STATUS)
    if distributed.is_primary():
        print(output)
