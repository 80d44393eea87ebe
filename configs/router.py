r"""Tunes the router of a merged model on public proxy data; everything else is frozen.

    flexolmo train --config=configs/router.py:tiny --workdir=runs/tuned --config.start_from=runs/merged \
        --config.data.train=corpora/proxies

`tiny` is 50 steps of 2048 bytes, under a minute on two CPU cores; only how tokens are routed changes, so expect a
small change of the loss. `7b` is the published setting (5B tokens).
The argument is a size of configs/models.py.
"""

from ml_collections import ConfigDict

from configs import base, models


def get_config(size: str = "tiny") -> ConfigDict:
    """Returns the configuration of router tuning for models of a named size."""
    config = base.get_config()
    models.set_size(config, size)
    config.partition = base.PARTITIONS["router"]
    config.moe.num_experts, config.moe.top_k = (4, 2) if size == "tiny" else (8, 4)
    config.optimizer.learning_rate = 2e-3
    config.optimizer.weight_decay = 0.1
    config.optimizer.no_decay = (r".*(scale|bias)", "embedding")
    config.loss.router_z_loss = 1e-3
    if size == "tiny":
        config.steps = 50
        config.optimizer.warmup_steps = 5
        config.checkpoint.every = 50
    else:
        config.steps = 1193  # 5B tokens
        config.optimizer.warmup_steps = 100
        config.compute.frozen_dtype = "bfloat16"
    return config
