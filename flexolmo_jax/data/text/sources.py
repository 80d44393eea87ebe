"""Formats of input files: how a file is split into records, and where a record keeps its text.

A new format is a subclass of `Source` with `@register`; `flexolmo tokenize` offers it under its name.
"""

import abc
import importlib
import io
import itertools
import json
import os
import re
import types
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar, TypeVar

from flexolmo_jax.data.text.bad_records import BadRecordError
from flexolmo_jax.data.text.json_values import BOM, are_json_lines, is_array, looks_like_json, read_values
from flexolmo_jax.errors import UserError, first_line

Records = Iterator[tuple[str, Any]]

_HEAD_BYTES = 1 << 16  # looked at to tell JSON from text
_CHUNK_BYTES = 1 << 20
_PARQUET_ROWS = 256  # decoded together
# Files that are not UTF-8 text, by their first bytes, and how to fix them.
_NOT_TEXT = (
    (re.compile(rb"\xff\xfe|\xfe\xff|\x00\x00\xfe\xff"), "UTF-16 or UTF-32", "convert it to UTF-8 (iconv -t UTF-8)"),
    (re.compile(rb"%PDF-"), "a PDF", "extract its text"),
    (re.compile(rb"PK\x03\x04"), "a zip archive", "unpack it"),
    (re.compile(rb".{257}ustar", re.DOTALL), "a tar archive", "unpack it"),
    (re.compile(rb"7z\xbc\xaf\x27\x1c|Rar!\x1a\x07|\x04\x22\x4d\x18"), "a 7z, rar or lz4 file", "unpack it"),
    (re.compile(rb"\x1f\x8b|\xfd7zXZ\x00|\x28\xb5\x2f\xfd"), "compressed twice", "unpack it once"),
)


class MissingLibraryError(UserError):
    """A library that a format needs is not installed."""


class Source(abc.ABC):
    """A format of input files.

    Attributes:
      name: what users call it.
      suffixes: of the names of its files, in lower case and with the dot.
      document: what one document of a file is, for help.
      magic: first bytes of its files, for binary formats: a file that begins with them is not read as text.
      has_lines: whether each record is a line, so that several processes can read a file; to be set anew by a subclass
        with other `records`.
    """

    name: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]] = ()
    document: ClassVar[str]
    magic: ClassVar[re.Pattern[bytes] | None] = None
    has_lines: ClassVar[bool] = False

    @abc.abstractmethod
    def records(self, stream: io.BufferedReader, text_key: str) -> Records:
        """Yields the records of a decompressed file, each with its place in the file, such as ":3" or ": row 3".

        Raises:
          BadRecordError: the rest of the file cannot be read.
        """

    @abc.abstractmethod
    def text(self, record: Any, text_key: str) -> str:
        """Returns the text of a record, which is under `text_key` where a record has several fields.

        Raises:
          BadRecordError: it has no usable text. The next record is read nevertheless, if the user wants that.
        """


SOURCES: dict[str, Source] = {}


_Format = TypeVar("_Format", bound=Source)


def register(source: type[_Format]) -> type[_Format]:
    """Adds a format to `SOURCES`; a class decorator."""
    SOURCES[source.name] = source()
    return source


def source_of(suffix: str) -> Source:
    """Returns the format of files with a suffix, in lower case and with its dot; text where none has it."""
    return next((source for source in SOURCES.values() if suffix in source.suffixes), _UNNAMED)


