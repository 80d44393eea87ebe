"""The order of the sequences of a stream: a closed form, with random access.

An endless stream, each repetition of T tokens, is divided into windows of K sequences of L tokens. Window w begins at
token w K L. Epoch e, a repetition, has the windows that begin in it, from ceil(e T / (K L)) on. Its sequences are
permuted. So no token is left out, none is padded, and what is at a place of the order needs no memory of
what came before.
"""

import hashlib
from typing import NamedTuple

ROUNDS = 6  # an even number


class Order(NamedTuple):
    """The order in which the sequences of a stream come.

    Attributes:
      tokens: of one repetition of the stream, T.
      length: tokens of a sequence, L.
      window: sequences of a window, K.
      seed: distinguishes the orders of streams, and of runs.
    """

    tokens: int
    length: int
    window: int
    seed: tuple[int, ...]

    def epoch(self, index: int) -> int:
        """The epoch of the sequence at a place of the order, from 0."""
        size = self.window * self.length
        return index // self.window * size // self.tokens

    def __call__(self, index: int) -> int:
        """Which sequence of the endless stream is at a place of the order."""
        epoch = self.epoch(index)
        first, end = self._first(epoch), self._first(epoch + 1)
        return first + permuted(index - first, end - first, (*self.seed, epoch))

    def _first(self, epoch: int) -> int:
        """The first sequence of an epoch."""
        return -(-epoch * self.tokens // (self.window * self.length)) * self.window


def permuted(index: int, count: int, seed: tuple[int, ...]) -> int:
    """Entry `index` of a pseudo-random permutation of range(count), in constant time and memory.

    A Feistel network of keyed hashes (Luby and Rackoff, 1988) permutes the smallest range of a power of two. It is
    repeated where it leaves range(count), which it comes back to.
    """
    bits = (count - 1).bit_length()
    low_bits = bits - bits // 2
    high_mask, low_mask = (1 << bits // 2) - 1, (1 << low_bits) - 1
    prefix = " ".join(map(str, seed))
    while True:
        high, low = index >> low_bits, index & low_mask
        for number in range(0, ROUNDS, 2):
            high ^= _hashed(f"{prefix} {number} {low}") & high_mask
            low ^= _hashed(f"{prefix} {number + 1} {high}") & low_mask
        index = high << low_bits | low
        if index < count:
            return index


def _hashed(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
