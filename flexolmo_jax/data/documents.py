"""Documents of text, read from files."""

import glob
import itertools
import os
from collections.abc import Callable, Iterable, Iterator

from etils import epath

from flexolmo_jax.data.bad_records import BadRecordError, BadRecords
from flexolmo_jax.data.compression import open_unpacked, split_suffix
from flexolmo_jax.data.formats import FORMATS, Format, Records, format_of
from flexolmo_jax.errors import UserError

AUTO = "auto"


def read_documents(
    patterns: Iterable[str],
    *,
    text_key: str = "text",
    format: str = AUTO,
    bad_records: BadRecords | None = None,
    check: Callable[[str], object] | None = None,
) -> Iterator[str]:
    """Yields the documents of every file that the patterns match, each file once, in sorted order.

    A file may be compressed (gzip, bzip2, xz, zstd), told by its first bytes. Its format is told by its suffix, or
    by the one before that of the compression, in any case:

    - `.jsonl`, `.ndjson`, `.jsonlines`: each line is a document, an object with a string under `text_key`; blank
      lines are skipped.
    - `.json`: the same, or an array of such objects or of strings, or one object.
    - `.parquet`, `.pq`: each row is a document, in the column `text_key`.
    - any other: the file is one document, whole, its line ends untouched. One that holds JSON is refused.

    A byte order mark of UTF-8 is dropped. Memory holds one document, and what unpacks it.

    Args:
      patterns: names of files or patterns (`*`, `?`, `[...]`), local or `gs://`; `**`, any directories, is local
        only. What exists under a name is that file, whatever the name looks like.
      text_key: where records keep their text; "a.b" is also the key "b" of the object under "a".
      format: a name in `FORMATS` for all files, or "auto".
      bad_records: what becomes of records without usable text; by default the first one stops.
      check: called with each text; may raise `BadRecordError`.

    Raises:
      StoppedError: a record has no usable text, and bad records are not skipped.
      UserError: a pattern matches no file, or a library is missing.
    """
    bad_records = bad_records or BadRecords()
    for file in _once(itertools.chain.from_iterable(map(_matches, patterns))):
        chosen = format_of(split_suffix(file.name)[0]) if format == AUTO else FORMATS[format]
        try:
            yield from _read(file, chosen, text_key, bad_records, check)
        except BadRecordError as error:
            bad_records.add(f"{file}", error)


def _once(files: Iterable[epath.Path]) -> list[epath.Path]:
    """The files, each under the first of its names."""
    names = {}
    for file in files:
        names.setdefault(str(file) if "://" in str(file) else os.path.realpath(file), file)
    return list(names.values())


def _naming(file: epath.Path, records: Records) -> Records:
    """Names the file in errors of the system that name none."""
    try:
        yield from records
    except OSError as error:
        error.filename = error.filename or str(file)
        raise


def _read(
    file: epath.Path, format: Format, text_key: str, bad_records: BadRecords, check: Callable[[str], object] | None
) -> Iterator[str]:
    with open_unpacked(file) as stream:
        for place, record in _naming(file, format.records(stream, text_key)):
            try:
                text = format.text(record, text_key)
                del record  # it may be huge
                if check:
                    check(text)
            except BadRecordError as error:
                bad_records.add(f"{file}{place}", error)
                continue
            yield text


def _matches(pattern: str) -> list[epath.Path]:
    path = epath.Path(pattern)
    if path.is_dir():
        raise UserError(f"--input={pattern}: is a directory; name files in it: '{pattern.rstrip('/')}/*'")
    if path.exists():
        return [path]
    if "://" in pattern:
        found = sorted(path.parent.glob(path.name))
    else:
        found = map(epath.Path, sorted(glob.glob(pattern, recursive=True)))  # epath knows no `**`
    files = [path for path in found if not path.is_dir()]
    if not files:
        raise UserError(f"--input={pattern}: matches no file; name files of text, or DIR/* for all in DIR")
    return files