def data_library(module: str, format: str) -> types.ModuleType:
    """Imports a library of the extra `data`.

    Raises:
      MissingLibraryError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        library = module.partition(".")[0]
        raise MissingLibraryError(f"reading {format} needs {library}; pip install 'flexolmo-jax[data]'") from error


@register
class Text(Source):
    """A file is one document."""

    name = "text"
    document = "the whole file"

    def records(self, stream: io.BufferedReader, text_key: str) -> Records:
        """Yields the whole file."""
        yield "", stream.read()

    def text(self, record: bytes, text_key: str) -> str:
        """Decodes it."""
        _refuse_other_formats(record)
        return _utf8(record.removeprefix(BOM))


class UnnamedText(Text):
    """A file whose name does not tell its format: text, unless it looks like something else."""

    def text(self, record: bytes, text_key: str) -> str:
        """Decodes it; refuses binary files and JSON."""
        text = super().text(record, text_key)
        if "\0" in text:
            raise BadRecordError(
                "holds NUL bytes, so it is not text; leave it out, or give format=text to read it", "another format"
            )
        if looks_like_json(record[:_HEAD_BYTES].removeprefix(BOM), whole=len(record) <= _HEAD_BYTES):
            raise BadRecordError(
                "holds JSON, and its name does not say so; give format=jsonl or format=json to read the text in it, "
                "or format=text to read its markup too",
                "another format",
            )
        return text


_UNNAMED = UnnamedText()


@register
class JsonLines(Source):
    """Each line is a JSON object; blank lines are skipped."""

    name = "jsonl"
    suffixes = (".jsonl", ".ndjson", ".jsonlines")
    document = "each line, an object"
    has_lines = True

    def records(self, stream: io.BufferedReader, text_key: str) -> Records:
        """Yields the lines."""
        _refuse_other_formats(stream.peek())
        yield from _numbered(stream)

    def text(self, record: bytes, text_key: str) -> str:
        """Parses a line."""
        remedy = f'write {{"{text_key}": "..."}} on each line, or give format=json for an array'
        try:
            value = json.loads(_utf8(record))
        except (ValueError, RecursionError) as error:
            raise BadRecordError(f"is not JSON ({error}); {remedy}", "not JSON") from error
        if not isinstance(value, dict):
            raise BadRecordError(f'is not an object with a string under "{text_key}"; {remedy}', "no text")
        return _text_of_value(value, text_key)


@register
class Json(JsonLines):
    """An array of objects or strings, one object, or objects one after another; the content decides."""

    name = "json"
    suffixes = (".json",)
    document = "each item of an array (an object or a string), or each object"
    has_lines = False

    def records(self, stream: io.BufferedReader, text_key: str) -> Records:
        """Yields lines (bytes), or else parsed values as `_Value`."""
        head = stream.peek().removeprefix(BOM)
        _refuse_other_formats(head)
        # A first line that is longer than what `peek` gives is read.
        first = [] if is_array(head) or b"\n" in head else [stream.readline()]
        if not is_array(head) and are_json_lines(first[0] if first else head):
            yield from _numbered(itertools.chain(first, stream))
            return
        chunks = itertools.chain(first, iter(lambda: stream.read1(_CHUNK_BYTES), b""))
        for number, value in enumerate(read_values(chunks), 1):
            yield f": value {number}", _Value(value)

    def text(self, record: "bytes | _Value", text_key: str) -> str:
        """Parses a line, or takes a parsed value."""
        return _text_of_value(record.value, text_key) if isinstance(record, _Value) else super().text(record, text_key)


class _Value:
    """A parsed value of JSON."""

    def __init__(self, value: Any):
        self.value = value


@register
class Parquet(Source):
    """Each row is a document."""

    name = "parquet"
    suffixes = (".parquet", ".pq")
    document = "each row"
    magic = re.compile(rb"PAR1")

    def records(self, stream: io.BufferedReader, text_key: str) -> Records:
        """Yields the name of the column and its value in each row."""
        parquet, arrow = data_library("pyarrow.parquet", "Parquet"), data_library("pyarrow", "Parquet")
        if not stream.seekable():
            raise BadRecordError(
                "cannot be read as Parquet from a pipe or a compressed file; unpack it into a file", "another format"
            )
        try:
            file = parquet.ParquetFile(stream)
            names = file.schema_arrow.names
            column = text_key if text_key in names else text_key.partition(".")[0]
            if column not in names:
                raise BadRecordError(_no_key(text_key, names), "no text")
            rows = itertools.count(1)
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=[column]):
                for value in batch.column(0):
                    yield f": row {next(rows)}", (column, value)
        except (arrow.ArrowException, OSError) as error:
            if getattr(error, "errno", None) is not None:
                raise  # of the disk, not of the data
            reason = str(error).strip().splitlines()[0]
            raise BadRecordError(
                f"is not a whole Parquet file ({reason}); fetch or write it again", "damaged file"
            ) from error

    def text(self, record: tuple[str, Any], text_key: str) -> str:
        """Converts the value of a row."""
        column, value = record
        try:
            content = value.as_py()
        except UnicodeDecodeError as error:
            raise _not_utf8(error) from error
        return _text_of_value({column: _utf8(content) if isinstance(content, bytes) else content}, text_key)


@register
class ArrayRecord(JsonLines):
    """Each record is UTF-8 text, or a JSON object."""

    name = "arrayrecord"
    suffixes = (".array_record", ".arrayrecord")
    document = "each record, text or a JSON object"
    has_lines = False

    def records(self, stream: io.BufferedReader, text_key: str) -> Records:
        """Yields the records."""
        array_record = data_library("array_record.python.array_record_module", "ArrayRecord")
        path = getattr(stream, "name", None)  # that of a decompressed stream is not known
        if not (isinstance(path, str) and os.path.isfile(path)):
            raise BadRecordError(
                "cannot be read as ArrayRecord from a bucket, a pipe or a compressed file; copy it to a local file",
                "another format",
            )
        reader = array_record.ArrayRecordReader(path)
        try:
            for number in range(reader.num_records()):
                yield f": record {number + 1}", reader.read()
        except (IndexError, RuntimeError, ValueError) as error:
            reason = first_line(error)
            raise BadRecordError(f"is damaged ({reason}); fetch or write it again", "damaged file") from error
        if not reader.ok():
            raise BadRecordError("is not a whole ArrayRecord file; fetch or write it again", "damaged file")

    def text(self, record: bytes, text_key: str) -> str:
        """Parses an object, or decodes text."""
        return super().text(record, text_key) if _is_object(record) else _utf8(record)


def _is_object(record: bytes) -> bool:
    """Whether a record is a JSON object, rather than text."""
    if not record.lstrip().startswith(b"{"):
        return False
    try:
        return isinstance(json.loads(record), dict)
    except (ValueError, RecursionError):
        return False


def _numbered(lines: Iterable[bytes]) -> Records:
    for number, line in enumerate(lines, 1):
        line = line.removeprefix(BOM)  # concatenated files have one in the middle
        if line.strip():
            yield f":{number}", line


def _text_of_value(value: Any, key: str) -> str:
    """Returns a string, or the string that an object has under `key`."""
    text = _look_up(value, key) if isinstance(value, dict) else value
    if not isinstance(text, str):
        what = f'has {_type_name(text)} under "{key}"' if isinstance(value, dict) else f"is {_type_name(text)}"
        raise BadRecordError(f"{what}, not a string; name the key of the text with text_key", "no text")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can escape half of a surrogate pair; bytes come as one from read_values
        bytes_or_half = "\udc80" <= text[error.start] <= "\udcff"
        what = "is not UTF-8, or escapes" if bytes_or_half else "escapes"
        raise BadRecordError(f"{what} half of a surrogate pair; escape both halves", "not UTF-8") from error
    return text


def _look_up(record: dict[str, Any], key: str) -> Any:
    """Returns the value of a key; "a.b" is also the key "b" of the object under "a"."""
    if key in record:
        return record[key]
    value: Any = record
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            raise BadRecordError(_no_key(key, list(record)), "no text")
        value = value[part]
    return value


def _type_name(value: Any) -> str:
    names = {type(None): "null", bool: "a boolean", dict: "an object", list: "an array"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else f"a {type(value).__name__}")


def _no_key(key: str, names: list[str]) -> str:
    shown = ", ".join(map(json.dumps, names[:8])) + (", ..." if len(names) > 8 else "")
    return f'has nothing under "{key}" (it has {shown or "no key"}); name the key of the text with text_key'


def _refuse_other_formats(head: bytes) -> None:
    """Raises BadRecordError where a file that is read as text begins like something else."""
    for magic, what, remedy in _NOT_TEXT:
        if magic.match(head):
            raise BadRecordError(f"is {what}; {remedy}", "another format")
    for source in SOURCES.values():
        if source.magic and source.magic.match(head):
            rename = f"name it {source.suffixes[0]} or " if source.suffixes else ""
            raise BadRecordError(
                f"is a {source.name.title()} file; {rename}give format={source.name}", "another format"
            )


def _utf8(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise _not_utf8(error) from error


def _not_utf8(error: UnicodeDecodeError) -> BadRecordError:
    return BadRecordError(f"is not UTF-8 (byte {error.start}); convert it to UTF-8, or leave it out", "not UTF-8")
