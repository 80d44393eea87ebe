r"""Compares policies that select an expert for each token, on text that was not trained on.

    python benchmarks/selection.py --model=runs/merged --public=corpora/public --owner=corpora/code \
        --owner=corpora/novels ... --unowned=corpora/legal ...

Each corpus folder holds two corpora, `train` (for statistics) and `validation`; an owner's has the name of the expert.
All that is measured is computed once: the loss of every token with each expert alone, and the evidence of every token.
A policy is then a recursion over the evidence. It names one expert for each token, whose loss counts. This leaves out
that a token also attends to tokens which other experts computed. The columns:

    own, worst        loss on an owner's text, against the owner's expert; the greatest of the owners
    own, mean         the mean of the owners
    gain, least       share of that expert's gain over the anchor which is kept; the least of the owners
    public, unowned   loss against the anchor's on public text, and on the text of no owner, where it is worst
    others, worst     change of the loss on any other text, of owners or public, when one owner leaves
    floor, worst      loss on an owner's text without the owner, against the anchor's
    own weight        posterior of the owner's expert after 64 tokens of the owner's text; the least of the owners
    tokens, half      where half a sequence of one expert's text is followed by another's, all pairs: tokens until
    tokens, 90%       the new text's expert has the greatest weight, for half and for 90% of these sequences
    within 64         share of these sequences in which that takes at most 64 tokens
"""

import argparse
import functools
import itertools
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from selection_policies import (
    WINDOW,
    Ngrams,
    Policy,
    change_detection,
    decay,
    discriminant,
    fixed_share,
    typical_evidence,
)

import flexolmo_jax
from flexolmo_jax.data.corpus import Corpus
from flexolmo_jax.inference.model import Model
from flexolmo_jax.model.moe import MoE
from flexolmo_jax.model.selectors import DECAY, NATS_PER_TOKEN, NgramSelector
from flexolmo_jax.tables import plain_table, show

LENGTH = 256  # tokens of a sequence
AFTER = 64  # tokens after which the own weight counts
MAX_WINDOWS = 5000  # of an owner
SPLICES = 8  # of each pair of texts
BATCH = 32


class Texts(NamedTuple):
    """Sequences of all corpora, each the beginning of a document to the selector.

    Attributes:
      tokens_BxS, targets_BxS: int32; those of corpora, then splices.
      is_token_BxS: bool, False for padding.
      corpus_B: index of the corpus, that of its expert if it has one; -1 for a splice of two halves of sequences.
      splices: [splices, 2] int, index of the sequence and of the expert of its second half.
    """

    tokens_BxS: np.ndarray
    targets_BxS: np.ndarray
    is_token_BxS: np.ndarray
    corpus_B: np.ndarray
    splices: np.ndarray


# What the model computes


