"""Corpora to batches. Every sequence is a pure function of its number, so that a process makes those it needs.

A batch is a dict of int32 arrays [batch, length]:

- `tokens`: the model's inputs. For a document d0 .. dn, EOS they are EOS, d0 .. dn.
- `targets`: the next tokens: d0 .. dn, EOS. So each token of a document, including the first and EOS, is a target
  exactly once.
- `segment_ids`: the document of the sequence that a token belongs to, from 1; 0 is padding. A segment may be part of a
  document, which packing has cut.
- `positions`: from 0 in each segment. A document that continues in another sequence starts from 0 there, without
  attention to its beginning.
"""

import abc
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from flexolmo_jax.data.batches.mixture import Mixture
from flexolmo_jax.data.batches.order import Order
from flexolmo_jax.data.batches.packing import PackedStream, Span
from flexolmo_jax.data.batches.stream import Stream
from flexolmo_jax.data.corpus import Corpus, check_one_tokenizer
from flexolmo_jax.errors import UserError

Batch = dict[str, np.ndarray]
ARRAYS = ("tokens", "targets", "segment_ids", "positions")  # of a batch


class Source(NamedTuple):
    """Corpora that are packed together, and have one weight in a mixture.

    Attributes:
      label: names them in metrics.
      corpora: one after another.
    """

    label: str
    corpora: Sequence[Corpus]

    @property
    def tokens(self) -> int:
        """Number of tokens of all corpora."""
        return sum(corpus.tokens for corpus in self.corpora)


class Batches(abc.ABC):
    """Batches with random access. Batch n has the sequences from n * batch_size on.

    Attributes:
      batch_size: sequences of a batch.
      length: tokens of a sequence.
    """

    def __init__(self, corpora: Sequence[Corpus], length: int, batch_size: int):
        self.batch_size, self.length, self._corpora = batch_size, length, corpora
        self._vocab_size = corpora[0].vocab_size

    def batch(self, number: int) -> Batch:
        """Makes a whole batch: int32 arrays [batch_size, length]."""
        return self.sequences(range(number * self.batch_size, (number + 1) * self.batch_size))

    def sequences(self, numbers: Sequence[int]) -> Batch:
        """Makes some sequences of the run: int32 arrays [numbers, length].

        Raises:
          UserError: an id of one is outside the vocabulary.
        """
        shape = (len(numbers), self.length)
        tokens_BxS, targets_BxS = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        starts_BxS, sizes_B = np.zeros(shape, bool), np.zeros((len(numbers), 1), np.int64)
        for place, number in enumerate(numbers):
            stream, spans = self._spans(number)
            sequence = (tokens_BxS[place], targets_BxS[place], starts_BxS[place])
            sizes_B[place] = _fill(*sequence, stream, spans)
        self._check_ids(tokens_BxS, targets_BxS)
        places_S = np.arange(self.length, dtype=np.int32)
        starts_BxS |= tokens_BxS == self._corpora[0].eos_id
        is_token_BxS = places_S < sizes_B
        first_BxS = np.maximum.accumulate(np.where(starts_BxS, places_S, np.int32(0)), axis=1)
        return {
            "tokens": tokens_BxS,
            "targets": targets_BxS,
            "segment_ids": np.cumsum(starts_BxS, axis=1, dtype=np.int32) * is_token_BxS,
            "positions": (places_S - first_BxS) * is_token_BxS,
        }

    @abc.abstractmethod
    def _spans(self, number: int) -> tuple[Stream, Sequence[Span]]:
        """The stream of a sequence, and its spans, of `length` tokens or, where it is padded, fewer."""

    def _check_ids(self, *arrays: np.ndarray) -> None:
        # An id above 2**31 is a negative int32, and a large uint32.
        if any(array.view(np.uint32).max(initial=0) >= self._vocab_size for array in arrays):
            for corpus in self._corpora:
                corpus.refuse_ids()
            raise UserError(f"{self._corpora[0].path}: its files changed while they were read; copy the corpus again")


