"""Token files that other programs wrote, against the ids that are written to them."""

import hashlib
import io
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexolmo_jax.data.corpus import Corpus
from flexolmo_jax.data.corpus_writer import write_corpus
from flexolmo_jax.data.ingest import referred_files
from flexolmo_jax.data.ingest.referred_files import refer_to_token_files
from flexolmo_jax.data.tokenization.tokenizer import byte_tokenizer, load_tokenizer
from flexolmo_jax.errors import UserError
from tests.support import kinds
from tests.support.small import assert_refused, flexolmo

EOS = 256
TEXTS = ["one", "naïve 🧑", "x" * 50, "\n", "last"]
IDS = [i for text in TEXTS for i in [*text.encode(), EOS]]


def with_header(ids):
    stream = io.BytesIO()
    np.save(stream, ids)
    return stream.getvalue()


WRITERS = {
    "flat.npy": lambda ids: ids.tobytes(),  # OLMo-core, dolma, olmo_grain
    "with_header.npy": with_header,
    "flat.ds": lambda ids: ids.tobytes(),  # datatrove
    "flat.bin": lambda ids: ids.tobytes(),
}


def refer(tmp_path, content, name="a.npy", **options):
    (tmp_path / name).write_bytes(content)
    return refer_to_token_files(tmp_path / "corpus", [str(tmp_path / name)], byte_tokenizer(), **options)


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_documents_are_those_of_the_files(tmp_path, name, dtype):
    content = WRITERS[name](np.array(IDS, dtype))
    corpus = refer(tmp_path, content, name, dtype=dtype, license="CC0-1.0")
    assert [corpus.tokenizer().decode(document) for document in corpus] == TEXTS
    assert (corpus.documents, corpus.tokens, corpus.bytes) == (5, len(IDS), len("".join(TEXTS).encode()))
    assert corpus.files[0]["name"] == str(tmp_path / name)
    assert corpus.files[0]["sha256"] == hashlib.sha256(content).hexdigest()
    assert sorted(path.name for path in (tmp_path / "corpus").iterdir()) == [
        "corpus.json",
        "tokenizer.json",
        "tokens-00000.ends",
    ]
    assert corpus.card["license"] == "CC0-1.0"
    corpus.verify()


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, EOS), min_size=1, max_size=40), st.integers(1, 30))
def test_documents_end_after_each_eos_however_the_file_is_read(ids, read_bytes):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(referred_files, "_READ_BYTES", max(8, read_bytes))
        ends = io.BytesIO()
        documents = b"".join(bytes([i != EOS]) for i in ids).split(b"\0")
        lengths = [len(document) + 1 for document in documents[:-1]] + ([len(documents[-1])] if documents[-1] else [])
        begun = referred_files._TextBytes(byte_tokenizer())
        array, offset, found = np.array(ids, "<u2"), 0, []
        stream = io.BytesIO(array.tobytes())
        size = 0
        for block in referred_files._blocks(stream, array.dtype, ends.write):
            here = np.flatnonzero(block == EOS) + 1
            size += begun.add(block, here)
            found += (here + offset).tolist()
            offset += len(block)
        size += begun.finish()
        assert ends.getvalue() == array.tobytes()
        assert found == [end for end in np.cumsum(lengths).tolist() if ids[end - 1] == EOS]
        assert size == sum(i != EOS for i in ids)


@pytest.mark.parametrize("read_bytes", [8, 10, 1 << 20])
def test_bytes_of_text_are_counted_for_any_tokenizer(tmp_path, monkeypatch, read_bytes):
    monkeypatch.setattr(referred_files, "_READ_BYTES", read_bytes)
    tokenizer = load_tokenizer(kinds.write("bpe_with_byte_fallback", tmp_path))
    written = write_corpus(tmp_path / "written", kinds.TEXTS, tokenizer)
    corpus = refer_to_token_files(tmp_path / "corpus", [f"{written.path}/*.npy"], tokenizer)
    assert corpus.bytes == written.bytes
    assert [document.tolist() for document in corpus] == [document.tolist() for document in written]
    assert corpus.digest == written.digest


