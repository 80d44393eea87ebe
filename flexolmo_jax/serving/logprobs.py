"""Log probabilities as the OpenAI API writes them, for completions and for chat completions."""

import functools
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from flexolmo_jax.data.tokenization.decoding import REPLACEMENT
from flexolmo_jax.data.tokenization.tokenizer import Tokenizer, byte_tokenizer
from flexolmo_jax.inference.request import TokenLogprobs

_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")  # how tokenizers with byte fallback write a byte
_CONTEXT = 8  # tokens; no character, and no decoder's rule about neighbours, spans more


class TokenStrings:
    """The string of each token, by itself: what it adds to a text in the middle of which it stands."""

    def __init__(self, tokenizer: Tokenizer):
        """Looks at how the tokenizer decodes."""
        self._tokenizer, self._backend = tokenizer, tokenizer.backend
        decoder = json.dumps(json.loads(tokenizer.backend.to_str())["decoder"])
        self._special = tokenizer.backend.get_added_tokens_decoder()
        # The byte tokenizer's ids are the bytes, its tokens the characters that stand for them.
        vocabulary = byte_tokenizer().backend.get_vocab(with_added_tokens=False)
        self._byte_of = vocabulary if '"ByteLevel"' in decoder else {}
        self._fallback = '"ByteFallback"' in decoder

    @functools.lru_cache(maxsize=2**16)  # noqa: B019  one object lives as long as the server
    def bytes(self, id: int) -> bytes:
        """The bytes of a token, which need not be whole characters; none where the tokenizer has no such token."""
        token = self._backend.id_to_token(id)
        if token is None:
            return b""
        if id in self._special:
            return token.encode()
        if self._byte_of and all(character in self._byte_of for character in token):
            return bytes(self._byte_of[character] for character in token)
        if self._fallback and (byte := _BYTE.fullmatch(token)):
            return bytes.fromhex(byte[1])
        once = self._tokenizer.plain.decode([id], skip_special_tokens=False)
        twice = self._tokenizer.plain.decode([id, id], skip_special_tokens=False)
        return (twice[len(once) :] if twice.startswith(once) and len(twice) > len(once) else once).encode()

    def text(self, id: int) -> str:
        r"""The text of a token; `bytes:\xe2\x80` where its bytes are no text, `token_id:7` where it has none."""
        content = self.bytes(id)
        try:
            return content.decode() or f"token_id:{id}"
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


class TextOffsets:
    """Where each of the tokens that come one after another starts in their text, in characters."""

    def __init__(self, decode: Callable[[Sequence[int]], str], before: Sequence[int] = ()):
        """Tokens `before` those that are to come belong to no text, and help to decode it."""
        self._decode, self._offset = decode, 0
        self._ids, self._read = list(before[-_CONTEXT:]), len(before[-_CONTEXT:])

    def next(self, id: int) -> int:
        """Where this token starts; within a character, where the character starts."""
        offset = self._offset
        self._ids.append(id)
        text = self._decode(self._ids)
        if not text.endswith(REPLACEMENT) or len(self._ids) - self._read >= _CONTEXT:
            self._offset += len(text) - len(self._decode(self._ids[: self._read]))
            self._ids = self._ids[self._read :]
            self._read = len(self._ids)
        return offset


def completion_logprobs(logprobs: TokenLogprobs, strings: TokenStrings, offsets: Iterable[int]) -> dict[str, Any]:
    """The `logprobs` of a choice of `/v1/completions`; the top tokens include the chosen one."""

    def named(id: int, logprob: float, top_tokens: list[tuple[int, float]]) -> dict[str, float] | None:
        if math.isnan(logprob):
            return None
        by_name: dict[str, tuple[int, float]] = {}
        for other, other_logprob in [*top_tokens, (id, logprob)]:
            name = strings.text(other)
            # Two tokens may be the same text.
            name = name if by_name.get(name, (other,))[0] == other else f"token_id:{other}"
            by_name.setdefault(name, (other, other_logprob))
        return {name: value for name, (_, value) in by_name.items()}

    top = list(map(named, logprobs.token_ids, logprobs.chosen_N.tolist(), _top_tokens(logprobs)))
    return {
        "tokens": [strings.text(id) for id in logprobs.token_ids],
        "token_logprobs": [None if math.isnan(x) else x for x in logprobs.chosen_N.tolist()],
        "top_logprobs": top,
        "text_offset": list(offsets),
    }


def chat_logprobs(logprobs: TokenLogprobs, strings: TokenStrings) -> dict[str, Any]:
    """The `logprobs` of a choice of `/v1/chat/completions`."""

    def entry(id: int, logprob: float) -> dict[str, Any]:
        return {"token": strings.text(id), "logprob": logprob, "bytes": list(strings.bytes(id))}

    content = [
        entry(id, logprob) | {"top_logprobs": [entry(*other) for other in top_tokens]}
        for id, logprob, top_tokens in zip(
            logprobs.token_ids, logprobs.chosen_N.tolist(), _top_tokens(logprobs), strict=True
        )
    ]
    return {"content": content, "refusal": None}


def _top_tokens(logprobs: TokenLogprobs) -> list[list[tuple[int, float]]]:
    """(id, log probability) of the top tokens at each position, in descending order."""
    return [
        list(zip(*pair, strict=True))
        for pair in zip(logprobs.top_ids_NxK.tolist(), logprobs.top_NxK.tolist(), strict=True)
    ]
