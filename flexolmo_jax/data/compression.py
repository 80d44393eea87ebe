"""Files that may be compressed, told by their first bytes."""

import bz2
import contextlib
import dataclasses
import gzip
import importlib
import io
import lzma
import pathlib
import re
import types
import zlib
from collections.abc import Callable, Iterator

from etils import epath

from flexolmo_jax.data.bad_records import BadRecordError
from flexolmo_jax.errors import UserError

_BUFFER_BYTES = 1 << 20
_CHUNK_BYTES = 1 << 14  # compressed bytes taken together


@dataclasses.dataclass(frozen=True)
class _Compression:
    name: str
    suffixes: tuple[str, ...]
    magic: re.Pattern[bytes]
    unpack: Callable[[io.BufferedIOBase], io.BufferedIOBase]


class _Zstandard(io.RawIOBase):
    """Unpacks zstd frames; unlike the library's own reader, it notices when the last one is cut off."""

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


class _Unpacked(io.RawIOBase):
    """Fills what it is asked for; damage is reported once all that came before it has been read."""

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
                f"is not a whole {self._name} file ({self._damage}); fetch or compress it again"
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


def data_library(module: str, format: str) -> types.ModuleType:
    """Imports a library of the extra `data`.

    Raises:
      UserError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"--input: reading {format} needs {module.partition('.')[0]}; pip install 'flexolmo-jax[data]'"
        ) from error


def split_suffix(name: str) -> tuple[str, str]:
    """Returns the suffix of a file's name that says its format, and the one that says its compression, in lower case.

    Either may be empty: "a.JSON.gz" gives (".json", ".gz"), "a.txt" gives (".txt", "").
    """
    path = pathlib.PurePosixPath(name.lower())
    if any(path.suffix in compression.suffixes for compression in _COMPRESSIONS):
        return pathlib.PurePosixPath(path.stem).suffix, path.suffix
    return path.suffix, ""


@contextlib.contextmanager
def open_unpacked(file: epath.Path) -> Iterator[io.BufferedReader]:
    """Opens a file for reading, unpacked if its first bytes are those of gzip, bzip2, xz or zstd.

    Raises:
      BadRecordError: its suffix names a compression that it has not, or what is read of it is damaged.
    """
    suffix = split_suffix(file.name)[1]
    with file.open("rb") as opened:
        packed = io.BufferedReader(opened, _BUFFER_BYTES)
        head = packed.peek()
        found = next((c for c in _COMPRESSIONS if c.magic.match(head)), None)
        named = next((c for c in _COMPRESSIONS if suffix in c.suffixes), None)
        if found:
            yield io.BufferedReader(_Unpacked(found.name, found.unpack(packed)), _BUFFER_BYTES)
        elif named:
            raise BadRecordError(f"is not a {named.name} file; fetch it again, or drop {suffix} from its name")
        else:
            yield packed
