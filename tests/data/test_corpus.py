"""The corpus directory against its bytes on disk."""

import hashlib
import itertools
import json
import os

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from flexolmo_jax.data import token_files
from flexolmo_jax.data.corpus import Corpus, verify_corpora
from flexolmo_jax.data.corpus_writer import copy_documents, write_corpus
from flexolmo_jax.data.text.bad_records import BadRecords
from flexolmo_jax.data.tokenization import encoding
from flexolmo_jax.data.tokenization.tokenizer import Tokenizer, byte_tokenizer
from flexolmo_jax.errors import UserError

EOS = 256
TEXTS = ["one", "", "<|endoftext|>", "naïve 🧑", "x" * 50, "\n", "", "last"]
DOCUMENTS = [[*text.encode(), EOS] for text in TEXTS if text]


def token_bytes(path, dtype="<u2"):
    return [np.frombuffer(file.read_bytes(), dtype).tolist() for file in sorted(path.glob("tokens-*.npy"))]


@pytest.fixture
def corpus(tmp_path):
    return write_corpus(tmp_path / "corpus", TEXTS, byte_tokenizer(), tokens_per_file=30)


def edit(corpus, **changes):
    file = corpus.path / "corpus.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_files_hold_the_documents_flat(corpus):
    files = token_bytes(corpus.path)
    assert list(itertools.chain(*files)) == list(itertools.chain(*DOCUMENTS))
    assert [file[-1] for file in files] == [EOS] * len(files)
    # Documents of 4, 14, 12, 51, 2 and 5 tokens; a file ends as soon as it holds 30.
    assert [len(file) for file in files] == [30, 51, 7]


def test_description(corpus):
    record = json.loads((corpus.path / "corpus.json").read_text())
    assert record["format_version"] == 1
    assert record["tokenizer_digest"] == byte_tokenizer().digest
    assert (record["eos_id"], record["dtype"]) == (EOS, "uint16")
    assert record["documents"] == corpus.documents == len(corpus) == len(DOCUMENTS)
    assert record["tokens"] == corpus.tokens == sum(map(len, DOCUMENTS))
    assert record["bytes"] == corpus.bytes == len("".join(TEXTS).encode())
    for file in record["files"]:
        assert file["sha256"] == hashlib.sha256((corpus.path / file["name"]).read_bytes()).hexdigest()
    assert corpus.tokenizer().decode(corpus[1]) == "<|endoftext|>"


@pytest.mark.parametrize("scan_tokens", [1, 4, 7, 1000])
def test_random_access(corpus, monkeypatch, scan_tokens):
    monkeypatch.setattr(token_files, "_SCAN_TOKENS", scan_tokens)
    for i in reversed(range(len(DOCUMENTS))):
        assert corpus[i].tolist() == DOCUMENTS[i]
        assert corpus[i].dtype == np.uint16
    assert [document.tolist() for document in corpus] == DOCUMENTS
    with pytest.raises(IndexError):
        corpus[-1]


@pytest.mark.parametrize("size", [1, 30])
def test_batches_do_not_change_the_result(corpus, tmp_path, monkeypatch, size):
    monkeypatch.setattr(encoding, "_BATCH_BYTES", size)
    write_corpus(tmp_path / "other", iter(TEXTS), byte_tokenizer(), tokens_per_file=30)
    for file in corpus.path.iterdir():
        assert (tmp_path / "other" / file.name).read_bytes() == file.read_bytes()


def test_documents_are_encoded_as_they_come(tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "_BATCH_CHUNKS", 2)
    drawn, seen = [], []
    encode_batch = Tokenizer.encode_batch

    def watch(tokenizer, texts):
        seen.append((len(drawn), len(texts)))
        return encode_batch(tokenizer, texts)

    monkeypatch.setattr(Tokenizer, "encode_batch", watch)
    write_corpus(tmp_path / "corpus", (drawn.append(i) or f"text {i}" for i in range(5)), byte_tokenizer())
    assert seen == [(3, 2), (5, 2), (5, 1)]


def test_a_long_document_is_encoded_in_chunks_and_stays_one(tmp_path, monkeypatch):
    seen = []
    encode_batch = Tokenizer.encode_batch

    def watch(tokenizer, texts):
        seen.append(sum(len(text.encode()) for text in texts))
        return encode_batch(tokenizer, texts)

    monkeypatch.setattr(Tokenizer, "encode_batch", watch)
    long = "naïve 🧑 " * 300_000
    corpus = write_corpus(tmp_path / "corpus", ["a", long, "b"], byte_tokenizer(), tokens_per_file=1000)
    assert [document.tobytes() for document in corpus] == [
        np.append(np.frombuffer(text.encode(), np.uint8), np.uint16(EOS)).tobytes() for text in ("a", long, "b")
    ]
    assert corpus.bytes == len(long.encode()) + 2
    assert [file["tokens"] for file in corpus.files] == [2 + len(long.encode()) + 1, 2]
    assert max(seen) <= 1 << 20