def test_a_last_document_without_eos_is_one(tmp_path):
    corpus = refer(tmp_path, np.array([*IDS, 97, 98], "<u2").tobytes())
    assert corpus.documents == 6
    assert corpus[5].tolist() == [97, 98]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "a.npy: is empty; leave it out"),
        (with_header(np.zeros(0, "<u2")), "a.npy: is empty; leave it out"),
        (b"abc", "a.npy: has 3 bytes, which is no whole number of ids of uint16"),
        (np.array([1, EOS, 300, EOS], "<u2").tobytes(), r"the id 300 at offset 2 \(in tokens\) is outside .* of 257"),
        (np.array([*IDS, 257], "<u2").tobytes(), f"a.npy: the id 257 at offset {len(IDS)} "),
        (np.array(IDS, "<u4").tobytes(), "a.npy: every second id is 0, so its ids are uint32; give dtype=uint32"),
        (with_header(np.array(IDS, "<u4")), r"a.npy: holds <u4 \[\d+\], not uint16 \[tokens\]"),
        (with_header(np.array([IDS], "<u2")), r"a.npy: holds <u2 \[1, \d+\], not uint16 \[tokens\]"),
        (with_header(np.array(IDS, "<u2"))[:20], "a.npy: its header cannot be read"),
    ],
)
def test_bad_files_are_named(tmp_path, monkeypatch, content, message):
    monkeypatch.setattr(referred_files, "_READ_BYTES", 128)  # the length of a header; IDS take more
    with pytest.raises(UserError, match=message):
        refer(tmp_path, content)
    assert not (tmp_path / "corpus").exists()


def test_bad_files_may_be_skipped_and_are_listed(tmp_path):
    good = np.array(IDS, "<u2").tobytes()
    for name, content in {"a": b"", "b": good, "c": b"abc", "d": good}.items():
        (tmp_path / f"{name}.npy").write_bytes(content)
    flags = ["--format=tokens", "--on_error=skip", f"--out={tmp_path}/corpus"]
    result = flexolmo("tokenize", f"--input={tmp_path}/*.npy", *flags)
    assert f"bad records left out: 2 (in corpus.json), the first: {tmp_path}/a.npy: is empty" in result.out
    corpus = Corpus.open(tmp_path / "corpus")
    corpus.verify()
    assert [ids.tolist() for ids in corpus] == 2 * [[*text.encode(), EOS] for text in TEXTS]
    assert corpus.card["dropped"] == {"damaged file": 1, "empty file": 1}
    assert [record["place"] for record in corpus.card["bad_records"]["records"]] == [
        f"{tmp_path}/a.npy",
        f"{tmp_path}/c.npy",
    ]
    assert sorted(path.name for path in corpus.path.glob("*.ends")) == ["tokens-00000.ends", "tokens-00001.ends"]
    none = flexolmo("tokenize", f"--input={tmp_path}/[ac].npy", *flags[:2], f"--out={tmp_path}/none")
    assert_refused(none, "tokenize", "--input: holds no usable text; bad records: 2")


def test_files_of_other_names_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"a\.csv\.gz: is not named as token files are \(\.npy, \.bin, \.ds\)"):
        refer(tmp_path, b"", "a.csv.gz")


def test_a_file_that_changed_since_is_named(tmp_path):
    content = np.array(IDS, "<u2").tobytes()
    corpus = refer(tmp_path, content)
    (tmp_path / "a.npy").write_bytes(b"\0\0" + content[2:])
    with pytest.raises(UserError, match=r"a\.npy: differs from the digest in corpus\.json; restore it, or make"):
        corpus.verify()
    (tmp_path / "a.npy").write_bytes(content + b"\0\0")
    with pytest.raises(UserError, match=r"a\.npy: has \d+ bytes, not \d+ tokens .*; restore it, or make"):
        Corpus.open(corpus.path)
    (tmp_path / "a.npy").unlink()
    with pytest.raises(UserError, match=r"a\.npy: missing, and corpus\.json names it; restore it, or make"):
        Corpus.open(corpus.path)


def test_relative_names_are_below_the_corpus(tmp_path):
    corpus = refer(tmp_path, np.array(IDS, "<u2").tobytes())
    (tmp_path / "a.npy").rename(corpus.path / "moved.npy")
    record = json.loads((corpus.path / "corpus.json").read_text())
    record["files"][0]["name"] = "moved.npy"
    (corpus.path / "corpus.json").write_text(json.dumps(record))
    assert Corpus.open(corpus.path)[0].tolist() == [*b"one", EOS]


def test_the_command_refers_to_files(tmp_path):
    (tmp_path / "a.npy").write_bytes(np.array(IDS, "<u4").tobytes())
    flags = [f"--input={tmp_path}/*.npy", "--format=tokens", f"--out={tmp_path}/corpus"]
    assert_refused(flexolmo("tokenize", *flags), "tokenize", "a.npy", "give --dtype=uint32")
    assert_refused(flexolmo("tokenize", *flags, "--split=all:1"), "tokenize", "--split=all:1: needs text")
    result = flexolmo("tokenize", *flags, "--dtype=uint32")
    size = len("".join(TEXTS).encode())
    assert result.out == f"{tmp_path}/corpus: 5 documents, {len(IDS)} tokens, {size} bytes of text\n"
    assert_refused(flexolmo("tokenize", flags[0], flags[2], "--dtype=uint32"), "tokenize", "--dtype", "--format=tokens")
