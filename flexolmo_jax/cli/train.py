r"""Trains what a configuration describes. The same command, run again, resumes from the last checkpoint.

    flexolmo train --config=configs/anchor.py:tiny --workdir=runs/anchor --config.data.train=corpora/public
    flexolmo train --config=configs/expert.py:tiny --workdir=runs/news --config.start_from=runs/anchor/model \
        --config.expert=news --config.data.train=corpora/news

Every key of a configuration stands in configs/base.py with its unit, and can be set with --config.KEY=VALUE.
A short trial needs --config.steps only: a warm-up that is no shorter than the run takes half of its steps.
The output is WORKDIR/contribution for an expert, and WORKDIR/model otherwise. On SIGTERM a checkpoint is saved, and
the exit status is 143; it is 2 for bad input, and for a loss that is not finite. docs/runs.md says more.
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
flags.mark_flags_as_required(["config"])
MEMORY_REMEDY = (
    "lower --config.data.batch_size or --config.data.sequence_length, raise --config.data.grad_accum_steps, "
    "or set --config.compute.remat=full"
)


def run() -> None:
    """Trains, and prints the path of the output."""
    from flexolmo_jax.training.loop import train

    output = train(_CONFIG.value, _WORKDIR.value, verify=_VERIFY.value)
    if output is None:
        sys.stderr.write(
            f"flexolmo train: stopped by SIGTERM; run the same command again to resume in {_WORKDIR.value}\n"
        )
        sys.exit(SIGTERM_STATUS)
    print(output)
