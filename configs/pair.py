r"""Trains an expert as the paper does: a copy of the anchor's feed-forward beside the anchor's own, with a router.

    flexolmo train --config=configs/pair.py:tiny --workdir=runs/news --config.start_from=runs/anchor/model \
        --config.expert=news --config.data.train=corpora/news

It takes the same number of steps as configs/expert.py. `tiny` takes about a minute on two CPU cores; on the owner's own
text the loss ends below the anchor's, by about 0.3 nats per token on Python source. `7b` is the published setting (50B
tokens). The argument is a size of configs/models.py.
"""

from ml_collections import ConfigDict

from configs import base, expert


def get_config(size: str = "tiny") -> ConfigDict:
    """Returns the configuration of a pair of a named size."""
    config = expert.get_config(size)
    config.expert_layout = "pair"
    config.partition = base.PARTITIONS["pair"]
    config.loss.router_z_loss = 1e-3
    # Public sequences teach the router when not to choose this expert.
    config.data.public_share = 0.5
    config.publish.interpolation = 1.0
    return config
