"""Documents of text, read from files that may be compressed."""

import bz2
import contextlib
import dataclasses
import glob
import gzip
import io
import itertools
import lzma
import os
import pathlib
import re
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from etils import epath

from flexolmo_jax.data.text.bad_records import BadRecordError, BadRecords
from flexolmo_jax.data.text.sources import SOURCES, MissingLibraryError, Records, Source, data_library, source_of
from flexolmo_jax.errors import UserError
from flexolmo_jax.paths import is_remote

AUTO = "auto"
_BUFFER_BYTES = 1 << 20
_CHUNK_BYTES = 1 << 14  # compressed bytes read together
_MAGIC_BYTES = 16  # tell a compression


class ByteRange(NamedTuple):
    """Bytes of a file, from `start` to `stop`."""

    start: int
    stop: int


class FileState(NamedTuple):
    """What changes when a file does: its size in bytes, and the time of its last change."""

    size: int
    changed: int


def file_state(file: epath.Path) -> FileState | None:
    """The state of a file; None for what is no regular file, such as a pipe."""
    if is_remote(file):
        status = file.stat()
        return FileState(status.length, status.mtime)
    local = os.stat(file)
    return FileState(local.st_size, local.st_mtime_ns) if stat.S_ISREG(local.st_mode) else None


def check_unchanged(file: epath.Path, state: FileState | None) -> None:
    """Raises UserError where a file is no longer in that state."""
    if file_state(file) != state:
        raise UserError(f"{file}: changed while it was read; wait until it is complete, and run the command again")


def read_documents(
    patterns: Iterable[str],
    *,
    text_key: str = "text",
    format: str = AUTO,
    bad_records: BadRecords | None = None,
    check: Callable[[str], object] | None = None,
) -> Iterator[str]:
    """Yields the documents of every file that the patterns match, each file once, in sorted order.

    Args:
      patterns: as in `matching_files`.
      text_key: as in `read_file`, with the others.
      format: a name in `SOURCES` for all files, or "auto".
      bad_records: counts records without usable text; by default the first one is an error.
      check: called with each text; may raise `BadRecordError`.

    Raises:
      StoppedError: a record has no usable text, and bad records are not skipped.
      UserError: a pattern matches no file, a file changes while it is read, or a library is not installed.
    """
    for file in matching_files(patterns):
        yield from read_file(file, text_key=text_key, format=format, bad_records=bad_records, check=check)


def matching_files(patterns: Iterable[str]) -> list[epath.Path]:
    """Returns the files that the patterns match, each once, in sorted order for each pattern.

    Args:
      patterns: names of files or patterns (`*`, `?`, `[...]`), local or `gs://`; `**`, any directories, is local
        only. What exists under a name is that file, whatever the name looks like.

    Raises:
      UserError: a pattern matches no file.
    """
    return _once(itertools.chain.from_iterable(map(_matches, patterns)))


def read_file(
    file: epath.Path,
    *,
    text_key: str = "text",
    format: str = AUTO,
    bad_records: BadRecords | None = None,
    check: Callable[[str], object] | None = None,
    advance: Callable[[int], object] = lambda size: None,
    state: FileState | None = None,
    within: ByteRange | None = None,
) -> Iterator[str]:
    """Yields the documents of a file.

    It may be compressed (gzip, bzip2, xz, zstd), which its first bytes tell. Its suffix, or the suffix before that of
    the compression, selects its format from `SOURCES`, in any case. Other files are one document each, whole, with
    their line ends untouched; one that holds JSON is refused.

    A byte order mark of UTF-8 is dropped. Memory holds one document and the buffers of the decompressor.

    Args:
      file: its path.
      text_key: where records keep their text; "a.b" is also the key "b" of the object under "a".
      format: a name in `SOURCES`, or "auto".
      bad_records: counts records without usable text; by default the first one is an error.
      check: called with each text; may raise `BadRecordError`.
      advance: called with numbers of bytes that were read, whose sum at the end is the size of what is read.
      state: the state in which the file must be; by default its present one.
      within: what to read of the file, as `line_ranges` gives it; by default all of it.

    Raises:
      StoppedError: a record has no usable text, and bad records are not skipped.
      UserError: the file changes while it is read, or a library is not installed.
    """
    bad_records = bad_records or BadRecords()
    state = state or file_state(file)
    left = within.stop - within.start if within else state.size if state else 0

    def advance_within(size: int) -> None:  # Parquet may skip bytes of a file, or read some twice
        nonlocal left
        advance(min(size, left))
        left -= min(size, left)

    try:
        yield from _read(file, _source(file, format), text_key, bad_records, check, advance_within, within)
    except BadRecordError as error:
        bad_records.add(f"{file}", error)
    except MissingLibraryError as error:
        raise UserError(f"{file}: {error}") from error
    if state:
        check_unchanged(file, state)
    advance(left)


