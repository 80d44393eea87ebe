"""Builds four corpora from real text that is on any machine with Python and this project's packages.

    python examples/local_texts.py --out=texts

writes `DOMAIN.train.jsonl` and `DOMAIN.heldout.jsonl`, one `{"text": ...}` a line, for

- `public`: English prose: Python's language reference, packages' descriptions and their docstrings;
- `code`: the standard library's Python source;
- `headers`: the C and C++ headers of Python and of the installed packages;
- `legal`: licences, one a document.

Nothing is downloaded and no package is imported. A document is in one split of one corpus only, most of
a held-out document's 8-word runs are in no other document, and the same machine gives the same files.
"""

import argparse
import ast
import email
import functools
import hashlib
import json
import os
import re
import sysconfig
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

DOMAINS = ("public", "code", "headers", "legal")
MIN_BYTES, MAX_BYTES = 200, 100_000  # of a document
MAX_HELDOUT_DOCUMENT = 12_000  # bytes; so that a small held-out split has many documents
MAX_LINE = 2_000  # characters; longer lines are generated or minified
MIN_COMPRESSED = 0.15  # of a document's size; what shrinks further is generated
SHINGLE = 8  # words
NEAR_COPY = 0.8  # a document that shares more of its shingles with documents before it is dropped
MAX_SHARED = 0.5  # of a held-out document's shingles, with all other documents

SKIPPED_FOLDERS = {
    *("__pycache__", "_generated"),
    *("site-packages", "dist-packages"),  # inside the standard library's folder
    *("test", "tests", "idle_test"),  # slim images lack them
    *("encodings", "lib2to3"),  # tables and grammars
    "pydoc_data",  # prose, read as such
    "flexolmo_jax",  # no text of this project's own
}
SKIPPED_MODULES = re.compile(r"_sysconfigdata.*|entities\.py|schema\.py|.*_(pb2|ops_gen)\.py")
LICENCE_NAME = re.compile(r"(licen[cs]e|copying|copyright|notice)(?!.*\.(py|pyc|pyi|json|h)$)", re.IGNORECASE)
# Files that bundle many licences part them by such lines, or open each with "Name: ".
LICENCE_BORDER = re.compile(r"^(?:-{4}|={5}|[-=]{70,})$|^(?=Name: )", re.MULTILINE)
# Debian's machine-readable files list files and holders too; only the licences' own stanzas are text.
DEBIAN_LICENCE = re.compile(r"^License:.*\n(?: .*\n)+", re.MULTILINE)


class Document(NamedTuple):
    """A text and the path it was read from."""

    text: str
    source: str


def size(document: Document) -> int:
    """Returns a document's length in UTF-8 bytes."""
    return len(document.text.encode())


def rank(name: str) -> bytes:
    """Sort key that puts names in a fixed order unrelated to their spelling."""
    return hashlib.blake2b(name.encode(), digest_size=8).digest()


def walk(root: Path) -> list[Path]:
    """Lists the files below a folder in the order of `rank`, without `SKIPPED_FOLDERS`."""
    found = []
    for folder, children, files in os.walk(root):
        children[:] = [child for child in children if child not in SKIPPED_FOLDERS]
        found += [os.path.join(folder, name) for name in files]
    start = len(os.path.join(root, ""))
    return [Path(path) for path in sorted(found, key=lambda path: rank(path[start:]))]


@functools.cache
def packages() -> list[Path]:
    """Lists the files of all installed packages."""
    roots = sorted({Path(sysconfig.get_path("purelib")), Path(sysconfig.get_path("platlib"))})
    return [path for root in roots for path in walk(root)]


def standard_library() -> Path:
    """Returns the folder of the standard library."""
    return Path(sysconfig.get_path("stdlib"))


