"""Selectors: whose text it is, from the text so far (docs/method.md, "Selectors").

An owner ships statistics: sums over documents, which no one trains jointly and which nobody else's change. From these
and the anchor's, `tables` derives each owner's evidence for a token: by how much it is likelier, in nats, in the
owner's text than in public text. The evidence for an owner's text after a token is the sum over the document so far,
in which earlier tokens count less and less, so that a change of domain is followed. Softmax over it is the posterior
by which experts are chosen; the anchor's evidence is 0.
"""

from __future__ import annotations

import abc
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flexolmo_jax.checkpoint.casts import Experts
from flexolmo_jax.checkpoint.manifests import BY_ROUTER, SELECTOR, ModelManifest
from flexolmo_jax.checkpoint.statistics import read_statistics
from flexolmo_jax.errors import UserError
from flexolmo_jax.model.privacy import Privacy

if TYPE_CHECKING:
    from flexolmo_jax.model.architecture import Architecture

LOG_SCALE = SELECTOR + "log_scale"  # of the evidence; can be tuned
DECAY = 1 - 1 / 32  # of evidence, for each token
NATS_PER_TOKEN = 0.3  # tokens are not independent: the weight of a token's evidence before it is tuned

BUCKETS = 2**16  # of hashed n-grams
SMOOTHING = 0.1  # added to every count
MAX_NGRAMS = 2**25  # possible n-grams, up to which n may grow
SIGNIFICANT = 2.0  # standard deviations of noise at which a count and public text weigh the same
BLOCK = 2**20  # tokens that are counted at once
_MULTIPLIER, _FINALIZER = 0x9E3779B1, 0x85EBCA6B  # odd 32-bit integers of the hash

Statistics = Mapping[str, np.ndarray]


class State(NamedTuple):
    """What a selector keeps of the sequences so far, beside the cache of keys and values.

    Attributes:
      evidence_BxE: float32, decayed sums.
      recent_BxN: int32, the last tokens, as many as an n-gram has but one.
    """

    evidence_BxE: jax.Array
    recent_BxN: jax.Array


class Selector(abc.ABC):
    """Derives evidence for experts from their statistics. To add one, subclass this and enter it in `SELECTORS`.

    Attributes:
      name: its key in `SELECTORS`; its leaves among the statistics are `NAME/*`.
      reveals: what they say of the text, in words for its owner.
    """

    name: str
    reveals: str

    @abc.abstractmethod
    def statistics(self, documents: Iterable[np.ndarray], architecture: Architecture, eos_id: int) -> Statistics:
        """The statistics of documents (token ids, terminated by EOS), {leaf: array}, in one pass."""

    @abc.abstractmethod
    def private_statistics(
        self, documents: Iterable[np.ndarray], architecture: Architecture, eos_id: int, privacy: Privacy
    ) -> Statistics:
        """The same with noise, differentially private (`model.privacy`); other values each time."""

    @abc.abstractmethod
    def problem(self, statistics: Statistics, documents: int | None) -> str | None:
        """What is wrong with statistics that claim to be of so many documents (None: unknown), or None."""

    @abc.abstractmethod
    def table_shapes(self, num_experts: int) -> dict[str, tuple[int, ...]]:
        """{table: shape}; tables are float32."""

    @abc.abstractmethod
    def tables(self, statistics: Sequence[Statistics]) -> dict[str, np.ndarray]:
        """The tables, from the statistics of each expert, the anchor's first; computed in float64."""

    @abc.abstractmethod
    def context(self, architecture: Architecture) -> int:
        """How many tokens before a token its evidence depends on."""

    @abc.abstractmethod
    def token_evidence(
        self, tables: Mapping[str, jax.Array], tokens_BxT: jax.Array, has_context_BxS: jax.Array
    ) -> jax.Array:
        """The evidence of each token, float32 [batch, length, experts].

        Args:
          tables: as above, on the device.
          tokens_BxT: int32; `context` tokens, then those of the sequence.
          has_context_BxS: bool, whether the `context` tokens before are of the same document. If not, it is 0.
        """