def line_ranges(file: epath.Path, state: FileState | None, format: str, size: int) -> list[ByteRange] | list[None]:
    """Divides a file at ends of lines into ranges of some `size` bytes; [None] where it has to be read as a whole.

    It can be divided if its records are lines, it is not compressed, and no pipe (`state` None). Of each range only the
    end is read here.
    """
    if state is None or state.size <= size or not _source(file, format).has_lines:
        return [None]
    with file.open("rb") as stream:
        if _compression(stream.read(_MAGIC_BYTES)):
            return [None]
        edges = [0]
        for end in range(size, state.size, size):
            if end > edges[-1]:  # no line reaches from before beyond it
                stream.seek(end - 1)
                stream.readline()
                edges.append(stream.tell())
    if edges[-1] < state.size:
        edges.append(state.size)
    return list(itertools.starmap(ByteRange, itertools.pairwise(edges)))


def _source(file: epath.Path, format: str) -> Source:
    """The format of a file."""
    return source_of(split_suffix(file.name)[0]) if format == AUTO else SOURCES[format]


def _once(files: Iterable[epath.Path]) -> list[epath.Path]:
    """The files, each under the first of its names."""
    names = {}
    for file in files:
        names.setdefault(str(file) if is_remote(file) else os.path.realpath(file), file)
    return list(names.values())


def _with_file_name(file: epath.Path, records: Records) -> Records:
    """Adds the file to errors of the system that name none."""
    try:
        yield from records
    except OSError as error:
        error.filename = error.filename or str(file)
        raise


def _read(
    file: epath.Path,
    source: Source,
    text_key: str,
    bad_records: BadRecords,
    check: Callable[[str], object] | None,
    advance: Callable[[int], object],
    within: ByteRange | None,
) -> Iterator[str]:
    label = f"{file} from byte {within.start}" if within and within.start else f"{file}"
    with open_decompressed(file, advance) if not within else _opened(file, advance, within) as stream:
        for place, record in _with_file_name(file, source.records(stream, text_key)):
            try:
                text = source.text(record, text_key)
                del record  # it may be huge
                if check:
                    check(text)
            except BadRecordError as error:
                bad_records.add(f"{label}{place}", error)
                continue
            yield text


def _matches(pattern: str) -> list[epath.Path]:
    path = epath.Path(pattern)
    if path.is_dir():
        raise UserError(f"{pattern}: is a directory; name files in it: '{pattern.rstrip('/')}/*'")
    if path.exists():
        return [path]
    if is_remote(pattern):
        found = sorted(path.parent.glob(path.name))
    else:
        found = map(epath.Path, sorted(glob.glob(pattern, recursive=True)))  # epath knows no `**`
    files = [path for path in found if not path.is_dir()]
    if not files:
        raise UserError(f"{pattern}: matches no file; name files of text, or DIR/* for all in DIR")
    return files


@dataclasses.dataclass(frozen=True)
class _Compression:
    name: str
    suffixes: tuple[str, ...]
    magic: re.Pattern[bytes]
    decompress: Callable[[Any], io.BufferedIOBase]


class _Zstandard(io.RawIOBase):
    """Decompresses zstd frames; unlike the library's own reader, it notices when the last one is cut off."""

    def __init__(self, packed: io.BufferedIOBase):
        self._zstd = data_library("zstandard", "zstd")
        self._packed, self._input, self._output, self._frame = packed, b"", b"", None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        while not self._output:
            self._input = self._input or self._packed.read(_CHUNK_BYTES)
            if not self._input:
                if self._frame is not None:
                    raise EOFError("it ends within a frame")
                return 0
            if self._frame is None:
                self._frame = self._zstd.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
            try:
                self._output = self._frame.decompress(self._input)
            except self._zstd.ZstdError as error:
                raise zlib.error(str(error)) from error
            self._input = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        size = min(len(buffer), len(self._output))
        buffer[:size] = self._output[:size]
        self._output = self._output[size:]
        return size