def read(path: Path) -> str:
    """Returns a file's text; nothing where it is not UTF-8 or cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        return ""


def is_document(text: str, min_ascii: float = 0.97) -> bool:
    """Whether a text is of a useful size and reads as if people wrote it, in letters, `min_ascii` of them ASCII."""
    encoded = text.encode()
    if not MIN_BYTES <= len(encoded) <= MAX_BYTES or max(map(len, text.splitlines())) > MAX_LINE:
        return False
    if len(zlib.compress(encoded, 1)) < MIN_COMPRESSED * len(encoded):
        return False
    letters = sum(map(str.isalpha, text)) + sum(map(str.isspace, text))
    return letters > 0.6 * len(text) and len(text.encode("ascii", "ignore")) > min_ascii * len(text)


def prose(text: str) -> str:
    """Keeps the paragraphs of sentences: not code, sessions, grammars, tables, badges or directives."""
    text = re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)
    marks = re.compile(r"\s*(\.\. |<)|.*(>>>|::=|\]\(http)", re.DOTALL)

    def is_prose(paragraph: str) -> bool:
        plain = sum(character.isalpha() or character in " \n,.'\"" for character in paragraph)
        return plain > 0.9 * len(paragraph) and not marks.match(paragraph)

    return "\n\n".join(filter(is_prose, re.split(r"\n\s*\n", text.strip()))) + "\n"


def docstrings(source: str) -> str:
    """Joins a module's docstrings: its own, then those of its classes and functions, outer ones first."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other people's invalid escapes
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return ""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, owners)]
    return prose("\n\n".join(filter(None, found)))


def topics(source: str) -> list[str]:
    """Reads the sections of Python's language reference from the source of `pydoc_data.topics`."""
    values = [node.value for node in ast.parse(source).body if isinstance(node, ast.Assign)]
    return [prose(text) for value in values for text in ast.literal_eval(value).values()]


def licences(text: str) -> list[str]:
    """Splits a file of bundled licences into its licences."""
    if text.startswith("Format:"):
        return DEBIAN_LICENCE.findall(text)
    return [part.strip("\n") + "\n" for part in LICENCE_BORDER.split(text) if part.strip()]


def public_documents() -> Iterator[Document]:
    """Yields the language reference, the packages' descriptions, and the docstrings of their modules."""
    reference = standard_library() / "pydoc_data" / "topics.py"
    yield from (Document(text, str(reference)) for text in topics(read(reference)))
    paths = packages()
    for path in paths:
        if path.name == "METADATA" and not path.parent.name.startswith("flexolmo"):
            yield Document(prose(str(email.message_from_string(read(path)).get_payload())), str(path))
        elif path.name.lower().startswith("readme"):
            yield Document(prose(read(path)), str(path))
    for path in paths:
        if path.suffix == ".py" and not SKIPPED_MODULES.fullmatch(path.name):
            yield Document(docstrings(read(path)), str(path))


def code_documents() -> Iterator[Document]:
    """Yields the modules of the standard library."""
    for path in walk(standard_library()):
        if path.suffix == ".py" and not SKIPPED_MODULES.fullmatch(path.name):
            yield Document(read(path), str(path))


def header_documents(system: bool) -> Iterator[Document]:
    """Yields the headers of Python and of packages; after them those of the system, if asked for."""
    paths = walk(Path(sysconfig.get_path("include"))) + packages()
    for path in paths + (walk(Path("/usr/include")) if system else []):
        if path.suffix in {".h", ".hh", ".hpp"}:
            yield Document(read(path), str(path))


def legal_documents(system: bool) -> Iterator[Document]:
    """Yields the licences of Python and of packages; after them those of the system, if asked for."""
    paths = [standard_library() / "LICENSE.txt", *packages()]
    paths = [path for path in paths if LICENCE_NAME.match(path.name)]
    if system:
        share = Path("/usr/share")
        paths += sorted(share.glob("common-licenses/*"))
        paths += sorted(share.glob("doc/*/copyright"), key=lambda path: rank(path.parent.name))
    for path in paths:
        yield from (Document(text, str(path)) for text in licences(read(path)))