def test_what_was_left_out_is_described(tmp_path):
    left_out = BadRecords(skip=True)
    for number in range(150):
        left_out.add(f"a.jsonl:{number}", "is bad")
    corpus = write_corpus(tmp_path / "corpus", ["a"], byte_tokenizer(), bad_records=left_out)
    record = json.loads((corpus.path / "corpus.json").read_text())["bad_records"]
    assert record["count"] == 150
    assert record["records"] == [{"place": f"a.jsonl:{number}", "reason": "is bad"} for number in range(100)]
    assert len(Corpus.open(corpus.path)) == 1


def test_a_reader_that_stops_leaves_nothing_and_tells_how_far_it_got(tmp_path):
    def texts():
        yield from ("one", "two", "three")
        BadRecords().add("a.jsonl:4", "is bad")

    with pytest.raises(
        UserError, match=r"^a.jsonl:4: is bad \(stopped after 3 documents, 14 tokens; no corpus is made\)$"
    ):
        write_corpus(tmp_path / "corpus", texts(), byte_tokenizer())
    assert not list(tmp_path.iterdir())


def test_copies_count_the_bytes_of_their_text(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(Tokenizer, "decode", None)  # whose memory is some 100 bytes for each token
    copy_documents(corpus, [1, 2, 3], tmp_path / "copy")
    copy = Corpus.open(tmp_path / "copy")
    assert [document.tolist() for document in copy] == DOCUMENTS[1:4]
    assert copy.bytes == len("<|endoftext|>naïve 🧑".encode()) + 50


def test_large_vocabulary_takes_uint32_and_keeps_its_eos(tmp_path):
    backend = tokenizers.Tokenizer(models.WordLevel({f"w{i}": i for i in range(70_000)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["<stop>"])
    corpus = write_corpus(tmp_path / "corpus", ["w5 w69999", " ", "w1 <stop>"], Tokenizer(backend, 70_000))
    assert token_bytes(corpus.path, "<u4") == [[5, 69_999, 70_000, 1, 0, 70_000]]
    assert corpus.documents == 2
    assert (corpus.tokenizer().eos_id, corpus.tokenizer().digest) == (70_000, corpus.tokenizer_digest)


def test_reads_files_that_np_save_wrote(corpus):
    for file in corpus.path.glob("tokens-*.npy"):
        np.save(file, np.frombuffer(file.read_bytes(), "<u2"))
    assert [document.tolist() for document in Corpus.open(corpus.path)] == DOCUMENTS


def test_a_last_document_without_eos_is_a_document(corpus):
    file = corpus.path / "tokens-00000.npy"
    tokens = np.fromfile(file, "<u2")
    tokens[-1] = 97
    tokens.tofile(file)
    assert [document.tolist() for document in Corpus.open(corpus.path)][2] == [*DOCUMENTS[2][:-1], 97]


@pytest.mark.parametrize("documents", [[], ["", ""]])
def test_no_document_leaves_nothing(tmp_path, documents):
    with pytest.raises(UserError, match=r"^the input holds no text"):
        write_corpus(tmp_path / "corpus", documents, byte_tokenizer())
    assert list(tmp_path.iterdir()) == []


def test_a_failing_source_leaves_nothing(tmp_path):
    def source():
        yield "text" * 300_000
        raise UserError("a.txt: is not UTF-8")

    with pytest.raises(UserError, match="not UTF-8"):
        write_corpus(tmp_path / "corpus", source(), byte_tokenizer())
    assert list(tmp_path.iterdir()) == []


def test_an_existing_directory_is_kept(corpus):
    with pytest.raises(UserError, match=f"^{corpus.path}: exists already"):
        write_corpus(corpus.path, ["other"], byte_tokenizer())
    assert [document.tolist() for document in corpus] == DOCUMENTS


def cut_off_with_its_header(corpus):
    np.save(corpus.path / "tokens-00002.npy", np.zeros(7, "<u2"))
    os.truncate(corpus.path / "tokens-00002.npy", 140)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda c: (c.path / "corpus.json").unlink(), r"corpus: is not a corpus \(no corpus.json\)"),
        (lambda c: (c.path / "corpus.json").write_text("{"), r"corpus\.json: is not the description"),
        (lambda c: (c.path / "corpus.json").write_text("[]"), r"corpus\.json: is not the description"),
        (lambda c: edit(c, format_version=2), r"corpus\.json: has format version 2; this program reads 1"),
        (lambda c: edit(c, dtype="int8"), r"corpus\.json: is not the description"),
        (lambda c: edit(c, eos_id=None), r"corpus\.json: is not the description"),
        (lambda c: edit(c, tokens=87), r"corpus\.json: its files do not add up to 87 tokens"),
        (lambda c: edit(c, dtype="uint32"), r"tokens-00000\.npy: has 60 bytes, not 30 tokens of uint32"),
        (lambda c: (c.path / "tokens-00001.npy").unlink(), r"tokens-00001\.npy: missing"),
        (lambda c: (c.path / "tokens-00002.npy").write_bytes(b"1234"), r"tokens-00002\.npy: has 4 bytes"),
        (lambda c: (c.path / "tokens-00002.npy").write_bytes(b""), r"tokens-00002\.npy: has 0 bytes"),
        (lambda c: (c.path / "tokens-00002.npy").write_bytes(b"PK\3\4" * 9), r"tokens-00002\.npy: has 36 bytes"),
        (lambda c: np.save(c.path / "tokens-00002.npy", np.zeros(7, "<u4")), r"tokens-00002\.npy: holds <u4 \[7\]"),
        (lambda c: np.save(c.path / "tokens-00002.npy", np.zeros(7, "<i2")), r"tokens-00002\.npy: holds <i2 \[7\]"),
        (lambda c: np.save(c.path / "tokens-00002.npy", np.zeros(7, ">u2")), r"tokens-00002\.npy: holds >u2 \[7\]"),
        (lambda c: np.save(c.path / "tokens-00002.npy", np.zeros(8, "<u2")), r"tokens-00002\.npy: holds <u2 \[8\]"),
        (cut_off_with_its_header, r"tokens-00002\.npy: has 140 bytes, not 7 tokens of uint16, little-endian"),
    ],
)
def test_open_errors(corpus, spoil, message):
    spoil(corpus)
    with pytest.raises(UserError, match=message) as caught:
        Corpus.open(corpus.path)
    assert str(caught.value).startswith(str(corpus.path))
    assert "\n" not in str(caught.value)