@functools.partial(jax.jit, static_argnums=0)
def _losses(decoder, params, mask_E, tokens_BxS, targets_BxS):
    logits_BxSxV = decoder.apply_flat(params, tokens_BxS, expert_mask=mask_E).logits_BxSxV
    target_BxS = jnp.take_along_axis(logits_BxSxV, targets_BxS[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits_BxSxV, axis=-1) - target_BxS


@functools.partial(jax.jit, static_argnums=0)
def _router_inputs(decoder, params, tokens_BxS):
    inputs = []

    def keep(call, args, kwargs, context):
        if isinstance(context.module, MoE):
            inputs.append(args[0])
        return call(*args, **kwargs)

    with nn.intercept_methods(keep):
        decoder.apply_flat(params, tokens_BxS)
    return inputs[0]


def in_batches(function: Callable, *arrays: np.ndarray) -> np.ndarray:
    """A function of arrays [batch, ...], applied to `BATCH` sequences at once."""
    parts = []
    for start in range(0, len(arrays[0]), BATCH):
        batch = [array[start : start + BATCH] for array in arrays]
        filled = [np.pad(part, ((0, BATCH - len(part)), (0, 0))) for part in batch]
        parts.append(np.asarray(function(*filled))[: len(batch[0])])
    return np.concatenate(parts)


def windows(model: Model, corpus: Corpus) -> np.ndarray:
    """Means of the router inputs of `WINDOW` tokens [windows, d_model], of documents in a random order."""
    order = np.random.default_rng(0).permutation(len(corpus))
    full = [tokens for i in order for tokens, _ in _chunks(corpus, i) if len(tokens) == LENGTH]
    inputs = router_inputs(model, np.stack(full[: MAX_WINDOWS * WINDOW // LENGTH]))
    return inputs.reshape(-1, WINDOW, inputs.shape[-1]).mean(axis=1, dtype=np.float64)


def router_inputs(model: Model, tokens_BxS: np.ndarray) -> np.ndarray:
    """The first block's router input [batch, length, d_model], which no expert changes."""
    return in_batches(functools.partial(_router_inputs, model.decoder, model.params), tokens_BxS)


def _chunks(corpus: Corpus, index: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Tokens and targets of a document, at most `LENGTH` at once."""
    targets = np.asarray(corpus[int(index)], np.int32)
    tokens = np.concatenate([[corpus.eos_id], targets[:-1]]).astype(np.int32)
    for start in range(0, len(targets), LENGTH):
        yield tokens[start : start + LENGTH], targets[start : start + LENGTH]


def read_texts(corpora: Sequence[Corpus], experts: int) -> Texts:
    """All documents of corpora, and splices of those that have an expert: the first ones."""
    chunks = [(i, *p) for i, corpus in enumerate(corpora) for d in range(len(corpus)) for p in _chunks(corpus, d)]
    full = [[tokens for j, tokens, _ in chunks if i == j and len(tokens) == LENGTH] for i in range(experts)]
    rng, half, splices = np.random.default_rng(0), LENGTH // 2, []
    for old, new in itertools.permutations(range(experts), 2):
        for a, b in zip(rng.choice(len(full[old]), SPLICES), rng.choice(len(full[new]), SPLICES), strict=True):
            splices.append((len(chunks), new))
            spliced = np.concatenate([full[old][a][:half], full[new][b][half:]])
            chunks.append((-1, spliced, spliced))
    tokens, targets = np.zeros((2, len(chunks), LENGTH), np.int32)
    for b, (_, chunk, target) in enumerate(chunks):
        tokens[b, : len(chunk)], targets[b, : len(chunk)] = chunk, target
    is_token = np.arange(LENGTH) < np.array([len(chunk) for _, chunk, _ in chunks])[:, None]
    return Texts(tokens, targets, is_token, np.array([i for i, _, _ in chunks]), np.array(splices))


# Measures


def measure(
    policy: Policy, evidence: np.ndarray, texts: Texts, losses: np.ndarray, bias_E: np.ndarray
) -> dict[str, float]:
    """The columns of the table, by name; ratios, and numbers of tokens.

    Args:
      policy: what selects.
      evidence: of each token, [batch, length, experts].
      texts: what is selected for.
      losses: of each token with each expert alone, [batch, length, experts].
      bias_E: what is added to the log weights, as a router bias is.
    """
    experts, corpora = range(losses.shape[-1]), range(texts.corpus_B.max() + 1)

    def mean(values: np.ndarray, corpus: int, start: int = 0) -> np.ndarray:
        is_in = texts.corpus_B == corpus
        return values[is_in, start:][texts.is_token_BxS[is_in, start:]].mean(axis=0)

    def selected(is_on: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Log weights [batch, length, experts], and the loss of each corpus."""
        logs = policy(evidence, is_on) + bias_E
        picked = np.take_along_axis(losses, logs.argmax(axis=-1)[..., None], axis=-1)[..., 0]
        return logs, np.array([mean(picked, c) for c in corpora])

    alone = np.stack([mean(losses, c) for c in corpora])
    logs, loss = selected(np.ones(len(experts), bool))
    posterior = np.exp(logs - logs.max(axis=-1, keepdims=True))
    posterior /= posterior.sum(axis=-1, keepdims=True)
    without = {e: selected(np.arange(len(experts)) != e)[1] for e in experts[1:]}
    excess = np.array([loss[e] / alone[e, e] - 1 for e in experts[1:]])
    is_followed = np.array([logs[b, LENGTH // 2 :].argmax(axis=-1) == e for b, e in texts.splices])
    followed = np.where(is_followed.any(axis=1), is_followed.argmax(axis=1) + 1, LENGTH // 2)
    columns = {
        "own, worst": excess.max(),
        "own, mean": excess.mean(),
        "gain, least": min((alone[e, 0] - loss[e]) / (alone[e, 0] - alone[e, e]) for e in experts[1:]),
        "public": loss[0] / alone[0, 0] - 1,
        "unowned, worst": max((loss[c] / alone[c, 0] - 1 for c in corpora[len(experts) :]), default=np.nan),
        "others, worst": max(abs(without[e][c] / loss[c] - 1) for e in experts[1:] for c in experts if c != e),
        "floor, worst": max(without[e][e] / alone[e, 0] - 1 for e in experts[1:]),
        "own weight": min(mean(posterior[..., e], e, AFTER) for e in experts[1:]),
        "tokens, half": np.median(followed),
        "tokens, 90%": np.percentile(followed, 90),
        "within 64": np.mean(followed <= AFTER),
    }
    return {name: float(value) for name, value in columns.items()}


def alternatives(model: Model, train: Sequence[Corpus], texts: Texts) -> Iterator[tuple[str, np.ndarray, Policy]]:
    """Yields (label, evidence, policy); the selector as it is comes first. What a label leaves out is as there."""
    architecture = model.decoder.architecture
    statistics = {
        n: [
            Ngrams(n).statistics((corpus[i] for i in range(len(corpus))), architecture, corpus.eos_id)
            for corpus in train
        ]
        for n in (1, 2, 3)
    }
    n = NgramSelector().order(architecture)
    ngram = Ngrams(n).evidence(statistics[n], texts.tokens_BxS)
    yield f"{n}-gram, decay 1 - 1/{1 / (1 - DECAY):.0f}: the selector", ngram, decay(DECAY)
    for other in sorted({1, 2, 3} - {n}):
        yield f"{other}-gram", Ngrams(other).evidence(statistics[other], texts.tokens_BxS), decay(DECAY)
    for tokens in (16, 64):
        yield f"decay 1 - 1/{tokens}", ngram, decay(1 - 1 / tokens)
    yield "no decay", ngram, decay(1)
    for tokens in (64, 256, 1024):
        yield f"fixed share 1/{tokens}", ngram, fixed_share(1 / tokens)
    yield f"fixed share 1/1024, {NATS_PER_TOKEN} replaced by 1", ngram / NATS_PER_TOKEN, fixed_share(1 / 1024)
    for threshold in (2, 4, 8):
        yield f"change detection, {threshold} nats", ngram, change_detection(threshold)
    typical = typical_evidence(statistics[n]) * (np.arange(LENGTH)[:, None] >= n - 1)
    for share in (0.1, 0.2):
        yield f"margin {share} of the typical evidence", ngram - share * typical, decay(DECAY)
    for tokens in (1_000, 20_000):
        smoothed = Ngrams(n, tokens).evidence(statistics[n], texts.tokens_BxS)
        yield f"smoothed by {tokens:,} public tokens", smoothed, decay(DECAY)
    sums, inputs = [windows(model, corpus) for corpus in train], router_inputs(model, texts.tokens_BxS)
    for covariance in ("pooled", "public", "pair"):
        directions, offsets = discriminant(sums, covariance)
        linear = inputs.astype(np.float64) @ directions + offsets
        for tokens in (32, 64):
            yield f"discriminant, {covariance}, decay 1 - 1/{tokens}", linear, decay(1 - 1 / tokens)
        yield f"{n}-gram + discriminant, {covariance}", ngram + linear, decay(DECAY)


def main() -> None:
    """Measures every alternative, prints a table, and writes the results to a file if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a merge of solo experts")
    parser.add_argument("--public", required=True)
    parser.add_argument("--owner", action="append", required=True)
    parser.add_argument("--unowned", action="append", default=[])
    parser.add_argument("--json", help="file for the results")
    options = parser.parse_args()
    model = flexolmo_jax.load(options.model).with_top_k(1)
    owners = {pathlib.Path(folder).name: folder for folder in options.owner}
    if sorted(owners) != model.roster[1:]:
        parser.error(f"--owner: name the corpora of {', '.join(model.roster[1:])}, and no others")
    folders = [pathlib.Path(f) for f in (options.public, *(owners[o] for o in model.roster[1:]), *options.unowned)]
    experts = len(model.roster)
    texts = read_texts([Corpus.open(folder / "validation") for folder in folders], experts)
    losses_of = functools.partial(_losses, model.decoder, model.params)
    alone = [functools.partial(losses_of, mask) for mask in np.eye(experts, dtype=bool)]
    losses = np.stack([in_batches(function, texts.tokens_BxS, texts.targets_BxS) for function in alone], axis=-1)
    bias_E = -np.abs(np.asarray(model.params["blocks_0/moe/experts/router/bias"], np.float64))
    results = []
    for label, evidence, policy in alternatives(model, [Corpus.open(f / "train") for f in folders[:experts]], texts):
        results.append({"selection": label} | measure(policy, evidence, texts, losses, bias_E))
    _show(results)
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps(results, indent=2) + "\n")


def _show(results: list[dict]) -> None:
    first, *names = results[0]
    table = plain_table(first, names)
    for result in results:
        values = [f"{result[n]:.0f}" if n.startswith("tokens") else f"{100 * result[n]:.1f}%" for n in names]
        table.add_row(result[first], *values)
    show(table)


if __name__ == "__main__":
    main()
