"""Readers of the formats in which packages hold text. Each yields the documents in a package's files."""

import collections
import email
import email.policy
import html.parser
import json
import re
import struct
import subprocess
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

GROUP_BYTES = 4_000  # short entries are joined to documents of at least this size
SECONDS = 900  # for a program to end, such as the download of a package

Files = dict[str, bytes]  # by their path in the package, uncompressed
Texts = Iterator[tuple[str, str]]  # path, and the text of one document


class UnavailableError(Exception):
    """A package cannot be had or read."""


def run_program(command: list[str], stdin: bytes = b"", folder: Path | None = None) -> bytes:
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
        text = b"".join(run_program(["gzip", "-dc"], b"\x1f\x9d\x90" + window) for window in windows).decode()
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
