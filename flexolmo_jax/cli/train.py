r"""Trains what a configuration describes. The same command, run again, goes on from the last checkpoint.

    flexolmo train --config=configs/anchor.py:tiny --workdir=runs/anchor --config.data.train=corpora/public
    flexolmo train --config=configs/expert.py:tiny --workdir=runs/news --config.start_from=runs/anchor/model \
        --config.expert=news --config.data.train=corpora/news

Every key of a configuration stands in configs/base.py with its unit, and can be set with --config.KEY=VALUE.
The product is WORKDIR/contribution for an expert, and WORKDIR/model otherwise. On SIGTERM a checkpoint is saved.
"""

from absl import flags
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration, as FILE or FILE:ARGUMENT.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run: checkpoints, metrics, and the product.")
flags.mark_flags_as_required(["config", "workdir"])
MEMORY_REMEDY = (
    "lower --config.data.batch_size or --config.data.sequence_length, raise --config.data.accumulate, "
    "or set --config.compute.remat=full"
)


def run() -> None:
    """Trains, and says where the product is."""
    from flexolmo_jax.training.loop import train

    product = train(_CONFIG.value, _WORKDIR.value)
    if product is None:
        print(f"stopped by SIGTERM; run the same command again to go on from the checkpoint in {_WORKDIR.value}")
    else:
        print(product)