def shingles(text: str) -> np.ndarray:
    """Hashes each run of `SHINGLE` words, whatever their case and spacing; sorted, each once."""
    words = np.fromiter(map(zlib.crc32, text.lower().encode().split()), np.uint64)
    runs = np.zeros(max(1, len(words) - SHINGLE + 1), np.uint64)
    for offset in range(min(SHINGLE, len(words))):
        runs = runs * np.uint64(0x9E3779B97F4A7C15) + words[offset : offset + len(runs)]
    return np.unique(runs)


def number_shingles(texts: list[str]) -> list[np.ndarray]:
    """Returns for each text its shingles, numbered from 0 over all texts."""
    hashes = [shingles(text) for text in texts]
    numbers = np.unique(np.concatenate(hashes), return_inverse=True)[1]
    return np.split(numbers, np.cumsum([len(of_one) for of_one in hashes])[:-1])


def near_copies(numbered: list[np.ndarray]) -> list[bool]:
    """Says for each document whether the documents kept before it hold over `NEAR_COPY` of its shingles."""
    seen = np.zeros(1 + max(numbers.max() for numbers in numbered), bool)
    verdicts = []
    for numbers in numbered:
        verdicts.append(bool(seen[numbers].mean() > NEAR_COPY))
        if not verdicts[-1]:
            seen[numbers] = True
    return verdicts


def shared_parts(numbered: list[np.ndarray]) -> list[float]:
    """Returns for each document the part of its shingles, 0 to 1, that some other document has."""
    holders = np.bincount(np.concatenate(numbered))
    return [float((holders[numbers] > 1).mean()) for numbers in numbered]


def take(documents: Iterable[Document], limit: int) -> list[Document]:
    """Takes documents, in order, as they fit into a number of bytes."""
    taken, used = [], 0
    for document in documents:
        if used + size(document) <= limit:
            taken.append(document)
            used += size(document)
    return taken


def read_pool(documents: Iterable[Document], num_bytes: int, min_ascii: float = 0.97) -> list[Document]:
    """Reads documents until they hold `num_bytes` and puts them in the order of their texts' `rank`."""
    pool, used = [], 0
    for document in documents:
        if used >= num_bytes:
            break
        if is_document(document.text, min_ascii):
            pool.append(document)
            used += size(document)
    return sorted(pool, key=lambda document: rank(document.text))


def enough_bytes(train_bytes: int, heldout_bytes: int) -> int:
    """Returns how many bytes to read for splits of these sizes: some are near copies, or cannot be held out."""
    return (train_bytes + heldout_bytes) * 3 // 2 + 500_000


def without_copies(pools: Mapping[str, list[Document]]) -> dict[str, list[tuple[Document, float]]]:
    """Drops near copies within and between domains; of two, that of the first domain in `pools` stays.

    Returns:
        {domain: documents in their order, each with the part of its shingles, 0 to 1, that some other has}.
    """
    pool = [(domain, document) for domain, documents in pools.items() for document in documents]
    if not pool:
        return {domain: [] for domain in pools}
    copies = near_copies(number_shingles([document.text for _, document in pool]))
    pool = [entry for entry, is_copy in zip(pool, copies, strict=True) if not is_copy]
    shared = shared_parts(number_shingles([document.text for _, document in pool]))
    kept = {domain: [] for domain in pools}
    for (domain, document), part in zip(pool, shared, strict=True):
        kept[domain].append((document, part))
    return kept


