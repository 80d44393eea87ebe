r"""Shows what a text costs in a model without its owner's expert, against the anchor alone: by expert, and by document.

    python benchmarks/floor.py --model=runs/study/seed-0/models/solo --expert=code \
        --data=runs/development_set/corpora/code/test

For each expert that is chosen in the owner's place: the share of tokens, and what these add to the loss, in percent of
the anchor's loss on the whole text. Then the range in which 90% of the sums lie when documents are drawn again
(bootstrap): what is within it may be chance.
"""

import argparse
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import flexolmo_jax
from flexolmo_jax.data.batches.pipeline import EvaluationBatches
from flexolmo_jax.data.corpus import Corpus
from flexolmo_jax.inference.model import Model
from flexolmo_jax.tables import plain_table, show

LENGTH, BATCH = 256, 16
SAMPLES = 2000


class Tokens(NamedTuple):
    """All tokens of a text, arrays [tokens].

    Attributes:
      anchor: loss with the anchor alone, in nats.
      left: loss without the owner's expert.
      chosen: index of the expert that is chosen then, in the first layer.
      document: index of the document.
    """

    anchor: np.ndarray
    left: np.ndarray
    chosen: np.ndarray
    document: np.ndarray


@functools.partial(jax.jit, static_argnums=0)
def _losses(decoder, params, batch, mask_E):
    output = decoder.apply_flat(params, batch["tokens"], batch["segment_ids"], batch["positions"], expert_mask=mask_E)
    target_BxS = jnp.take_along_axis(output.logits_BxSxV, batch["targets"][..., None], axis=-1)[..., 0]
    loss_BxS = jax.nn.logsumexp(output.logits_BxSxV, axis=-1) - target_BxS
    return loss_BxS, jnp.argmax(output.router_weights_LxBxSxE[0], axis=-1)


def read_tokens(model: Model, corpus: Corpus, expert: str) -> Tokens:
    """Computes the losses of a corpus with the anchor alone, and with all experts but one."""
    columns: list[list[np.ndarray]] = [[], [], [], []]
    for batch in EvaluationBatches(corpus, LENGTH, BATCH):
        is_token_BxS = batch["segment_ids"] > 0
        anchor, _ = _losses(model.decoder, model.params, batch, model.expert_mask(model.roster[1:]))
        left, chosen = _losses(model.decoder, model.params, batch, model.expert_mask([expert]))
        for column, values in zip(columns, (anchor, left, chosen, batch["targets"] == corpus.eos_id), strict=True):
            column.append(np.asarray(values)[is_token_BxS])
    anchor, left, chosen, ends = map(np.concatenate, columns)
    return Tokens(anchor, left, chosen, np.cumsum(ends) - ends)


def by_expert(tokens: Tokens, experts: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each expert [experts]: the share of tokens, and what these add to the anchor's loss, as a share of it."""
    shares = np.bincount(tokens.chosen, minlength=experts) / len(tokens.chosen)
    return shares, np.bincount(tokens.chosen, tokens.left - tokens.anchor, experts) / tokens.anchor.sum()


def resampled(tokens: Tokens, samples: int = SAMPLES) -> np.ndarray:
    """What the text costs more, as a share of the anchor's loss, of documents drawn with replacement [samples]."""
    added = np.bincount(tokens.document, tokens.left - tokens.anchor)
    anchor = np.bincount(tokens.document, tokens.anchor)
    drawn = np.random.default_rng(0).integers(0, len(added), (samples, len(added)))
    return added[drawn].sum(axis=1) / anchor[drawn].sum(axis=1)


def main() -> None:
    """Reads the model and the text, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a merged model")
    parser.add_argument("--expert", required=True, help="the owner's expert, which is left out")
    parser.add_argument("--data", required=True, help="corpus of the owner's text")
    options = parser.parse_args()
    model, corpus = flexolmo_jax.load(options.model), Corpus.open(options.data)
    tokens = read_tokens(model, corpus, options.expert)
    shares, added = by_expert(tokens, len(model.roster))
    table = plain_table("chosen", ("tokens", "adds to the loss"))
    for name, share, more in zip(model.roster, shares, added, strict=True):
        if share:
            table.add_row(name, f"{share:.1%}", f"{more:+.3%}")
    table.add_row("all", f"{1:.1%}", f"{added.sum():+.3%}")
    show(table)
    low, high = np.percentile(resampled(tokens), (5, 95))
    print(f"{len(corpus)} documents; drawn again, 90% of the sums lie between {low:+.2%} and {high:+.2%}")


if __name__ == "__main__":
    main()
