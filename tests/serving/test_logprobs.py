"""Strings of tokens and where they start, for tokenizers of every kind."""

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from flexolmo_jax.data.tokenization.tokenizer import Tokenizer, byte_tokenizer
from flexolmo_jax.inference.request import TokenLogprobs
from flexolmo_jax.serving.logprobs import TextOffsets, TokenStrings, chat_logprobs, completion_logprobs

WORDS = {"<s>": 0, "▁a": 1, "▁b": 2, "c": 3, "<0xE2>": 4, "<0x80>": 5, "<0x94>": 6, "<0x41>": 7, "é": 8}


def fallback():
    """Subwords with "▁" for a space, and bytes, as Llama 2 has them."""
    backend = tokenizers.Tokenizer(models.BPE(vocab=WORDS, merges=[], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens(["<s>"])
    return Tokenizer(backend, 0)


def word_piece():
    vocabulary = {"[EOS]": 0, "play": 1, "##ing": 2, ".": 3}
    backend = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[EOS]"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    backend.add_special_tokens(["[EOS]"])
    return Tokenizer(backend, 0)


@pytest.mark.parametrize(
    ("tokenizer", "ids", "texts", "contents"),
    [
        (
            byte_tokenizer(),
            [97, 0xE2, 10, 256, 300],
            ["a", "bytes:\\xe2", "\n", "<|endoftext|>", "token_id:300"],
            [b"a", b"\xe2", b"\n", b"<|endoftext|>", b""],
        ),
        (
            fallback(),
            [0, 1, 3, 4, 7, 8],
            ["<s>", " a", "c", "bytes:\\xe2", "A", "é"],
            [b"<s>", b" a", b"c", b"\xe2", b"A", "é".encode()],
        ),
        (word_piece(), [1, 2, 0], [" play", "ing", "[EOS]"], [b" play", b"ing", b"[EOS]"]),
    ],
)
def test_a_token_has_the_string_that_it_adds_to_a_text(tokenizer, ids, texts, contents):
    strings = TokenStrings(tokenizer)
    assert [strings.text(id) for id in ids] == texts
    assert [strings.bytes(id) for id in ids] == contents


def test_every_byte_has_a_string_of_its_own():
    strings = TokenStrings(byte_tokenizer())
    assert len({strings.text(id) for id in range(257)}) == 257
    assert [strings.bytes(id) for id in range(256)] == [bytes([id]) for id in range(256)]


@pytest.mark.parametrize("text", ["plain", "naïve — 日本 🙂", ""])
def test_offsets_are_where_characters_start(text):
    ids = [256, *text.encode()]
    offsets = TextOffsets(byte_tokenizer().decode)
    expected = [0, *(at for at, character in enumerate(text) for _ in character.encode())]
    assert [offsets.next(id) for id in ids] == expected


def test_offsets_after_a_prompt_start_at_0_with_its_spaces():
    decode = fallback().decode
    offsets = TextOffsets(decode, [0, 1, 3])
    assert [offsets.next(id) for id in (2, 3, 4, 5, 6, 3)] == [0, 2, 3, 3, 3, 4]
    assert decode([0, 1, 3, 2, 3, 4, 5, 6, 3])[len(decode([0, 1, 3])) :] == " bc—c"


def test_bytes_that_are_no_text_do_not_hold_up_the_offsets():
    offsets = TextOffsets(byte_tokenizer().decode)
    found = [offsets.next(id) for id in [0xFF] * 40 + [97]]
    assert found == sorted(found)
    assert found[-1] >= 32


def told(ids, top_ids):
    """Some log probabilities."""
    chosen = -np.arange(1, len(ids) + 1, dtype=np.float32)
    return TokenLogprobs(
        ids, chosen, np.array(top_ids), -np.arange(1, 1 + np.size(top_ids), dtype=np.float32).reshape(-1, 2)
    )


def test_objects_are_those_of_openai():
    strings = TokenStrings(byte_tokenizer())
    logprobs = told([98, 0xE2], [[97, 98], [0xE2, 0xE3]])
    assert completion_logprobs(logprobs, strings, [3, 4]) == {
        "tokens": ["b", "bytes:\\xe2"],
        "token_logprobs": [-1, -2],
        "top_logprobs": [{"a": -1, "b": -2}, {"bytes:\\xe2": -3, "bytes:\\xe3": -4}],
        "text_offset": [3, 4],
    }
    first, second = chat_logprobs(logprobs, strings)["content"]
    assert first == {
        "token": "b",
        "logprob": -1,
        "bytes": [98],
        "top_logprobs": [{"token": "a", "logprob": -1, "bytes": [97]}, {"token": "b", "logprob": -2, "bytes": [98]}],
    }
    assert second["bytes"] == [0xE2]


def test_what_has_no_log_probability_is_null_and_the_token_itself_is_always_among_the_likeliest():
    logprobs = told([256, 99], [[-1, -1], [97, 98]])
    logprobs.chosen_N[0] = np.nan
    found = completion_logprobs(logprobs, TokenStrings(byte_tokenizer()), [0, 0])
    assert found["token_logprobs"] == [None, -2]
    assert found["top_logprobs"] == [None, {"a": -3, "b": -4, "c": -2}]


def test_tokens_of_one_text_are_told_apart():
    """The letter A is a token, and a byte."""
    backend = tokenizers.Tokenizer(models.BPE(vocab=WORDS | {"A": 9}, merges=[], byte_fallback=True))
    backend.decoder = fallback().backend.decoder
    found = completion_logprobs(told([9], [[7, 9]]), TokenStrings(Tokenizer(backend, 0)), [0])
    assert found["top_logprobs"] == [{"A": -1, "token_id:9": -2}]
