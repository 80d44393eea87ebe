"""The index of documents of a corpus: what it holds, what opening reads, and corpora without one."""

import hashlib
import json
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexolmo_jax.data import corpus as corpus_module
from flexolmo_jax.data import token_files
from flexolmo_jax.data.corpus import Corpus
from flexolmo_jax.data.corpus_writer import write_corpus
from flexolmo_jax.data.token_files import TokenFileWriter
from flexolmo_jax.data.tokenization.tokenizer import byte_tokenizer
from flexolmo_jax.errors import UserError

EOS = 256
TEXTS = ["one", "naïve 🧑", "x" * 50, "\n", "last"]


@pytest.fixture
def corpus(tmp_path):
    return write_corpus(tmp_path / "corpus", TEXTS, byte_tokenizer(), tokens_per_file=30)


def edit_file(corpus, **changes):
    """Changes the description of the first token file."""
    file = corpus.path / "corpus.json"
    record = json.loads(file.read_text())
    record["files"][0] |= changes
    file.write_text(json.dumps(record))


def test_the_index_is_where_documents_end(corpus):
    record = json.loads((corpus.path / "corpus.json").read_text())
    assert record["format_version"] == 1
    for file in record["files"]:
        tokens = np.fromfile(corpus.path / file["name"], "<u2")
        content = (corpus.path / file["ends"]["name"]).read_bytes()
        assert np.frombuffer(content, "<u8").tolist() == [i + 1 for i, id in enumerate(tokens) if id == EOS]
        assert file["documents"] == len(content) // 8
        assert file["ends"]["sha256"] == hashlib.sha256(content).hexdigest()


def test_ends_of_documents_are_offsets_over_all_files(corpus):
    assert len(corpus.files) > 1
    ends = np.cumsum([len(document) for document in corpus])
    for start, stop in ((0, corpus.tokens), (4, 29), (29, 31), (60, 61)):
        found = corpus.document_ends(start, stop)
        assert found.dtype == np.int64  # as a float, an offset is no index
        assert found.tolist() == [end for end in ends if start < end <= stop]


def test_a_corpus_without_an_index_is_the_same(corpus):
    documents = [document.tolist() for document in corpus]
    file = corpus.path / "corpus.json"
    record = json.loads(file.read_text())
    for token_file in record["files"]:
        (corpus.path / token_file.pop("ends")["name"]).unlink()
        del token_file["documents"]
    file.write_text(json.dumps(record))
    old = Corpus.open(corpus.path)
    assert [document.tolist() for document in old] == documents
    assert old.digest == corpus.digest
    old.verify()


def spoil_index(change):
    def spoil(corpus):
        file = corpus.path / "tokens-00000.ends"
        ends = np.fromfile(file, "<u8")
        change(ends).tofile(file)

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda c: (c.path / "tokens-00001.ends").unlink(), r"tokens-00001\.ends: missing, and corpus\.json names it"),
        (spoil_index(lambda ends: ends[1:]), r"tokens-00000\.ends: has 16 bytes, not those of 3 ends"),
        (spoil_index(lambda ends: ends - 1), r"tokens-00000\.ends: its last document ends at \d+, not at \d+ tokens"),
        (lambda c: edit_file(c, documents=4), r"corpus\.json: its files do not add up to 5 documents"),
        (lambda c: edit_file(c, ends=7), r"corpus\.json: is not the description"),
    ],
)
def test_open_errors(tmp_path, corpus, spoil, message):
    spoil(corpus)
    with pytest.raises(UserError, match=message):
        Corpus.open(corpus.path)


def test_a_changed_end_is_found(corpus):
    def move(ends):
        ends[0] += 1
        return ends

    spoil_index(move)(corpus)
    with pytest.raises(UserError, match=r"tokens-00000\.ends: differs from the digest in corpus\.json"):
        Corpus.open(corpus.path).verify()
    with pytest.raises(UserError, match=r"tokens-00000\.ends: its first document ends in the id \d+, .* says EOS 256"):
        Corpus.open(corpus.path)[0]


@settings(deadline=None, max_examples=30)
@given(st.lists(st.lists(st.integers(1, 9), max_size=9), max_size=5), st.integers(1, 40), st.integers(1, 9))
def test_documents_are_written_many_at_once_as_one_by_one(tmp_path_factory, groups, tokens_per_file, write_tokens):
    folders = [tmp_path_factory.mktemp("a"), tmp_path_factory.mktemp("b")]
    plain, bulk = (TokenFileWriter(corpus_module.epath.Path(f), np.dtype("<u2"), tokens_per_file) for f in folders)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_files, "_WRITE_TOKENS", write_tokens)
        for lengths in groups:
            tokens = np.arange(sum(lengths), dtype=np.uint16)
            ends = np.cumsum(lengths).astype(np.uint64)
            bulk.extend(tokens, ends)
            for document in np.split(tokens, ends.astype(int))[:-1]:
                plain.append(document[:1], ends=False)
                plain.append(document[1:])
    assert bulk.close() == plain.close()
    contents = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders]
    assert contents[0] == contents[1]


LENGTH, PER_FILE, FILES = 1 << 14, 1 << 28, 38  # tokens of a document, tokens of a file: 10.2 billion in all


@pytest.fixture(scope="module")
def huge(tmp_path_factory):
    """A corpus of ten billion tokens, all of them EOS, in sparse files."""
    path = tmp_path_factory.mktemp("huge")
    ends = np.arange(1, PER_FILE // LENGTH + 1, dtype="<u8") * LENGTH
    files = []
    for number in range(FILES):
        name = f"tokens-{number:05}"
        with (path / f"{name}.npy").open("wb") as file:
            file.truncate(2 * PER_FILE)
        ends.tofile(path / f"{name}.ends")
        index = {"name": f"{name}.ends", "sha256": ""}
        files.append({"name": f"{name}.npy", "tokens": PER_FILE, "sha256": "", "documents": len(ends), "ends": index})
    description = {
        "format_version": 1,
        "tokenizer_digest": "",
        "eos_id": 0,
        "dtype": "uint16",
        "documents": FILES * len(ends),
        "tokens": FILES * PER_FILE,
        "bytes": 0,
        "files": files,
    }
    (path / "corpus.json").write_text(json.dumps(description))
    return path


def resident_bytes():
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("VmRSS"))


def test_ten_billion_tokens_are_opened_without_reading_them(huge, monkeypatch):
    monkeypatch.setattr(corpus_module, "find_document_ends", None)  # the pass over the tokens
    resident = resident_bytes()
    tracemalloc.start()
    try:
        corpus = Corpus.open(huge)
        assert corpus.tokens > 10_000_000_000
        assert len(corpus[corpus.documents // 2]) == LENGTH
        assert len(corpus[corpus.documents - 1]) == LENGTH
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20
    assert resident_bytes() - resident < 64 << 20
