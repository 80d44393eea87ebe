"""Text that streams: nothing is shown that may still change."""

import pytest

from flexolmo_jax.data.tokenizer import byte_tokenizer
from flexolmo_jax.inference.text import TextStream

TEXT = "naïve — 日本 🙂 done"


def pieces(data, stop=()):
    """Reads bytes one by one; returns (what came at each, whether a stop string was found)."""
    stream, out, stopped = TextStream(byte_tokenizer(), stop), [], False
    for count in range(1, len(data) + 1):
        new, stopped = stream.read(list(data[:count]), count == len(data))
        out.append(new)
        if stopped:
            break
    assert "".join(out) == stream.text
    return out, stopped


def test_no_character_is_cut():
    out, _ = pieces(TEXT.encode())
    assert "".join(out) == TEXT
    assert [len(piece) for piece in out if piece] == [1] * len(TEXT)


@pytest.mark.parametrize("data", [b"\xff\xfeab\xe2\x82", b"\xf0\x9f\x99", b"a\xe2\x82z\xff"])
def test_bytes_that_are_no_text_are_shown_as_replacements(data):
    out, _ = pieces(data)
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
    out, stopped = pieces(text.encode(), stop)
    assert "".join(out) == expected
    assert stopped == any(s in text for s in stop)


def test_what_cannot_begin_a_stop_string_is_shown_at_once():
    out, _ = pieces(b"ab.ab!", ["ab!"])
    assert out == ["", "", "ab.", "", "", ""]


def test_without_a_tokenizer_there_is_no_text():
    assert TextStream(None, ()).read([1, 2], True) == ("", False)
