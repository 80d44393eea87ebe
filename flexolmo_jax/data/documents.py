"""Documents of text, read from files."""

import contextlib
import glob
import gzip
import itertools
import json
import zlib
from collections.abc import Iterable, Iterator

from etils import epath

from flexolmo_jax.errors import UserError


def read_documents(globs: Iterable[str]) -> Iterator[str]:
    """Yields the documents of every file that the patterns match, each file once, in sorted order.

    Each line of a `.jsonl` or `.jsonl.gz` file is a document: a JSON object with the key "text" (blank
    lines are skipped). Any other file is one document, whole, its line ends untouched.

    Args:
      globs: file names or patterns (`*`, `?`, `[...]`), local or `gs://`; `**`, any directories, is local only.

    Raises:
      UserError: a pattern matches no file; a file is not UTF-8; a line is not such an object.
    """
    files = dict.fromkeys(itertools.chain.from_iterable(map(_matches, globs)))
    for file in files:
        if file.name.endswith((".jsonl", ".jsonl.gz")):
            yield from _read_lines(file)
        else:
            yield _utf8(file.read_bytes(), f"{file}")


def _matches(pattern: str) -> list[epath.Path]:
    if "://" in pattern:
        path = epath.Path(pattern)
        found = sorted(path.parent.glob(path.name))
    else:
        found = map(epath.Path, sorted(glob.glob(pattern, recursive=True)))  # epath knows no `**`
    files = [path for path in found if not path.is_dir()]
    if not files:
        raise UserError(f"--input={pattern}: matches no file; name text or .jsonl files (DIR/* for all in DIR)")
    return files


def _read_lines(file: epath.Path) -> Iterator[str]:
    with file.open("rb") as raw:
        unzipped = gzip.GzipFile(fileobj=raw) if file.suffix == ".gz" else contextlib.nullcontext(raw)
        try:
            with unzipped as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        yield _text_of(line, f"{file}:{number}")
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise UserError(f"{file}: is not a whole gzip file ({error}); fetch or compress it again") from error


def _text_of(line: bytes, place: str) -> str:
    try:
        record = json.loads(_utf8(line, place))
    except (ValueError, RecursionError) as error:
        raise UserError(f'{place}: is not JSON ({error}); write {{"text": "..."}} on each line') from error
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise UserError(f'{place}: is not an object with a string under "text"; write {{"text": "..."}}')
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can escape half of a surrogate pair
        raise UserError(f"{place}: escapes half of a surrogate pair; escape both halves") from error
    return text


def _utf8(data: bytes, place: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: is not UTF-8 (byte {error.start}); convert it to UTF-8") from error
