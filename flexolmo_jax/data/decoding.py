"""The text of tokens that come one after another, decoded a few at a time.

A decoder of `tokenizer.json` may remove or add spaces, join words, or hold bytes until they are a character. So the
text of a token depends on what stands before it, and sometimes on what comes next. `IncrementalDecoder` gives text once
no later token can change it; all that it gives, with its `tail`, is just what `Tokenizer.decode` makes of all tokens.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flexolmo_jax.data.special_tokens import special_ids
from flexolmo_jax.data.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"  # what bytes decode to that are no whole character, or none yet
_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")
# What a decoder may be so that a text's beginning stands once a few tokens more are known: parts that turn a list of
# tokens into another from left to right, at most one that joins them, and those that strip the ends of what was joined.
_LISTS = {"Replace", "Strip", "WordPiece", "Metaspace", "CTC", "ByteFallback"}
_JOINS = {"Fuse", "ByteLevel"}


class IncrementalDecoder:
    """Decodes tokens as they come; `text` of one `add` after another, and `tail`, make up the text of all of them."""

    def __init__(self, tokenizer: Tokenizer):
        """Starts with no token."""
        self._decode, self._rules = tokenizer.decode, _rules(tokenizer)
        self._ids: list[int] = []  # those decoded together: some whose text is known, for context, and what follows
        self._known = 0  # of `_ids`
        self._given = 0  # characters of their text

    def add(self, ids: Sequence[int]) -> str:
        """Takes tokens; returns what they add to the text that no later token can change."""
        self._ids += (id for id in ids if id in self._rules.shown)
        if not self._rules.settles or not self._ids or self._ids[-1] in self._rules.bytes:
            return ""
        text = self._decode(self._ids)
        settled = self._rules.settled(text, lambda id: self._decode([*self._ids, id]))
        new, self._given = settled[self._given :], max(self._given, len(settled))
        if settled == text:
            self._move_on()
        return new

    @property
    def tail(self) -> str:
        """The rest of the text, if no token follows."""
        return self._decode(self._ids)[self._given :]

    def _move_on(self) -> None:
        """Forgets tokens, all but the last whose text can be seen: what follows them follows in the same way."""
        context = self._ids[self._known :]
        text = self._decode(context)
        if text:
            self._ids, self._given = context, len(text)
        self._known = len(self._ids)


def common_prefix(first: str, second: str) -> str:
    """The longest text with which both begin."""
    places = zip(first, second, strict=False)
    return first[: next((i for i, (a, b) in enumerate(places) if a != b), min(len(first), len(second)))]


@dataclasses.dataclass(frozen=True)
class _Rules:
    """How the text of a tokenizer's tokens comes to be.

    Attributes:
      shown: ids that decoding does not skip.
      settles: whether a text's beginning stands while tokens are added; else all of it may change to the end.
      bytes: ids of bytes that are decoded together with those beside them.
      joins_bytes: whether any tokens may be parts of a character.
      next: a token to look ahead with, where the last token's text differs from what it is when another follows.
    """

    shown: frozenset[int]
    settles: bool
    bytes: frozenset[int]
    joins_bytes: bool
    next: int | None

    def settled(self, text: str, with_next) -> str:
        """What stands of the text of tokens; `with_next` gives the text of them and one more."""
        if self.next is not None:
            text = common_prefix(text, with_next(self.next))
        return text.rstrip(REPLACEMENT) if self.joins_bytes else text


@functools.lru_cache(maxsize=8)
def _rules(tokenizer: Tokenizer) -> _Rules:
    backend = tokenizer.backend
    parts = list(_flat(json.loads(backend.decoder.__getstate__()))) if backend.decoder else []
    kinds = [part["type"] for part in parts]
    vocabulary = backend.get_vocab(with_added_tokens=True)
    shown = set(vocabulary.values()) - set(special_ids(tokenizer.plain).values())
    bytes_ = {id for name, id in vocabulary.items() if _BYTE.fullmatch(name)} if "ByteFallback" in kinds else set()
    looks_ahead = "BPEDecoder" in kinds
    return _Rules(
        shown=frozenset(shown),
        settles=_settles(parts, kinds),
        bytes=frozenset(bytes_),
        joins_bytes="ByteLevel" in kinds,
        next=min(shown - bytes_, default=None) if looks_ahead else None,
    )


def _settles(parts: Sequence[Mapping[str, Any]], kinds: Sequence[str]) -> bool:
    join = next((place for place, kind in enumerate(kinds) if kind in _JOINS), len(kinds))
    lists, ends = kinds[:join], kinds[join + 1 :]
    if not set(ends) <= {"Fuse", "Strip"}:
        return False
    if "BPEDecoder" in lists:  # it looks at the next token, which another part may have changed
        return lists == ["BPEDecoder"]
    if "ByteFallback" in lists:  # what comes before it must leave the names of bytes as they are
        place = lists.index("ByteFallback")
        if "ByteFallback" in lists[place + 1 :] or not all(map(_leaves_bytes, parts[:place])):
            return False
    return set(lists) <= _LISTS


def _leaves_bytes(part: Mapping[str, Any]) -> bool:
    text = part["pattern"].get("String") if part["type"] == "Replace" else None
    return text is not None and not set(text + part["content"]) & set("<0x123456789abcdefABCDEF>")


def _flat(decoder: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The parts of a decoder in their order."""
    if decoder["type"] != "Sequence":
        yield decoder
        return
    for part in decoder["decoders"]:
        yield from _flat(part)
