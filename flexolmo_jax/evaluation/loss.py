"""Held-out loss of models, with any experts left out, and the experts to which their routers send each corpus."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from flexolmo_jax.checkpoint.model_directory import CERTIFICATE_FILE
from flexolmo_jax.data.batches.pipeline import EvaluationBatches
from flexolmo_jax.data.corpus import Corpus
from flexolmo_jax.errors import UserError
from flexolmo_jax.inference.model import Model, load
from flexolmo_jax.progress import progress_bar

MAX_NATS = 700.0  # per token; the perplexity of more overflows


class Loss(NamedTuple):
    """The loss of one model on one corpus.

    Attributes:
      documents: number of documents.
      tokens: number of predicted tokens, including the EOS of each document.
      bytes: number of bytes of UTF-8 text.
      nats: sum of the negative log likelihood.
      routing: {expert: share of the routing weight}, mean over tokens and layers.
    """

    documents: int
    tokens: int
    bytes: int
    nats: float
    routing: Mapping[str, float]

    @property
    def nats_per_token(self) -> float:
        """Mean negative log likelihood of a token."""
        return self.nats / self.tokens

    @property
    def bits_per_byte(self) -> float:
        """Negative log likelihood of a byte of text, in bits."""
        return self.nats / math.log(2) / self.bytes

    def as_dict(self) -> dict[str, Any]:
        """The columns of the evaluation table."""
        return {
            "documents": self.documents,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "nats_per_token": self.nats_per_token,
            "bits_per_byte": self.bits_per_byte,
            "perplexity": math.exp(self.nats_per_token),
            "routing": dict(self.routing),
        }


class ModelResults(NamedTuple):
    """The results of one model on several corpora.

    Attributes:
      roster: its experts, the anchor first.
      losses: {corpus: loss}.
      without: {expert: {corpus: loss with that expert left out}}; empty for models with fewer than two contributed
        experts.
      certificate: what its opt-out guarantees, where it is the output of one.
    """

    roster: Sequence[str]
    losses: Mapping[str, Loss]
    without: Mapping[str, Mapping[str, Loss]] = {}
    certificate: Mapping[str, Any] | None = None


def evaluate(
    model: Model,
    corpora: Mapping[str, Corpus],
    *,
    without: Sequence[str] = (),
    length: int = 256,
    batch_size: int = 8,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, Loss]:
    """Computes the loss of every token of each corpus, in sequences of `length` tokens.

    Args:
      model: a loaded model.
      corpora: {label: corpus}, tokenized with the model's tokenizer.
      without: experts to leave out.
      length: tokens of a sequence. A document that continues in the next sequence starts there without context.
      batch_size: sequences computed at once.
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
        if corpus.vocab_size > int(model.manifest.architecture["vocab_size"]):
            raise UserError(f"{corpus.path}: its tokenizer has more tokens than the model; import the model again")
        sums = []
        for batch in EvaluationBatches(corpus, length, batch_size):
            sums.append(model.loss_step(batch, mask_E))
            advance()
        sums = jax.device_get(sums)
        tokens = sum(float(s["tokens"]) for s in sums)
        nats = sum(float(s["cross_entropy"]) for s in sums)
        if not nats / tokens < MAX_NATS:
            raise UserError(
                f"{corpus.path}: the loss is {nats / tokens} nats per token, not a finite number; the model diverged "
                "in training, or its weights are damaged: check both with `flexolmo inspect`"
            )
        share_E = np.sum([s["routing_E"] for s in sums], axis=0) / tokens
        routing = {name: float(share) for name, share in zip(model.roster, share_E, strict=True)}
        losses[label] = Loss(corpus.documents, int(tokens), corpus.bytes, nats, routing)
    return losses


def evaluate_shown(
    model: Model,
    corpora: Mapping[str, Corpus],
    *,
    title: str,
    without: Sequence[str] = (),
    length: int,
    batch_size: int,
) -> dict[str, Loss]:
    """Calls `evaluate` with a progress bar on standard error."""
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


def evaluate_models(
    directories: Mapping[str, epath.PathLike],
    corpora: Mapping[str, Corpus],
    *,
    length: int = 256,
    batch_size: int = 8,
    dtype: str = "float32",
) -> dict[str, ModelResults]:
    """Evaluates models one after another, and those with several contributed experts without each of them.

    Args:
      directories: {label: model directory}.
      corpora: {label: corpus}, tokenized with the models' tokenizer.
      length: tokens of a sequence.
      batch_size: sequences computed at once.
      dtype: of parameters and computation.

    Returns:
      {label: results}, in the given order. Memory holds one model at a time.

    Raises:
      UserError: a directory is not a model, or as `evaluate`.
    """
    results = {}
    for label, directory in directories.items():
        model = load(directory, dtype)
        options: dict[str, Any] = {"length": length, "batch_size": batch_size}
        losses = evaluate_shown(model, corpora, title=label, **options)
        contributed = model.roster[1:] if len(model.roster) > 2 else []
        without = {
            name: evaluate_shown(model, corpora, title=f"{label} without {name}", without=[name], **options)
            for name in contributed
        }
        file = epath.Path(directory) / CERTIFICATE_FILE
        certificate = json.loads(file.read_text()) if file.exists() else None
        results[label] = ModelResults(model.roster, losses, without, certificate)
        del model
    return results