class TrainingBatches(Batches):
    """Endless batches of packed documents, every epoch of a source in a new order.

    Sources are packed separately, and mixed sequence by sequence. Batches do not depend on which process makes them.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        mixture: Mixture,
        length: int,
        batch_size: int,
        seed: int = 0,
        packing: str = "concatenate",
    ):
        """Opens the sources of a mixture.

        Args:
          sources: in the order of the mixture's weights.
          mixture: which source a sequence comes from.
          length: tokens of a sequence.
          batch_size: sequences of a batch, over all processes.
          seed: of the order, a non-negative integer.
          packing: a key of `packing.PACKINGS`.

        Raises:
          UserError: there is no corpus, or two corpora have different tokenizers.
        """
        super().__init__(_checked(sources), length, batch_size)
        self._sources, self._mixture = sources, mixture
        self._packed = [PackedStream(Stream(source.corpora), length, packing) for source in sources]
        self._orders = [
            Order(packed.stream.tokens, length, packed.window, (seed, index))
            for index, packed in enumerate(self._packed)
        ]

    def _spans(self, number: int) -> tuple[Stream, Sequence[Span]]:
        source, index = self._mixture.locate(number)
        packed = self._packed[source]
        return packed.stream, packed.spans(self._orders[source](index))

    def taken(self, batches: int) -> dict[str, tuple[int, float]]:
        """What the first batches hold of each source.

        Returns:
          {label: (tokens, epochs)}.
        """
        counts = self._mixture.counts(batches * self.batch_size)
        return {
            source.label: (count * self.length, count * self.length / source.tokens)
            for source, count in zip(self._sources, counts, strict=True)
        }


class EvaluationBatches(Batches):
    """Batches that hold every token of a corpus as a target exactly once, in order.

    The last batch is filled up with padding (segment id 0), so all have the shape [batch_size, length].

    Raises:
      UserError: while batches are made: an id of one is outside the vocabulary.
    """

    def __init__(self, corpus: Corpus, length: int, batch_size: int):
        """Opens a corpus.

        Args:
          corpus: that is read.
          length: tokens of a sequence.
          batch_size: sequences of a batch, over all processes.
        """
        super().__init__([corpus], length, batch_size)
        self._stream = Stream([corpus])

    def __len__(self) -> int:
        """Number of batches."""
        return math.ceil(self._stream.tokens / (self.length * self.batch_size))

    def __iter__(self) -> Iterator[Batch]:
        """Makes all batches, one after another."""
        return map(self.batch, range(len(self)))

    def _spans(self, number: int) -> tuple[Stream, Sequence[Span]]:
        start, stop = (min(offset * self.length, self._stream.tokens) for offset in (number, number + 1))
        return self._stream, [(start, stop)]


def _fill(
    tokens_S: np.ndarray, targets_S: np.ndarray, starts_S: np.ndarray, stream: Stream, spans: Sequence[Span]
) -> int:
    """Writes the tokens of spans, and where segments start unless an EOS says it; returns the number of tokens."""
    place = 0
    for start, stop in spans:
        end = place + stop - start
        read = stream.read(start - 1, stop)
        tokens_S[place:end], targets_S[place:end] = read[:-1], read[1:]
        if place < end:
            starts_S[place] = True
        # The last document of a file need not have an EOS.
        tokens_S[place + stream.file_starts(start, stop) - start] = stream.eos_id
        place = end
    return place


def _checked(sources: Sequence[Source]) -> list[Corpus]:
    """All corpora of the sources, which have one tokenizer."""
    if not sources or not all(source.corpora for source in sources):
        raise UserError("training data: a source has no corpus; name at least one corpus directory")
    corpora = [corpus for source in sources for corpus in source.corpora]
    check_one_tokenizer(corpora)
    return corpora
