"""Incremental decoding: the text of tokens that are generated one after another.

A decoder of `tokenizer.json` may remove or add spaces, join words, or hold bytes until they form a character. So the
text of a token depends on the tokens before it, and sometimes on the next one. `IncrementalDecoder` returns text once
no later token can change it; all text that it returns, and its `tail`, are together what `Tokenizer.decode` returns.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from flexolmo_jax.data.tokenization.tokenizer import Tokenizer, special_ids

REPLACEMENT = "\ufffd"  # the text of bytes that are not, or not yet, a whole character
_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")
# The beginning of a text is final after a few more tokens if the decoder consists of stages that map a list of tokens
# to another from left to right, at most one stage that joins them, and stages that strip the ends of the joined text.
_LISTS = {"Replace", "Strip", "WordPiece", "Metaspace", "CTC", "ByteFallback"}
_JOINS = {"Fuse", "ByteLevel"}


class IncrementalDecoder:
    """Decodes tokens as they are generated; the texts that `add` returns, and `tail`, are the text of all tokens."""

    def __init__(self, tokenizer: Tokenizer):
        """Starts without tokens."""
        self._decode, self._rules = tokenizer.decode, _rules(tokenizer)
        self._ids: list[int] = []  # decoded together: a few tokens of final text, for context, and those after them
        self._known = 0  # of `_ids`
        self._returned = 0  # characters of their text

    def add(self, ids: Sequence[int]) -> str:
        """Adds tokens; returns the new text that no later token can change."""
        self._ids += (id for id in ids if id in self._rules.shown)
        if not self._rules.settles or not self._ids or self._ids[-1] in self._rules.bytes:
            return ""
        text = self._decode(self._ids)
        settled = self._rules.settled(text, lambda id: self._decode([*self._ids, id]))
        new, self._returned = settled[self._returned :], max(self._returned, len(settled))
        if settled == text:
            self._drop_final()
        return new

    @property
    def tail(self) -> str:
        """The rest of the text, if no token follows."""
        return self._decode(self._ids)[self._returned :]

    def _drop_final(self) -> None:
        """Drops tokens of final text, except the last ones with visible text, which are the context of the next."""
        context = self._ids[self._known :]
        text = self._decode(context)
        if text:
            self._ids, self._returned = context, len(text)
        self._known = len(self._ids)


def common_prefix(first: str, second: str) -> str:
    """The longest common prefix of two texts."""
    places = zip(first, second, strict=False)
    return first[: next((i for i, (a, b) in enumerate(places) if a != b), min(len(first), len(second)))]


@dataclasses.dataclass(frozen=True)
class _Rules:
    """Properties of a tokenizer's decoder.

    Attributes:
      shown: ids that decoding does not skip.
      settles: whether the beginning of a text becomes final while tokens are added; else only the whole text is.
      bytes: ids of bytes that are decoded together with neighbouring bytes.
      joins_bytes: whether several tokens may form one character.
      next: a token to append for look-ahead, where the text of the last token depends on whether another follows.
    """

    shown: frozenset[int]
    settles: bool
    bytes: frozenset[int]
    joins_bytes: bool
    next: int | None

    def settled(self, text: str, with_next: Callable[[int], str]) -> str:
        """Returns the final beginning of a text; `with_next` returns the text with one more token."""
        if self.next is not None:
            text = common_prefix(text, with_next(self.next))
        return text.rstrip(REPLACEMENT) if self.joins_bytes else text


@functools.lru_cache(maxsize=8)
def _rules(tokenizer: Tokenizer) -> _Rules:
    backend = tokenizer.backend
    stages = list(_flat(json.loads(backend.decoder.__getstate__()))) if backend.decoder else []
    kinds = [stage["type"] for stage in stages]
    vocabulary = backend.get_vocab(with_added_tokens=True)
    shown = set(vocabulary.values()) - set(special_ids(tokenizer.plain).values())
    bytes_ = {id for name, id in vocabulary.items() if _BYTE.fullmatch(name)} if "ByteFallback" in kinds else set()
    looks_ahead = "BPEDecoder" in kinds
    return _Rules(
        shown=frozenset(shown),
        settles=_settles(stages, kinds),
        bytes=frozenset(bytes_),
        joins_bytes="ByteLevel" in kinds,
        next=min(shown - bytes_, default=None) if looks_ahead else None,
    )


def _settles(stages: Sequence[Mapping[str, Any]], kinds: Sequence[str]) -> bool:
    join = next((place for place, kind in enumerate(kinds) if kind in _JOINS), len(kinds))
    lists, ends = kinds[:join], kinds[join + 1 :]
    if not set(ends) <= {"Fuse", "Strip"}:
        return False
    if "BPEDecoder" in lists:  # it looks at the next token, which another stage may have changed
        return lists == ["BPEDecoder"]
    if "ByteFallback" in lists:  # stages before it must not change the names of bytes
        place = lists.index("ByteFallback")
        if "ByteFallback" in lists[place + 1 :] or not all(map(_leaves_bytes, stages[:place])):
            return False
    return set(lists) <= _LISTS


def _leaves_bytes(stage: Mapping[str, Any]) -> bool:
    text = stage["pattern"].get("String") if stage["type"] == "Replace" else None
    return text is not None and not set(text + stage["content"]) & set("<0x123456789abcdefABCDEF>")


def _flat(decoder: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The stages of a decoder in order."""
    if decoder["type"] != "Sequence":
        yield decoder
        return
    for stage in decoder["decoders"]:
        yield from _flat(stage)
