"""JSON values read one by one from a stream, and tests that tell JSON from text."""

import codecs
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

from flexolmo_jax.data.text.bad_records import BadRecordError

BOM = b"\xef\xbb\xbf"
_SPACE = re.compile(r"[ \t\r\n]*")
_BEGUN = re.compile(rb"\s*(\[\s*)?\{\s*\"")  # what hardly anything but JSON begins with
_READ_CHARACTERS = 1 << 20
_LONGEST_TOKEN = 16  # "-Infinity", "\ud83d\ude00": a cut one is reported where it begins


def read_values(chunks: Iterable[bytes]) -> Iterator[Any]:
    """Yields the items of an array, or values that follow one another.

    Memory holds the largest value and a chunk. (The C parser of ijson would do the same, but turns half of a
    surrogate pair into "?" silently.) Bytes that are not UTF-8 become lone surrogates.

    Raises:
      BadRecordError: the rest is not JSON.
    """
    decode = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape").decode
    scanner = _Scanner(map(decode, chunks))
    in_array = scanner.skip("[")
    for number in itertools.count():
        if scanner.skip("]") if in_array else scanner.at_end():
            break
        if in_array and number and not scanner.skip(","):
            scanner.fail("no comma after an item")
        yield scanner.value()
    if not scanner.at_end():
        scanner.fail("something follows the array")


def looks_like_json(head: bytes, *, whole: bool) -> bool:
    """Tells JSON from text that merely begins with a bracket.

    It is JSON if `head` consists of objects and arrays, or if half of its lines are objects.

    Args:
      head: the beginning of a file.
      whole: whether that is the whole file.
    """
    return _is_json(head, whole) or are_json_lines(head)


def is_array(head: bytes) -> bool:
    """Whether a JSON file that begins like this is an array."""
    return head.lstrip().startswith(b"[")


def are_json_lines(head: bytes) -> bool:
    """Whether at least half of the lines are JSON objects that are not empty."""
    lines = [line for line in head.splitlines() if line.strip()]
    objects = sum(map(_is_object, lines))
    return objects > 0 and 2 * objects >= len(lines)


def _is_json(head: bytes, whole: bool) -> bool:
    scanner = _Scanner(iter([head.decode(errors="replace")]))
    found = False
    try:
        while not scanner.at_end():
            if not isinstance(scanner.value(), dict | list):
                return False
            found = True
    except BadRecordError:
        return scanner.cut and (not whole or _BEGUN.match(head) is not None)
    return found


def _is_object(line: bytes) -> bool:
    try:
        # Records of text sequences (RFC 7464) and of event streams begin with a mark.
        value = json.loads(line.strip(b" \t\r\n\x1e").removeprefix(b"data:"))
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and bool(value)


class _Scanner:
    """Reads JSON values from chunks of characters.

    Attributes:
      cut: whether parsing failed at the end of the input.
    """

    def __init__(self, chunks: Iterator[str]):
        self._chunks, self._buffer, self._place, self._before = chunks, "", 0, 0
        self._decoder = json.JSONDecoder()
        self.cut = False

    def skip(self, token: str) -> bool:
        """Passes white space, and `token` if that is next; returns whether it was."""
        found = not self.at_end() and self._buffer.startswith(token, self._place)
        self._place += found
        return found

    def at_end(self) -> bool:
        """Passes white space; returns whether nothing follows."""
        while True:
            space = _SPACE.match(self._buffer, self._place)
            self._place = space.end() if space else self._place
            if self._place < len(self._buffer):
                return False
            if not self._read(1):
                return True

    def value(self) -> Any:
        """Returns the next value.

        Raises:
          BadRecordError: there is none.
        """
        self.at_end()
        size = _READ_CHARACTERS
        while True:
            try:
                value, end = self._decoder.raw_decode(self._buffer, self._place)
                if end < len(self._buffer) or not self._read(size):  # a number may continue in the next chunk
                    self._place = min(end, len(self._buffer))  # the end, where there was no next chunk
                    return value
            except (ValueError, RecursionError) as error:
                place = getattr(error, "pos", 0)
                reason = getattr(error, "msg", str(error))
                self.cut = place > len(self._buffer) - _LONGEST_TOKEN or reason.startswith("Unterminated string")
                if not (self.cut and self._read(size)):
                    self.fail(reason)
            size *= 2  # so that a huge value is not parsed again for every chunk

    def fail(self, reason: str) -> NoReturn:
        """Raises `BadRecordError` at the current place."""
        raise BadRecordError(
            f"is not JSON from character {self._before + self._place} on ({reason}); fix it there", "not JSON"
        )

    def _read(self, size: int) -> bool:
        """Reads `size` more characters, or a chunk; returns False at the end of the input."""
        self._before += self._place
        self._buffer, self._place = self._buffer[self._place :], 0
        chunks = [self._buffer]
        try:
            for chunk in self._chunks:
                chunks.append(chunk)
                size -= len(chunk)
                if size <= 0:
                    break
        finally:  # keep what precedes damaged input
            self._buffer = "".join(chunks)
        return len(chunks) > 1
