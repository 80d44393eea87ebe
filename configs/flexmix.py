r"""Trains a model on all of FlexMix at once, each of its sets with its published size as weight.

    flexolmo train --config=configs/flexmix.py:tiny --workdir=runs/flexmix --config.data.max_epochs=1

The data that FlexOlmo's paper trains its experts on, and a model that was trained on all of it in one place. Fill in
the directories of `SETS` first: corpora that `flexolmo tokenize` made of AI2's texts. `data.max_epochs` refuses a run
that would repeat a set. `7b` takes 1T tokens, as configs/anchor.py does; a set that is not there may be left out: the
weights of the others keep their proportions. The argument is a size of configs/models.py.
"""

from ml_collections import ConfigDict

from configs import anchor

# (name, corpus directories with commas between, published size in billions of tokens), docs/method.md.
SETS = (
    ("public", "corpora/flexmix/public", 2370.0),
    ("creative_writing", "corpora/flexmix/creative_writing", 201.9),
    ("news", "corpora/flexmix/news", 158.0),
    ("educational", "corpora/flexmix/educational", 102.2),
    ("code", "corpora/flexmix/code", 83.0),
    ("academic", "corpora/flexmix/academic", 58.6),
    ("math", "corpora/flexmix/math", 20.3),
    ("reddit", "corpora/flexmix/reddit", 9.9),
)


def get_config(size: str = "tiny") -> ConfigDict:
    """Returns the configuration of an anchor of a named size, on FlexMix."""
    config = anchor.get_config(size)
    config.data.mixture = SETS
    return config
