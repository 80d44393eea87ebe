"""Positions where a long text can be split into chunks that encode to the ids of the whole.

`tokenizers` needs some 100 bytes per byte of text, so a long text is encoded in chunks. A tokenizer matches its
added tokens, normalizes, pre-tokenizes, and runs its model on each pre-token alone. So a cut changes nothing if

- it lies between two pre-tokens whatever stands around it, and no rule of the pre-tokenizer looks across it;
- the normalizer changes nothing across it;
- no added token lies across it.

The first two are known for the components in the tables below, at two kinds of cuts:

- `_BEFORE_SPACE`: after anything but white space and before a space, which begins a pre-token everywhere;
- `_AFTER_WORD`: after a letter or digit of ASCII or a CJK ideograph, and before white space, or before punctuation of
  ASCII or CJK other than an apostrophe and an underscore. They compose with nothing, and the normalizers below leave
  letters letters and punctuation punctuation.

Any other tokenizer encodes a text whole.
"""

import itertools
import json
import re
from typing import Any

import tokenizers

from flexolmo_jax.data.text.bad_records import BadRecordError

CHUNK_CHARACTERS = 1 << 16
MAX_CHUNK_BYTES = 1 << 23

_ANYWHERE = frozenset([""])
_BEFORE_SPACE = r"(?<=\S)(?= )"
_AFTER_WORD = (
    r"(?<=[0-9A-Za-z\u4e00-\u9fff])(?=[\t\n\r -&(-/:-@\[-^`{-~\u3001\u3002\uff0c\uff01\uff1f\uff1a\uff1b\u300c\u300d])"
)
_SPACES = frozenset([_BEFORE_SPACE])
_WORDS = frozenset([_BEFORE_SPACE, _AFTER_WORD])

_NORMALIZERS = {"NFC", "NFD", "NFKC", "NFKD", "Lowercase"}
# The patterns of GPT-2, of GPT-4 (cl100k: OLMo 2, Llama 3, Qwen; two ways to write it) and of GPT-4o (o200k). None of
# their alternatives matches something and then a space, or a letter or digit and then white space or punctuation other
# than an apostrophe; none looks behind; only white space looks ahead. So any choice of them will do.
_PATTERNS = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|\p{N}|\p{N}+| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+",
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s*[\r\n]|\s++$|\s",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*",
)


class Splitter:
    """Splits texts for one tokenizer."""

    def __init__(self, backend: tokenizers.Tokenizer):
        spec = json.loads(backend.to_str())
        self._normalizer = backend.normalizer
        cuts = sorted(_cuts(spec))
        self._pattern = re.compile("|".join(cuts)) if cuts else None
        # Special tokens are not looked for in texts, but hide others that they overlap.
        tokens = [token["content"] for token in spec["added_tokens"] if _has_plain_tokens(spec)]
        self._tokens = {form for token in tokens for form in (token, self._normalize(token)) if form}
        self._longest = max(map(len, self._tokens), default=0)

    def chunk_ends(self, text: str) -> list[int]:
        """Returns the ends of the chunks of a text, in order; the last is the end of the text, and "" has none.

        Raises:
          BadRecordError: a chunk would be too large to encode.
        """
        ends = []
        while (start := ends[-1] if ends else 0) < len(text):
            end = self._end(text, start)
            if (end - start) * 4 > MAX_CHUNK_BYTES and len(text[start:end].encode()) > MAX_CHUNK_BYTES:
                raise BadRecordError(
                    f"has more than {MAX_CHUNK_BYTES >> 20} MiB from character {start} on that this tokenizer can "
                    "only encode at once; split the text into documents",
                    "too long",
                )
            ends.append(end)
        return ends

    def _end(self, text: str, start: int) -> int:
        limit = start + CHUNK_CHARACTERS
        if limit >= len(text) or self._pattern is None:
            return len(text)
        reach = 256
        while True:  # the last cut before the limit, looked for in ever longer stretches before it
            low = max(start + 1, limit - reach)
            for place in reversed([match.start() for match in self._pattern.finditer(text, low, limit)]):
                if self._is_clear(text, place):
                    return place
            if low == start + 1:
                break
            reach *= 8
        places = (match.start() for match in self._pattern.finditer(text, limit))
        return next((place for place in places if self._is_clear(text, place)), len(text))

    def _is_clear(self, text: str, place: int) -> bool:
        """Whether no added token lies across a cut."""
        if not self._tokens:
            return True
        left, right = text[max(0, place - self._longest) : place], text[place : place + self._longest]
        normalized = self._normalize(left), self._normalize(right)
        return not any(_lies_across(token, *sides) for token in self._tokens for sides in ((left, right), normalized))

    def _normalize(self, text: str) -> str:
        return text if self._normalizer is None else self._normalizer.normalize_str(text)