def test_open_needs_a_directory(tmp_path):
    with pytest.raises(UserError, match="no such directory"):
        Corpus.open(tmp_path / "missing")


def without_index(corpus):
    """The corpus as version 0.1.0 wrote it."""
    for file in corpus.path.glob("*.ends"):
        file.unlink()
    record = json.loads((corpus.path / "corpus.json").read_text())
    edit(corpus, files=[{key: file[key] for key in ("name", "tokens", "sha256")} for file in record["files"]])


def test_a_wrong_eos_is_found(corpus):
    edit(corpus, eos_id=120)
    with pytest.raises(UserError, match=r"tokens-00000.ends: its first document ends in the id 256, .* says EOS 120"):
        Corpus.open(corpus.path)[0]


def test_a_wrong_eos_is_found_without_an_index(corpus):
    without_index(corpus)
    edit(corpus, eos_id=120)
    with pytest.raises(UserError, match=r"holds 54 documents terminated by EOS 120, and corpus.json says 6"):
        Corpus.open(corpus.path)[0]


def test_a_changed_token_is_found(corpus):
    corpus.verify()
    file = corpus.path / "tokens-00001.npy"
    tokens = np.fromfile(file, "<u2")
    tokens[0] += 1
    tokens.tofile(file)
    with pytest.raises(UserError, match=r"tokens-00001\.npy: differs from the digest"):
        Corpus.open(corpus.path).verify()


def test_another_tokenizer_is_found(corpus):
    backend = byte_tokenizer().backend
    backend.add_tokens(["extra"])
    Tokenizer(backend, EOS).save(corpus.path / "tokenizer.json")
    with pytest.raises(UserError, match=r"tokenizer\.json: did not make this corpus"):
        corpus.tokenizer()


def test_corpora_are_verified_together(corpus, tmp_path):
    other = write_corpus(tmp_path / "other", TEXTS, byte_tokenizer())
    verify_corpora([corpus, other])
    tokens = np.memmap(other.path / "tokens-00000.npy", "<u2", "r+")
    tokens[5] ^= 1
    tokens.flush()
    with pytest.raises(UserError, match=f"^{other.path}/tokens-00000.npy: differs from the digest in corpus.json"):
        verify_corpora([corpus, other])


@pytest.mark.parametrize("scan_tokens", [4, 1000])
def test_an_id_outside_the_vocabulary_is_named_with_its_file_and_place(corpus, tmp_path, monkeypatch, scan_tokens):
    monkeypatch.setattr(token_files, "_SCAN_TOKENS", scan_tokens)
    corpus.refuse_ids()
    tokens = np.memmap(corpus.path / "tokens-00001.npy", "<u2", "r+")
    tokens[11], tokens[20] = 257, 60_000
    tokens.flush()
    damaged = r"tokens-00001\.npy: damaged: the id 257 at offset 11 \(in tokens\) is outside the vocabulary of 257"
    with pytest.raises(UserError, match=damaged):
        corpus.refuse_ids()
    with pytest.raises(UserError, match=damaged):
        copy_documents(corpus, range(len(corpus)), tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
