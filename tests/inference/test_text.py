"""Text that streams: for every kind of tokenizer, just what decoding all tokens at once adds to the prompt's text."""

import functools
import itertools
import random

import pytest
import tokenizers

from flexolmo_jax.data.tokenization.tokenizer import byte_tokenizer
from flexolmo_jax.inference.text import TextStream
from tests.support import kinds

TEXT = "naïve — 日本 🙂 done"
PANICS = ("strip_both_ends", "strip_each_token", "byte_level_stripped")  # where `tokenizers` strips what is too short


@pytest.fixture(params=kinds.KINDS)
def kind(request):
    return request.param


@pytest.fixture
def tokenizer(kind, tmp_path):
    return kinds.load(kind, tmp_path)


def reference(kind, tokenizer):
    """Decodes all tokens at once: as `tokenizers` does, where the file marks EOS as special and nothing panics."""
    if kind in (*PANICS, "word_level"):
        return tokenizer.decode
    return functools.partial(tokenizers.Tokenizer.from_str(kinds.make(kind)).decode, skip_special_tokens=True)


def random_ids(tokenizer, rng):
    """EOS, and tokens of a text, of anything, of bytes or of a few: ids without a token are among them."""
    bytes_ = [tokenizer.backend.token_to_id(name) or 0 for name in kinds.BYTES]
    few = rng.choices(range(tokenizer.vocab_size), k=3)
    ids = [tokenizer.eos_id]
    for _ in range(rng.randrange(1, 12)):
        text = rng.choice([*kinds.TEXTS, *kinds.HARD])
        start = rng.randrange(len(text))
        anything = rng.choices(range(tokenizer.vocab_size + 2), k=3)
        ids += rng.choice([kinds.ids(tokenizer, text[start : start + 9]), anything, rng.choices(bytes_, k=4), few])
    return ids


def examples(tokenizer, decode, seed, count):
    """(prompt, new tokens, the text that they add) of random tokens."""
    rng = random.Random(seed)
    for _ in range(count):
        ids = random_ids(tokenizer, rng)
        cut = rng.randrange(1, len(ids) + 1)
        before, whole = decode(ids[:cut]), decode(ids)
        same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(before, whole, strict=False))
        yield ids[:cut], ids[cut:], whole[len(list(same)) :]


def stream(tokenizer, prompt, new, stop=(), rng=None):
    """Reads new tokens a few at a time; returns (stream, what came at each step, whether a stop string was found)."""
    text, chunks, stopped, count = TextStream(tokenizer, stop, prompt), [], False, 0
    while not stopped and (count < len(new) or not chunks):
        count = min(count + (rng.randrange(1, 4) if rng else 1), len(new))
        chunk, stopped = text.read(new[:count], count == len(new))
        chunks.append(chunk)
    assert "".join(chunks) == text.text
    return text, chunks, stopped


def test_streamed_text_is_what_all_tokens_decode_to_without_the_prompts(kind, tokenizer):
    decode, rng = reference(kind, tokenizer), random.Random(1)
    early = 0
    for prompt, new, expected in examples(tokenizer, decode, kind, 60):
        text, chunks, _ = stream(tokenizer, prompt, new, rng=rng)
        assert text.text == expected
        assert decode([*prompt, *new]).startswith(text.prompt)
        assert decode(prompt).startswith(text.prompt)
        early += len("".join(chunks[:-1]))
    assert (early == 0) == (kind in kinds.WHOLE)


def test_the_first_stop_string_in_that_text_ends_it(kind, tokenizer):
    decode, rng = reference(kind, tokenizer), random.Random(2)
    for prompt, new, whole in examples(tokenizer, decode, kind[::-1], 40):
        at = rng.choices(range(len(whole)), k=rng.randrange(1, 4)) if whole else []
        stops = ["not there", *(whole[start : start + rng.choice([1, 2, 3, 7])] for start in at)]
        first = min((whole.find(stop) for stop in stops if stop in whole), default=len(whole))
        text, _, stopped = stream(tokenizer, prompt, new, stops)
        assert text.text == whole[:first]
        assert stopped == bool(at)


@pytest.mark.parametrize(
    ("data", "cut", "expected"),
    [
        (b"caf\xc3\xa9!", 4, "é!"),  # half a character in the prompt
        (b"caf\xc3!", 4, "!"),
        (b"caf\xc3", 4, ""),
        (b"ab\xff\xffcd", 3, "\ufffdcd"),
        ("a\ufffdb".encode(), 1, "\ufffdb"),  # the character itself
        ("a\ufffdb".encode(), 2, "b"),  # half of it has the same text
        ("a\ufffd\ufffd".encode(), 1, "\ufffd\ufffd"),
    ],
)
def test_a_prompt_that_ends_within_a_character(data, cut, expected):
    text, _, _ = stream(byte_tokenizer(), list(data[:cut]), list(data[cut:]))
    assert text.text == expected
    assert data.decode(errors="replace").startswith(text.prompt)


@pytest.mark.parametrize(
    ("prompt", "new", "stop", "expected"),
    [
        ("one tw", "o two", ["two"], "o "),  # the first begins in the prompt
        ("one two", " two", ["two"], " "),
        ("ab", "cabd", ["abd", "bc"], "c"),
        ("", "xabcy", ["c", "abcd", "abc"], "x"),  # the one that begins first, though another ends before it
        ("", "xabcy", ["c", "abcd"], "xab"),
        ("", "xabc", ["c", "abcd"], "xab"),
    ],
)
def test_a_stop_string_begins_and_ends_in_the_continuation(prompt, new, stop, expected):
    text, _, stopped = stream(byte_tokenizer(), list(prompt.encode()), list(new.encode()), stop)
    assert (text.text, stopped) == (expected, True)


def chunks(data, stop=()):
    """Reads bytes one by one; returns (what came at each, whether a stop string was found)."""
    _, out, stopped = stream(byte_tokenizer(), [], list(data), stop)
    return out, stopped


def test_no_character_is_cut():
    out, _ = chunks(TEXT.encode())
    assert "".join(out) == TEXT
    assert [len(chunk) for chunk in out if chunk] == [1] * len(TEXT)


@pytest.mark.parametrize("data", [b"\xff\xfeab\xe2\x82", b"\xf0\x9f\x99", b"a\xe2\x82z\xff"])
def test_bytes_that_are_no_text_are_shown_as_replacements(data):
    out, _ = chunks(data)
    assert "".join(out) == data.decode(errors="replace")


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one two three", ["two"], "one "),
        ("one two three", ["three", "two"], "one "),
        ("abababac", ["abac"], "abab"),
        ("abab", ["abac"], "abab"),
        ("a 🙂 b", ["🙂"], "a "),
        ("xyz", ["xyz"], ""),
        ("nothing here", ["z"], "nothing here"),
        ("aaa", ["aa", "a"], ""),
    ],
)
def test_the_first_stop_string_ends_the_text_and_is_never_shown(text, stop, expected):
    out, stopped = chunks(text.encode(), stop)
    assert "".join(out) == expected
    assert stopped == any(s in text for s in stop)


def test_what_cannot_begin_a_stop_string_is_shown_at_once():
    out, _ = chunks(b"ab.ab!", ["ab!"])
    assert out == ["", "", "ab.", "", "", ""]


def test_without_a_tokenizer_there_is_no_text():
    assert TextStream(None, ()).read([1, 2], True) == ("", False)