def split(
    candidates: list[tuple[Document, float]], train_bytes: int, heldout_bytes: Mapping[str, int]
) -> dict[str, list[Document]]:
    """Splits the documents of a domain, with the parts of their shingles that others have.

    Args:
        candidates: what `without_copies` returns for the domain; earlier documents are held out first.
        train_bytes: the most bytes of training text.
        heldout_bytes: {held-out split: its most bytes}; together they are also at most a fifth of the text.

    Returns:
        {"train": documents, and of each held-out split its documents}.
    """
    fit = [doc for doc, part in candidates if part <= MAX_SHARED and size(doc) <= MAX_HELDOUT_DOCUMENT]
    # A scarce domain keeps most of its text for training.
    fifth = sum(size(doc) for doc, _ in candidates) // 5
    heldout, chosen = {}, set()
    for name, limit in heldout_bytes.items():
        heldout[name] = take((doc for doc in fit if doc not in chosen), min(limit, fifth // len(heldout_bytes)))
        chosen.update(heldout[name])
    return {"train": take((doc for doc, _ in candidates if doc not in chosen), train_bytes), **heldout}


def collect(train_bytes: int, heldout_bytes: int, system: bool) -> dict[str, dict[str, list[Document]]]:
    """Does the work of `gather`, with the documents' sources."""
    enough = enough_bytes(train_bytes, heldout_bytes)
    # Of two near copies in two corpora the first stays: the scarcer corpora come first.
    readers = {
        "legal": legal_documents(system),
        "headers": header_documents(system),
        "code": code_documents(),
        "public": public_documents(),
    }
    candidates = without_copies({domain: read_pool(reader, enough) for domain, reader in readers.items()})
    return {domain: split(candidates[domain], train_bytes, {"heldout": heldout_bytes}) for domain in DOMAINS}


def only_texts(found: dict[str, dict[str, list[Document]]]) -> dict[str, dict[str, list[str]]]:
    """Leaves out the documents' sources."""
    return {
        domain: {split: [document.text for document in documents] for split, documents in splits.items()}
        for domain, splits in found.items()
    }


def gather(train_bytes: int, heldout_bytes: int, system: bool = True) -> dict[str, dict[str, list[str]]]:
    """Finds real text of four domains on this machine.

    Args:
        train_bytes: the most bytes of training text a domain may have; it may have less.
        heldout_bytes: the same for held-out text, which is also at most a fifth of the domain's text.
        system: whether to fill up headers and licences from `/usr/include` and `/usr/share` where Python
            and its packages have too few.

    Returns:
        {domain: {"train": texts, "heldout": texts}}.
    """
    return only_texts(collect(train_bytes, heldout_bytes, system))


def write_jsonl(texts: dict[str, dict[str, list[str]]], out_dir: str | Path) -> None:
    """Writes what `gather` returned to `out_dir/DOMAIN.SPLIT.jsonl`, one `{"text": ...}` a line."""
    Path(out_dir).mkdir(parents=True, exist_ok=True)
    for domain, splits in texts.items():
        for split, documents in splits.items():
            lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents]
            Path(out_dir, f"{domain}.{split}.jsonl").write_text("".join(lines), encoding="utf-8")


def print_table(found: dict[str, dict[str, list[Document]]]) -> None:
    """Prints one line per split: its documents, bytes, and where one document is from."""
    print(f"{'domain':<8} {'split':<8} {'documents':>9} {'bytes':>10}  example source")
    for domain, splits in found.items():
        for split, documents in splits.items():
            example = "/".join(Path(documents[0].source).parts[-3:]) if documents else "-"
            total = sum(map(size, documents))
            print(f"{domain:<8} {split:<8} {len(documents):>9,} {total:>10,}  {example}")


def main(arguments: list[str] | None = None) -> None:
    """Gathers, writes and says what was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", required=True, help="folder to write DOMAIN.SPLIT.jsonl to")
    parser.add_argument("--train_bytes", type=int, default=2_500_000, help="at most, a domain")
    parser.add_argument("--heldout_bytes", type=int, default=48_000, help="at most, a domain")
    options = parser.parse_args(arguments)
    found = collect(options.train_bytes, options.heldout_bytes, system=True)
    write_jsonl(only_texts(found), options.out)
    print_table(found)


if __name__ == "__main__":
    main()
