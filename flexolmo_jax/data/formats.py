"""Formats of text files: how each is cut into records, and where a record keeps its text."""

import dataclasses
import io
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from flexolmo_jax.data.bad_records import BadRecordError
from flexolmo_jax.data.compression import data_library
from flexolmo_jax.data.json_values import BOM, are_json_lines, is_array, looks_like_json, read_values

_HEAD_BYTES = 1 << 16  # looked at to tell JSON from text
_CHUNK_BYTES = 1 << 20
_ROWS = 256  # of Parquet, decoded together
# What is no UTF-8 text, by its first bytes, and what to do about it.
_OTHERS = (
    (re.compile(rb"\xff\xfe|\xfe\xff|\x00\x00\xfe\xff"), "UTF-16 or UTF-32", "convert it to UTF-8 (iconv -t UTF-8)"),
    (re.compile(rb"PAR1"), "a Parquet file", "name it .parquet or say --format=parquet"),
    (re.compile(rb"%PDF-"), "a PDF", "extract its text"),
    (re.compile(rb"PK\x03\x04"), "a zip archive", "unpack it"),
    (re.compile(rb".{257}ustar", re.DOTALL), "a tar archive", "unpack it"),
    (re.compile(rb"7z\xbc\xaf\x27\x1c|Rar!\x1a\x07|\x04\x22\x4d\x18"), "a 7z, rar or lz4 file", "unpack it"),
    (re.compile(rb"\x1f\x8b|\xfd7zXZ\x00|\x28\xb5\x2f\xfd"), "compressed twice", "unpack it once"),
)

# Records as their file gives them, each with its place in the file: (":3", b'{"text": ...}').
Records = Iterator[tuple[str, Any]]


@dataclasses.dataclass(frozen=True)
class Format:
    """A format of files.

    Attributes:
      suffixes: of the names that say it, in lower case.
      records: yields the records of a stream, given the key of the text, each with its place in the file; raises
        `BadRecordError` where no further record can be found.
      text: returns the text of a record, given the key; raises `BadRecordError`.
    """

    suffixes: tuple[str, ...]
    records: Callable[[io.BufferedReader, str], Records]
    text: Callable[[Any, str], str]


def _whole(stream: io.BufferedReader, key: str) -> Records:
    yield "", stream.read()


def _any_text(data: bytes, key: str) -> str:
    _refuse_others(data)
    return _utf8(data.removeprefix(BOM))


def _text_but_not_json(data: bytes, key: str) -> str:
    text = _any_text(data, key)
    if "\0" in text:
        raise BadRecordError(
            "holds NUL bytes, as no text does; leave it out, or say --format=text to read it all the same"
        )
    if looks_like_json(data[:_HEAD_BYTES].removeprefix(BOM), whole=len(data) <= _HEAD_BYTES):
        raise BadRecordError(
            "holds JSON, and its name does not say so; say --format=jsonl or --format=json to read the text in it, "
            "or --format=text to read its markup too"
        )
    return text


def _lines(stream: io.BufferedReader, key: str) -> Records:
    _refuse_others(stream.peek())
    yield from _numbered(stream)


def _numbered(lines: Iterable[bytes]) -> Records:
    for number, line in enumerate(lines, 1):
        line = line.removeprefix(BOM)  # concatenated files have one in the middle
        if line.strip():
            yield f":{number}", line


def _text_of_line(line: bytes, key: str) -> str:
    try:
        record = json.loads(_utf8(line))
    except (ValueError, RecursionError) as error:
        raise BadRecordError(f"is not JSON ({error}); {_lines_of(key)}") from error
    if not isinstance(record, dict):
        raise BadRecordError(f'is not an object with a string under "{key}"; {_lines_of(key)}')
    return _text_of_value(record, key)


def _lines_of(key: str) -> str:
    return f'write {{"{key}": "..."}} on each line, or say --format=json for an array'


def _lines_or_values(stream: io.BufferedReader, key: str) -> Records:
    head = stream.peek().removeprefix(BOM)
    _refuse_others(head)
    # A first line that is longer than what can be looked at is read.
    first = [] if is_array(head) or b"\n" in head else [stream.readline()]
    if not is_array(head) and are_json_lines(first[0] if first else head):
        yield from ((place, (_text_of_line, line)) for place, line in _numbered(itertools.chain(first, stream)))
        return
    chunks = itertools.chain(first, iter(lambda: stream.read1(_CHUNK_BYTES), b""))
    for number, value in enumerate(read_values(chunks), 1):
        yield f": value {number}", (_text_of_value, value)