class _Decompressed(io.RawIOBase):
    """Reads decompressed bytes; damage is reported once all bytes before it have been read."""

    def __init__(self, name: str, file: io.BufferedIOBase):
        self._name, self._file, self._damage = name, file, None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        size = 0
        while size < len(buffer) and not self._damage:
            try:
                data = self._file.read1(len(buffer) - size)
            except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
                if isinstance(error, OSError) and error.errno is not None:
                    raise  # of the disk, not of the data
                self._damage = error
                break
            if not data:
                break
            buffer[size : size + len(data)] = data
            size += len(data)
        if self._damage and not size:
            raise BadRecordError(
                f"is not a whole {self._name} file ({self._damage}); fetch or compress it again", "damaged file"
            ) from self._damage
        return size


def _gzip(file: io.BufferedIOBase) -> gzip.GzipFile:
    return gzip.GzipFile(fileobj=file)


def _zstandard(file: io.BufferedIOBase) -> io.BufferedReader:
    return io.BufferedReader(_Zstandard(file))


_COMPRESSIONS = (
    _Compression("gzip", (".gz", ".gzip", ".bgz"), re.compile(rb"\x1f\x8b"), _gzip),
    _Compression("bzip2", (".bz2",), re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"), bz2.BZ2File),
    _Compression("xz", (".xz",), re.compile(rb"\xfd7zXZ\x00"), lzma.LZMAFile),
    _Compression("zstd", (".zst", ".zstd"), re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"), _zstandard),
)


def split_suffix(name: str) -> tuple[str, str]:
    """Returns the suffixes of a file's name that tell its format and its compression, in lower case.

    Either may be empty: "a.JSON.gz" gives (".json", ".gz"), "a.txt" gives (".txt", "").
    """
    path = pathlib.PurePosixPath(name.lower())
    if any(path.suffix in compression.suffixes for compression in _COMPRESSIONS):
        return pathlib.PurePosixPath(path.stem).suffix, path.suffix
    return path.suffix, ""


def _compression(head: bytes) -> _Compression | None:
    """The compression of a file with these first bytes."""
    return next((c for c in _COMPRESSIONS if c.magic.match(head)), None)


class _Counted(io.RawIOBase):
    """Passes reads on to a file, of at most `size` bytes in all, and tells how many bytes each gave."""

    def __init__(self, file: Any, name: str, advance: Callable[[int], object], size: int | None = None):
        self._file, self.name, self._advance, self._left = file, name, advance, size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._file.seekable()

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: memoryview) -> int:
        size = self._file.readinto(buffer[: self._left])
        self._left = None if self._left is None else self._left - size
        self._advance(size)
        return size


@contextlib.contextmanager
def _opened(file: epath.Path, advance: Callable[[int], object], within: ByteRange) -> Iterator[io.BufferedReader]:
    """Opens a range of a file for reading; `advance` as in `open_decompressed`."""
    with file.open("rb") as opened:
        opened.seek(within.start)
        raw: Any = _Counted(opened, os.fspath(file), advance, within.stop - within.start)
        yield io.BufferedReader(raw, _BUFFER_BYTES)


@contextlib.contextmanager
def open_decompressed(
    file: epath.Path, advance: Callable[[int], object] = lambda size: None
) -> Iterator[io.BufferedReader]:
    """Opens a file for reading, and decompresses it if its first bytes are those of gzip, bzip2, xz or zstd.

    `advance` is called with the number of bytes of the file that each read gave.

    Raises:
      BadRecordError: its suffix names another compression, or its content is damaged.
    """
    suffix = split_suffix(file.name)[1]
    with file.open("rb") as opened:
        raw: Any = _Counted(opened, os.fspath(file), advance)
        packed = io.BufferedReader(raw, _BUFFER_BYTES)
        head = packed.peek()
        found = _compression(head)
        named = next((c for c in _COMPRESSIONS if suffix in c.suffixes), None)
        if found:
            yield io.BufferedReader(_Decompressed(found.name, found.decompress(packed)), _BUFFER_BYTES)
        elif named:
            raise BadRecordError(
                f"is not a {named.name} file; fetch it again, or drop {suffix} from its name", "damaged file"
            )
        else:
            yield packed