def _lies_across(token: str, left: str, right: str) -> bool:
    reach = len(token) - 1
    return token in left[max(0, len(left) - reach) :] + right[:reach]


def _cuts(spec: dict[str, Any]) -> frozenset[str]:
    """Returns the patterns of the cuts that change nothing for the tokenizer of a tokenizer.json."""
    if not (_composes_locally(spec["normalizer"]) and _tokens_are_local(spec)):
        return frozenset()
    if _is_character_by_character(spec):
        return _ANYWHERE
    cuts, splits = _pre_tokenizer_cuts(spec["pre_tokenizer"])
    return cuts if splits else frozenset()


def _is_character_by_character(spec: dict[str, Any]) -> bool:
    plain = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    model, pre_tokenizer = spec["model"], spec["pre_tokenizer"] or {}
    return (
        spec["normalizer"] is None
        and not _has_plain_tokens(spec)
        and plain.items() <= pre_tokenizer.items()
        and model["type"] == "BPE"
        and not any(
            model.get(key)
            for key in ("merges", "ignore_merges", "fuse_unk", "continuing_subword_prefix", "end_of_word_suffix")
        )
    )


def _pre_tokenizer_cuts(part: dict[str, Any] | None) -> tuple[frozenset[str], bool]:
    """Returns the cuts that a pre-tokenizer does not look across, and whether it splits at all of them."""
    match part or {}:
        case {"type": "Sequence", "pretokenizers": stages}:
            cuts, splits = zip(*map(_pre_tokenizer_cuts, stages), strict=True)
            return frozenset.intersection(*cuts), any(splits)
        case {"type": "ByteLevel", "add_prefix_space": prefix, "use_regex": splits}:
            return _SPACES if prefix else _WORDS, splits
        case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": invert}:
            keeps_all = behavior == "Isolated" or (behavior == "Removed" and invert)
            return (_WORDS, True) if keeps_all and _alternatives(pattern) <= _ALTERNATIVES else (frozenset(), False)
        case {"type": "Whitespace"}:
            return _WORDS, True
        case {"type": "WhitespaceSplit"} | {"type": "Metaspace", "split": True}:
            return _SPACES, True
        case {"type": "Digits"}:
            return _WORDS, False
    return frozenset(), False


def _alternatives(pattern: str) -> set[str]:
    """Splits a regular expression at the bars that stand in no group."""
    atoms = re.findall(r"\\.|\[(?:\\.|[^\]])*\]|.", pattern, re.DOTALL)
    depths = itertools.accumulate({"(": 1, ")": -1}.get(atom, 0) for atom in atoms)
    outer = ["\n" if atom == "|" and not depth else atom for atom, depth in zip(atoms, depths, strict=True)]
    return set("".join(outer).split("\n"))


_ALTERNATIVES = set().union(*map(_alternatives, _PATTERNS))


def _composes_locally(normalizer: dict[str, Any] | None) -> bool:
    if normalizer is None:
        return True
    if normalizer["type"] == "Sequence":
        return all(map(_composes_locally, normalizer["normalizers"]))
    return normalizer["type"] in _NORMALIZERS


def _has_plain_tokens(spec: dict[str, Any]) -> bool:
    """Whether there are added tokens that are looked for in texts, as special ones are not."""
    return any(not token["special"] for token in spec["added_tokens"])


def _tokens_are_local(spec: dict[str, Any]) -> bool:
    """Whether what an added token matches is its own characters, each of which comes from one of the text."""
    plain = [token for token in spec["added_tokens"] if not token["special"]]
    looks_around = any(token["lstrip"] or token["rstrip"] or token["single_word"] for token in plain)
    may_compose = plain and spec["normalizer"] and not all(t["content"].isascii() for t in spec["added_tokens"])
    return not looks_around and not may_compose
