"""Splits of documents, such as training, validation and test, by a hash of their text.

A document falls on the same side whatever the tokenizer, the file that it is in, and the other documents.
"""

import dataclasses
import fractions
import functools
import hashlib
import re
from typing import Any

from flexolmo_jax.errors import ArgumentError

DEFAULT_KEY = "flexolmo"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")
_HASHES = 1 << 64


@dataclasses.dataclass(frozen=True)
class Splits:
    """Names and shares of splits, and the key of the hash.

    Attributes:
      shares: of all documents, by name and in order, as decimal fractions whose sum is 1.
      key: of BLAKE2b, at most 64 bytes.
    """

    shares: dict[str, str]
    key: str = DEFAULT_KEY

    def index(self, text: str) -> int:
        """Returns the index of the split that a document falls into."""
        digest = hashlib.blake2b(text.encode(), digest_size=8, key=self.key.encode()).digest()
        value = int.from_bytes(digest, "little")
        return next(index for index, bound in enumerate(self._bounds) if value < bound)

    @functools.cached_property
    def _bounds(self) -> list[int]:
        """The hashes below which a document falls into each split, or one before it."""
        shares = [fractions.Fraction(share) for share in self.shares.values()]
        return [int(sum(shares[: index + 1]) * _HASHES) for index in range(len(shares))]

    def description(self, name: str) -> dict[str, Any]:
        """The record of a split in corpus.json."""
        return {"name": name, "shares": self.shares, "key": self.key}


def parse_splits(text: str, key: str = DEFAULT_KEY) -> Splits:
    """Reads "train:0.98,validation:0.01,test:0.01".

    Raises:
      ArgumentError: `split` has another form, a name occurs twice, or the shares do not add up to 1; or `split_key` is
        empty or longer than 64 bytes.
    """
    if not 0 < len(key.encode()) <= hashlib.blake2b.MAX_KEY_SIZE:
        raise ArgumentError("split_key", key, "give a word of 1 to 64 bytes")
    shares: dict[str, str] = {}
    for part in text.split(","):
        name, _, share = part.partition(":")
        if not _NAME.fullmatch(name) or not re.fullmatch(r"0?\.\d+|1", share) or not fractions.Fraction(share):
            raise ArgumentError("split", text, f"{part!r} is not NAME:SHARE, such as validation:0.01")
        if name in shares:
            raise ArgumentError("split", text, f"names {name!r} twice")
        shares[name] = share
    total = sum(map(fractions.Fraction, shares.values()))
    if total != 1:
        raise ArgumentError("split", text, f"its shares add up to {float(total):g}, not 1")
    return Splits(shares, key)
