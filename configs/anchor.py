"""Trains an anchor: a dense OLMo-2 model on public data, published for data owners to copy.

    flexolmo train --config=configs/anchor.py:tiny --workdir=runs/anchor --config.data.train=corpora/public

`tiny` is 600 steps of 2048 bytes, about two minutes on two CPU cores; on English prose its loss ends at about
2.0 nats per token (a byte). `7b` is the published size (1T tokens of a 5T schedule).
The argument is a size of configs/models.py.
"""

from ml_collections import ConfigDict

from configs import base, models


def get_config(size: str = "tiny") -> ConfigDict:
    """Returns the configuration of an anchor of a named size."""
    config = base.get_config()
    models.set_size(config, size)
    config.partition = base.PARTITIONS["anchor"]
    config.optimizer.weight_decay = 0.1
    config.publish.public_documents = 1000
    if size == "tiny":
        config.steps = 600
        config.optimizer.learning_rate = 3e-3
        # Blocks write to the residual stream through a norm, at scale 1: in a short run, smaller embeddings drown.
        config.init.embedding_stddev = 1.0
        config.optimizer.warmup_steps = 50
        config.checkpoint.every = 200
    else:
        config.steps = 238_419  # 1T tokens
        config.optimizer.warmup_steps = 2000
    return config
