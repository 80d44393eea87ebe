r"""Trains an expert: an owner's copy of the anchor's feed-forward, alone with weight 1 in the frozen anchor.

    flexolmo train --config=configs/expert.py:tiny --workdir=runs/news --config.start_from=runs/anchor/model \
        --config.expert=news --config.data.train=corpora/news

`tiny` is 250 steps of 2048 bytes, about a minute on two CPU cores; on the owner's own text the loss ends well below
the anchor's, by about 0.3 nats per token on Python source. `7b` takes as many tokens as the published run (50B).
configs/pair.py trains as the paper does. The argument is a size of configs/models.py.
"""

from ml_collections import ConfigDict

from configs import base, models


def get_config(size: str = "tiny") -> ConfigDict:
    """Returns the configuration of an expert of a named size."""
    config = base.get_config()
    models.set_size(config, size)
    config.partition = base.PARTITIONS["solo"]
    # Public sequences keep the expert from harm to text that is not its owner's, when no other expert knows it better.
    config.data.public_share = 0.15
    config.publish.interpolation = 0.9
    if size == "tiny":
        config.steps = 250
        config.optimizer.learning_rate = 1.5e-3
        config.optimizer.warmup_steps = 20
        config.checkpoint.every = 200
    else:
        config.steps = 11_921  # 50B tokens
        config.optimizer.warmup_steps = 2000
        config.compute.frozen_dtype = "bfloat16"
    return config
