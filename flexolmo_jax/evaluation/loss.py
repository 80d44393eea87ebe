"""Held-out loss of a model, with any experts switched off, and where its router sends each text."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from flexolmo_jax.data.corpus import Corpus
from flexolmo_jax.data.pipeline import evaluation_batches
from flexolmo_jax.errors import UserError
from flexolmo_jax.inference.model import Model
from flexolmo_jax.progress import progress_bar

MOST_NATS = 700.0  # per token: the perplexity of more is no number


class Loss(NamedTuple):
    """What one model makes of one corpus.

    Attributes:
      documents: of the corpus.
      tokens: predicted, each document's closing EOS included.
      bytes: of UTF-8 text.
      nats: sum of the negative log likelihood.
      routing: {expert: share of the routing weight}, mean over tokens and layers.
    """

    documents: int
    tokens: int
    bytes: int
    nats: float
    routing: Mapping[str, float]

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes

    def as_dict(self) -> dict[str, float]:
        """The columns of the evaluation table."""
        nats_per_token = self.nats / self.tokens
        return {
            "documents": self.documents,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "nats_per_token": nats_per_token,
            "bits_per_byte": self.bits_per_byte,
            "perplexity": math.exp(nats_per_token),
            "routing": dict(self.routing),
        }


def evaluate(
    model: Model,
    corpora: Mapping[str, Corpus],
    *,
    without: Sequence[str] = (),
    length: int = 256,
    batch_size: int = 8,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, Loss]:
    """Computes the loss of every token of each corpus, in rows of `length` tokens.

    Args:
      model: a loaded model.
      corpora: {label: corpus}, tokenized with the model's tokenizer.
      without: experts to switch off.
      length: tokens of a row; what a row's first tokens can see of their document starts there.
      batch_size: rows computed at once.
      advance: called after each batch.

    Raises:
      UserError: a corpus was made with another tokenizer or is damaged, a name is not on the roster, or a loss is
        not finite.
    """
    mask_E = model.expert_mask(without)
    losses = {}
    for label, corpus in corpora.items():
        if corpus.tokenizer_digest != model.manifest.tokenizer_digest:
            raise UserError(f"{corpus.path}: its tokenizer is not the model's; tokenize the text with that one")
        if corpus.vocab_size > model.manifest.architecture["vocab_size"]:
            raise UserError(f"{corpus.path}: its tokenizer has more tokens than the model; import the model again")
        sums = []
        for batch in evaluation_batches(corpus, length, batch_size):
            sums.append(model.loss_step(batch, mask_E))
            advance()
        sums = jax.device_get(sums)
        tokens = sum(float(s["tokens"]) for s in sums)
        nats = sum(float(s["cross_entropy"]) for s in sums)
        if not nats / tokens < MOST_NATS:
            raise UserError(
                f"{corpus.path}: the loss is {nats / tokens} nats per token, no finite figure; the model diverged in "
                "training, or its weights are damaged: look at both with `flexolmo inspect`"
            )
        share_E = np.sum([s["routing_E"] for s in sums], axis=0) / tokens
        routing = {name: float(share) for name, share in zip(model.roster, share_E, strict=True)}
        losses[label] = Loss(corpus.documents, int(tokens), corpus.bytes, nats, routing)
    return losses


def evaluate_shown(
    model: Model, corpora: Mapping[str, Corpus], *, title: str, without: Sequence[str], length: int, batch_size: int
) -> dict[str, Loss]:
    """`evaluate`, with a progress bar on standard error."""
    batches = sum(math.ceil(corpus.tokens / length / batch_size) for corpus in corpora.values())
    with progress_bar() as progress:
        task = progress.add_task(title, total=batches)
        return evaluate(
            model,
            corpora,
            without=without,
            length=length,
            batch_size=batch_size,
            advance=lambda: progress.advance(task),
        )
