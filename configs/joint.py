r"""Trains all of a merged model together. Opting out of it is no longer exact, and the certificate says so.

    flexolmo train --config=configs/joint.py:tiny --workdir=runs/joint --config.start_from=runs/merged \
        --config.data.train=corpora/public,corpora/news

`tiny` is 50 steps of 2048 bytes; on text of all domains the loss should end below that of the merge. `7b` takes as
many tokens as an expert (50B). `benchmark` and `plan` need no merge: their mixture is fresh.
The argument is a size of configs/models.py.
"""

from ml_collections import ConfigDict

from configs import base, models


def get_config(size: str = "tiny") -> ConfigDict:
    """Returns the configuration of joint training for models of a named size."""
    config = base.get_config()
    models.set_size(config, size)
    config.partition = base.PARTITIONS["joint"]
    config.moe.num_experts, config.moe.top_k = (4, 2) if size == "tiny" else (8, 4)
    config.optimizer.weight_decay = 0.1
    config.loss.router_z_loss = 1e-3
    if size == "tiny":
        config.steps = 50
        config.optimizer.warmup_steps = 5
        config.checkpoint.every = 50
    else:
        config.steps = 11_921  # 50B tokens
        config.optimizer.warmup_steps = 2000
    return config