class NgramSelector(Selector):
    """Naive Bayes on hashed n-grams of token ids: sums of log p_i(n-gram) - log p_public(n-gram).

    The statistics are `ngram/counts` [BUCKETS], how often n-grams of each bucket occur, and `ngram/documents`, a
    scalar. n is 3 for bytes, 2 for small vocabularies, and 1 for those whose bigrams would collide. Private statistics
    have `ngram/noise` besides, a scalar: the standard deviation of the noise in each count.
    """

    name = "ngram"
    reveals = (
        f"how often n-grams of tokens occur in the text, hashed to {BUCKETS} counts: whoever has the tokenizer can "
        "test whether a sequence of words is likely to be in it, and how frequent it is"
    )

    def order(self, architecture: Architecture) -> int:
        """n, of the n-grams."""
        return max(n for n in (1, 2, 3) if n == 1 or architecture.vocab_size**n <= MAX_NGRAMS)

    def context(self, architecture: Architecture) -> int:
        """One less than the order."""
        return self.order(architecture) - 1

    def statistics(self, documents: Iterable[np.ndarray], architecture: Architecture, eos_id: int) -> Statistics:
        """Counts, int64; a document is read after an EOS, as a prompt is."""
        counts, order, number = np.zeros(BUCKETS, np.int64), self.order(architecture), 0
        start = np.full(min(order - 1, 1), eos_id)  # before the first document; no n-gram ends in it
        block, tokens_in_block = [], 0
        for document in itertools.chain(documents, [None]):
            if document is None or tokens_in_block > BLOCK:
                tokens = np.concatenate([start, *block]).astype(np.uint32)
                buckets = _buckets(tokens, order, np)
                is_border = np.zeros(buckets.shape, bool)  # an EOS within an n-gram is the border of two documents
                for inner in range(1, order - 1):
                    is_border |= tokens[inner : inner + len(buckets)] == eos_id
                counts += np.bincount(buckets[~is_border], minlength=BUCKETS)
                number, block, tokens_in_block = number + len(block), [], 0
            if document is not None:
                block.append(document)
                tokens_in_block += len(document)
        return {"ngram/counts": counts, "ngram/documents": np.array(number)}

    def private_statistics(
        self, documents: Iterable[np.ndarray], architecture: Architecture, eos_id: int, privacy: Privacy
    ) -> Statistics:
        """The same with noise, float64: counts of bounded documents, projected to valid ones."""
        order, number = self.order(architecture), 0

        def counts() -> Iterator[tuple[np.ndarray, np.ndarray]]:
            nonlocal number
            for document in documents:
                number += 1
                tokens = np.concatenate([[eos_id] * min(order - 1, 1), document]).astype(np.uint32)
                yield np.unique(_buckets(tokens, order, np), return_counts=True)

        noised = privacy.release(counts(), BUCKETS)
        return {"ngram/counts": noised, "ngram/documents": np.array(number), "ngram/noise": np.array(privacy.stddev)}

    def problem(self, statistics: Statistics, documents: int | None) -> str | None:
        """Counts must be finite, not negative, and not all zero, and the number of documents that of the card."""
        if statistics.keys() - {"ngram/noise"} != {"ngram/counts", "ngram/documents"}:
            return f"has the leaves {', '.join(sorted(statistics))}; it must have ngram/counts and ngram/documents"
        counts, number = statistics["ngram/counts"], statistics["ngram/documents"]
        if counts.shape != (BUCKETS,):
            return f"ngram/counts has shape {list(counts.shape)}; it must be [{BUCKETS}]"
        if number.shape != ():
            return f"ngram/documents has shape {list(number.shape)}; it must be a scalar"
        if not (counts.min() >= 0 and 0 < counts.max() < 2**63):
            return "ngram/counts must be finite and not negative, with a positive sum"
        noise = statistics.get("ngram/noise", np.array(0.0))
        if noise.shape != () or not 0 <= noise < np.inf:
            return f"ngram/noise is {noise}; it must be a number that is finite and not negative"
        if documents is not None and number != documents:
            return f"ngram/documents is {number}, and the data card says {documents}"
        return None

    def table_shapes(self, num_experts: int) -> dict[str, tuple[int, ...]]:
        """`log_ratio` [BUCKETS, experts]."""
        return {"log_ratio": (BUCKETS, num_experts)}

    def tables(self, statistics: Sequence[Statistics]) -> dict[str, np.ndarray]:
        """The log of each bucket's probability, less that of public text, times `NATS_PER_TOKEN`."""
        public = np.asarray(statistics[0]["ngram/counts"], np.float64)
        columns, public_log = [np.zeros(BUCKETS)], np.log(_smoothed(public))
        for owner in statistics[1:]:
            counts = _shrunk(np.asarray(owner["ngram/counts"], np.float64), owner.get("ngram/noise"), public)
            columns.append(NATS_PER_TOKEN * (np.log(_smoothed(counts)) - public_log))
        return {"log_ratio": np.stack(columns, axis=1).astype(np.float32)}

    def token_evidence(
        self, tables: Mapping[str, jax.Array], tokens_BxT: jax.Array, has_context_BxS: jax.Array
    ) -> jax.Array:
        """The log ratio of the n-gram that ends at each token."""
        order = tokens_BxT.shape[1] - has_context_BxS.shape[1] + 1
        evidence_BxSxE = tables["log_ratio"][_buckets(tokens_BxT.astype(jnp.uint32), order, jnp)]
        return jnp.where(has_context_BxS[..., None], evidence_BxSxE, 0)


