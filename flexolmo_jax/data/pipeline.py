"""Corpora to batches, on grain.

A batch is a dict of int32 arrays [batch, length]:

- `tokens`: the model's inputs. For a document d0 .. dn, EOS they are EOS, d0 .. dn.
- `targets`: the next tokens: d0 .. dn, EOS. So each token of a document, including the first and EOS, is a target
  exactly once.
- `segment_ids`: the document of the sequence that a token belongs to, from 1; 0 is padding. The stream of documents is
  split into sequences at fixed intervals, so the first and last segments may be incomplete documents.
- `positions`: from 0 in each segment. A document that continues in the next sequence starts from 0 there, without
  attention to its beginning.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import grain
import numpy as np

from flexolmo_jax.data.corpus import Corpus
from flexolmo_jax.errors import UserError

Batch = dict[str, np.ndarray]
ARRAYS = ("tokens", "targets", "segment_ids", "positions")  # of a batch
_PAIR = "pair"


def training_batches(
    corpora: Sequence[tuple[Sequence[Corpus], float]], length: int, batch_size: int, seed: int
) -> grain.DatasetIterator[Batch]:
    """Returns endless batches of packed documents, every epoch of a group in a new order.

    The corpora of a group form one set of documents. Groups are packed separately and mixed sequence by sequence, in a
    fixed pattern in which every interval has each group's share (grain rounds the weights to hundredths of the smallest
    one).

    Batches are not sharded here: every process runs the same pipeline over the global batch, and the training loop
    takes the sequences of its process. So batches do not depend on the number of processes or devices.

    `get_state()` is JSON; an iterator made with the same arguments resumes from it exactly (`set_state`). There is no
    prefetching thread: a batch is made while the device runs the previous step.

    Args:
      corpora: groups of corpora and each group's weight, its share of sequences relative to the others.
      length: tokens of a sequence.
      batch_size: sequences of a batch, over all processes.
      seed: of the documents' order, a non-negative integer.

    Raises:
      UserError: there is no corpus, a weight is not positive, or two corpora have different tokenizers. While batches
        are made: an id of one is outside the vocabulary.
    """
    _check(corpora)
    sequences = [
        _sequences(_shuffled(group, np.random.SeedSequence([seed, index])), group[0].eos_id, length)
        for index, (group, _) in enumerate(corpora)
    ]
    mixed = grain.IterDataset.mix(sequences, [weight for _, weight in corpora])
    split = _batch_maker([corpus for group, _ in corpora for corpus in group])
    return iter(mixed.batch(batch_size, drop_remainder=True).map(split))


def evaluation_batches(corpus: Corpus, length: int, batch_size: int) -> grain.DatasetIterator[Batch]:
    """Returns batches that hold every token of a corpus as a target exactly once, in order.

    The last batch is filled up with padding (segment id 0), so all have the shape [batch_size, length].

    Raises:
      UserError: while batches are made: an id of one is outside the vocabulary.
    """
    sequences = _sequences(grain.MapDataset.source(corpus), corpus.eos_id, length)
    pad = functools.partial(grain.experimental.batch_and_pad, batch_size=batch_size)
    return iter(sequences.batch(batch_size, batch_fn=pad).map(_batch_maker([corpus])))


def _check(corpora: Sequence[tuple[Sequence[Corpus], float]]) -> None:
    if not corpora or not all(group for group, _ in corpora):
        raise UserError("training data: a group has no corpus; name at least one corpus directory")
    first = corpora[0][0][0]
    for group, weight in corpora:
        if not (weight > 0 and math.isfinite(weight)):
            raise UserError(f"training data: {group[0].path} has weight {weight}; give a positive number")
        for corpus in group:
            if (corpus.tokenizer_digest, corpus.eos_id) != (first.tokenizer_digest, first.eos_id):
                raise UserError(f"{corpus.path}: its tokenizer is not that of {first.path}; tokenize both alike")


def _shuffled(group: Sequence[Corpus], seed: np.random.SeedSequence) -> grain.MapDataset[np.ndarray]:
    """Returns the documents of a group without end; grain shuffles every epoch anew."""
    documents = grain.MapDataset.concatenate([grain.MapDataset.source(corpus) for corpus in group])
    return documents.shuffle(seed=int(seed.generate_state(1)[0])).repeat()


def _sequences(documents: grain.MapDataset[np.ndarray], eos_id: int, length: int) -> grain.IterDataset[Batch]:
    """Packs documents into sequences of `length` pairs (token, target)."""
    # The files are memory-mapped: threads would only contend.
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    pairs = documents.map(functools.partial(_pair, eos_id=eos_id)).to_iter_dataset(options)
    return _JsonState(grain.experimental.ConcatThenSplitIterDataset(pairs, length_struct={_PAIR: length}))


def _pair(document: np.ndarray, eos_id: int) -> dict[str, np.ndarray]:
    """Pairs each token with the one before it, int32 [length, 2], so that both are packed alike."""
    pair_Lx2 = np.empty((len(document), 2), np.int32)
    pair_Lx2[0, 0] = eos_id
    pair_Lx2[1:, 0] = document[:-1]
    pair_Lx2[:, 1] = document
    return {_PAIR: pair_Lx2}


def _batch_maker(corpora: Sequence[Corpus]) -> Callable[[dict[str, np.ndarray]], Batch]:
    """Returns a function from packed pairs to a batch, which refuses ids outside the corpora's vocabulary."""
    vocab_size = corpora[0].vocab_size

    def split(batch: dict[str, np.ndarray]) -> Batch:
        # The whole batch is checked at once: with short documents, checking each would take a tenth of the time of
        # making a batch. An id above 2**31 is a negative int32, and a large uint32.
        if batch[_PAIR].view(np.uint32).max() >= vocab_size:
            for corpus in corpora:
                corpus.refuse_ids()
            raise UserError(f"{corpora[0].path}: its files changed while they were read; copy the corpus again")
        return {
            "tokens": np.ascontiguousarray(batch[_PAIR][..., 0]),
            "targets": np.ascontiguousarray(batch[_PAIR][..., 1]),
            "segment_ids": batch[f"{_PAIR}_segment_ids"],
            "positions": batch[f"{_PAIR}_positions"],
        }

    return split


class _JsonState(grain.IterDataset):
    """Packed sequences whose iterator state can be stored as JSON.

    The state of grain's packing holds a pair that it compares with a tuple; JSON makes it a list, which
    never compares equal, and documents would be lost on resuming.
    """

    def __iter__(self) -> grain.DatasetIterator:
        return _JsonStateIterator(iter(self._parent))


class _JsonStateIterator(grain.DatasetIterator):
    def __next__(self) -> Any:
        return next(self._parent)

    def get_state(self) -> dict[str, Any]:
        return self._parent.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        slices = {name: tuple(pair) for name, pair in state["remainder_slices"].items()}
        self._parent.set_state({**state, "remainder_slices": slices})