def _text_of_either(record: tuple[Callable[[Any, str], str], Any], key: str) -> str:
    text, content = record
    return text(content, key)


def _rows(stream: io.BufferedReader, key: str) -> Records:
    parquet, arrow = data_library("pyarrow.parquet", "Parquet"), data_library("pyarrow", "Parquet")
    if not stream.seekable():
        raise BadRecordError("cannot be read as Parquet from a pipe or a compressed file; unpack it into a file")
    try:
        file = parquet.ParquetFile(stream)
        names = file.schema_arrow.names
        column = key if key in names else key.partition(".")[0]
        if column not in names:
            raise BadRecordError(_no_key(key, names))
        rows = itertools.count(1)
        for batch in file.iter_batches(batch_size=_ROWS, columns=[column]):
            for value in batch.column(0):
                yield f": row {next(rows)}", (column, value)
    except (arrow.ArrowException, OSError) as error:
        if getattr(error, "errno", None) is not None:
            raise  # of the disk, not of the data
        reason = str(error).strip().splitlines()[0]
        raise BadRecordError(f"is not a whole Parquet file ({reason}); fetch or write it again") from error


def _text_of_row(row: tuple[str, Any], key: str) -> str:
    column, value = row
    try:
        content = value.as_py()
    except UnicodeDecodeError as error:
        raise _not_utf8(error) from error
    return _text_of_value({column: _utf8(content) if isinstance(content, bytes) else content}, key)


FORMATS = {
    "text": Format((), _whole, _any_text),
    "jsonl": Format((".jsonl", ".ndjson", ".jsonlines"), _lines, _text_of_line),
    "json": Format((".json",), _lines_or_values, _text_of_either),
    "parquet": Format((".parquet", ".pq"), _rows, _text_of_row),
}
_UNNAMED = dataclasses.replace(FORMATS["text"], text=_text_but_not_json)


def format_of(suffix: str) -> Format:
    """Returns the format that a suffix says, in lower case and with its dot; any other says text."""
    return next((format for format in FORMATS.values() if suffix in format.suffixes), _UNNAMED)


def _text_of_value(value: Any, key: str) -> str:
    """Returns the string that a value is, or that an object holds under `key`."""
    text = _look_up(value, key) if isinstance(value, dict) else value
    if not isinstance(text, str):
        what = f'has {_kind(text)} under "{key}"' if isinstance(value, dict) else f"is {_kind(text)}"
        raise BadRecordError(f"{what}, not a string; name the key of the text with --text_key")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can escape half of a surrogate pair; bytes come as one from read_values
        bytes_or_half = "\udc80" <= text[error.start] <= "\udcff"
        what = "is not UTF-8, or escapes" if bytes_or_half else "escapes"
        raise BadRecordError(f"{what} half of a surrogate pair; escape both halves") from error
    return text


def _look_up(record: dict[str, Any], key: str) -> Any:
    """Returns what is under a key; "a.b" is also the key "b" of the object under "a"."""
    if key in record:
        return record[key]
    value: Any = record
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            raise BadRecordError(_no_key(key, list(record)))
        value = value[part]
    return value


def _kind(value: Any) -> str:
    kinds = {type(None): "null", bool: "a boolean", dict: "an object", list: "an array"}
    return kinds.get(type(value), "a number" if isinstance(value, int | float) else f"a {type(value).__name__}")


def _no_key(key: str, names: list[str]) -> str:
    shown = ", ".join(map(json.dumps, names[:8])) + (", ..." if len(names) > 8 else "")
    return f'has nothing under "{key}" (it has {shown or "no key"}); name the key of the text with --text_key'


def _refuse_others(head: bytes) -> None:
    for magic, what, remedy in _OTHERS:
        if magic.match(head):
            raise BadRecordError(f"is {what}; {remedy}")


def _utf8(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise _not_utf8(error) from error


def _not_utf8(error: UnicodeDecodeError) -> BadRecordError:
    return BadRecordError(f"is not UTF-8 (byte {error.start}); convert it to UTF-8, or leave it out")