def _shrunk(counts: np.ndarray, noise: np.ndarray | None, public: np.ndarray) -> np.ndarray:
    """Counts, drawn to those of public text where they do not stand out of noise of that standard deviation.

    Without this, the noise outweighs the text: n-grams whose count is lost in it would speak against the owner. The
    result has the sum of the public counts, so that smoothing does not matter more where there was little text.
    """
    if noise is None or noise == 0:
        return counts
    weight = counts**2 / (counts**2 + (SIGNIFICANT * noise) ** 2)
    certain, rest = weight * counts / counts.sum(), (1 - weight) * _smoothed(public)
    return public.sum() * (certain + (1 - certain.sum()) * rest / rest.sum())


def _smoothed(counts: np.ndarray) -> np.ndarray:
    """The probability of each bucket."""
    return (counts + SMOOTHING) / (counts.sum() + SMOOTHING * counts.size)


def _buckets(tokens: Any, order: int, numpy: Any) -> Any:
    """The bucket of each n-gram of uint32 tokens [..., length]: [..., length - n + 1], by NumPy or jax.numpy.

    h = 0, then h = (h * _MULTIPLIER + token + 1) mod 2^32 from the last token to the first. The bucket is the upper 16
    bits of h * _FINALIZER mod 2^32.
    """
    count = tokens.shape[-1] - order + 1
    value = numpy.zeros((*tokens.shape[:-1], max(count, 0)), numpy.uint32)
    for back in range(order):
        start = order - 1 - back
        value = value * numpy.uint32(_MULTIPLIER) + tokens[..., start : start + count] + numpy.uint32(1)
    return (value * numpy.uint32(_FINALIZER)) >> 16


SELECTORS: dict[str, Selector] = {selector.name: selector for selector in (NgramSelector(),)}


# What can choose experts: the router, a selector, or the sum of their logits.
SELECTIONS = (BY_ROUTER, *SELECTORS, *(f"{BY_ROUTER}+{name}" for name in SELECTORS))


def selector_of(selection: str) -> Selector | None:
    """The selector that plays a part in a selection, if any."""
    return SELECTORS.get(selection.removeprefix(f"{BY_ROUTER}+"))


def uses_router(selection: str) -> bool:
    """Whether the router's weights play a part in a selection."""
    return selection.split("+")[0] == BY_ROUTER


def derived_leaves(selection: str, statistics: Sequence[Statistics]) -> dict[str, np.ndarray]:
    """The leaves of a model that are derived from its experts' statistics, the anchor's first, {path: float32}."""
    selector = selector_of(selection)
    if selector is None or len(statistics) < 2:
        return {}
    return {SELECTOR + name: table for name, table in selector.tables(statistics).items()}


def read_derived(manifest: ModelManifest, statistics: Experts, source: str) -> dict[str, np.ndarray]:
    """The derived leaves of a model directory, {path: float32}.

    Args:
      manifest: of the model.
      statistics: as `checkpoint.statistics.open_statistics` gives them.
      source: names the model in errors.

    Raises:
      UserError: statistics are missing or not valid.
    """
    selector = selector_of(manifest.selection)
    if selector is None or len(manifest.experts) == 1:
        return {}
    read = [read_statistics(statistics[name], selector.name) for name in manifest.roster]
    for name, arrays in zip(manifest.roster, read, strict=True):
        problem = selector.problem(arrays, None)
        if problem:
            raise UserError(f"{source}: the statistics of {name}: {problem}; copy the directory again from its source")
    return derived_leaves(manifest.selection, read)


def is_derived(path: str) -> bool:
    """Whether a leaf is derived when a model is loaded, and not stored."""
    return path.startswith(SELECTOR) and path != LOG_SCALE


def new_state(selector: Selector, architecture: Architecture, batch: int, num_experts: int) -> State:
    """The state before the first token."""
    recent_BxN = jnp.zeros((batch, selector.context(architecture)), jnp.int32)
    return State(jnp.zeros((batch, num_experts), jnp.float32), recent_BxN)


def advance(
    selector: Selector,
    tables: Mapping[str, jax.Array],
    state: State,
    tokens_BxS: jax.Array,
    positions_BxS: jax.Array,
    is_token_BxS: jax.Array | None = None,
) -> tuple[jax.Array, State]:
    """Reads tokens; however a sequence is cut into calls, the result is the same, bit for bit.

    Args:
      selector: one of `SELECTORS`.
      tables: {table: float32 array}.
      state: before these tokens.
      tokens_BxS: int32.
      positions_BxS: int32, the position of each token within its document; at 0 the evidence starts anew.
      is_token_BxS: bool; False for padding at the end of a sequence, which changes nothing. None: no padding.

    Returns:
      (evidence float32 [batch, length, experts] after each token, the state after the last).
    """
    context, length = state.recent_BxN.shape[1], tokens_BxS.shape[1]
    tokens_BxT = jnp.concatenate([state.recent_BxN, tokens_BxS], axis=1)
    new_BxSxE = selector.token_evidence(tables, tokens_BxT, positions_BxS >= context)
    keep_BxS = jnp.where(positions_BxS > 0, jnp.float32(DECAY), 0)
    count_B = jnp.full(tokens_BxS.shape[0], length)
    if is_token_BxS is not None:
        new_BxSxE = jnp.where(is_token_BxS[..., None], new_BxSxE, 0)
        keep_BxS = jnp.where(is_token_BxS, keep_BxS, 1)
        count_B = jnp.sum(is_token_BxS, axis=1)

    def add(evidence_BxE, token):
        keep_B, new_BxE = token
        evidence_BxE = keep_B[:, None] * evidence_BxE + new_BxE
        return evidence_BxE, evidence_BxE

    by_token = jnp.moveaxis(keep_BxS, 1, 0), jnp.moveaxis(new_BxSxE, 1, 0)
    evidence_BxE, evidence_SxBxE = jax.lax.scan(add, state.evidence_BxE, by_token)
    recent_BxN = jnp.take_along_axis(tokens_BxT, count_B[:, None] + jnp.arange(context), axis=1)
    return jnp.moveaxis(evidence_SxBxE, 0, 1), State(evidence_BxE, recent_BxN)
