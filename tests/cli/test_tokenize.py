"""`flexolmo tokenize`: text files to a corpus, or nothing."""

import gzip
import json

import numpy as np
import pytest

from flexolmo_jax.data.corpus import Corpus
from flexolmo_jax.data.tokenization.tokenizer import byte_tokenizer
from tests.support import kinds
from tests.support.small import assert_refused, flexolmo, with_defaults

EOS = 256


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("one\ntwo")
    (folder / "b.txt").write_text("naïve")
    (folder / "c.jsonl").write_text('{"text": "first"}\n\n{"text": "second"}\n')
    (folder / "d.jsonl.gz").write_bytes(gzip.compress(b'{"text": "zipped"}\n'))
    return folder


def test_every_document_is_terminated_by_eos(texts, tmp_path):
    result = flexolmo("tokenize", f"--input={texts}/*.jsonl*", f"--input={texts}/*.txt", f"--out={tmp_path}/corpus")
    documents = ["first", "second", "zipped", "one\ntwo", "naïve"]
    ids = [i for text in documents for i in [*text.encode(), EOS]]
    size = len("".join(documents).encode())
    assert (result.status, result.err) == (0, "")
    assert result.out == f"{tmp_path}/corpus: 5 documents, {len(ids)} tokens, {size} bytes of text\n"
    assert np.fromfile(tmp_path / "corpus" / "tokens-00000.npy", np.uint16).tolist() == ids


def test_takes_another_tokenizer(texts, tmp_path):
    byte_tokenizer().save(tmp_path / "tokenizer.json")
    arguments = [f"--input={texts}/a.txt", f"--tokenizer={tmp_path}/tokenizer.json", f"--out={tmp_path}/corpus"]
    assert flexolmo("tokenize", *arguments).status == 0
    record = json.loads((tmp_path / "corpus" / "corpus.json").read_text())
    assert record["tokenizer_digest"] == byte_tokenizer().digest


def test_takes_text_under_another_key_and_leaves_out_bad_records(texts, tmp_path):
    (texts / "e.NDJSON").write_text('{"content": "good"}\n{"content": null}\n{"content": \n{"content": "better"}\n')
    arguments = [
        f"--input={texts}/e.NDJSON",
        f"--input={texts}/b.txt",
        f"--out={tmp_path}/corpus",
        "--text_key=content",
    ]
    result = flexolmo("tokenize", *arguments, "--on-error=skip")
    assert (result.status, result.err) == (0, "")
    counts, left_out = result.out.splitlines()
    assert counts == f"{tmp_path}/corpus: 3 documents, 19 tokens, 16 bytes of text"
    assert left_out.startswith(f"{tmp_path}/corpus: bad records left out: 2 (in corpus.json), the first: {texts}/e")
    record = json.loads((tmp_path / "corpus" / "corpus.json").read_text())
    assert record["format_version"] == 1
    assert record["bad_records"]["count"] == 2
    assert [bad["place"] for bad in record["bad_records"]["records"]] == [f"{texts}/e.NDJSON:2", f"{texts}/e.NDJSON:3"]


def test_takes_the_format_that_is_said(texts, tmp_path):
    (texts / "lines.bak").write_text('{"text": "good"}\n')
    arguments = [f"--input={texts}/lines.bak", f"--out={tmp_path}/corpus", "--format=jsonl"]
    assert " 1 documents, 5 tokens" in flexolmo("tokenize", *arguments).out


@pytest.mark.parametrize("kind", kinds.KINDS)
def test_takes_every_kind_of_tokenizer_and_says_what_text_is_lost(kind, tmp_path):
    file = kinds.write(kind, tmp_path)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in [*kinds.TEXTS, "zoë ☃"]))
    arguments = [f"--input={tmp_path}/a.jsonl", f"--tokenizer={file}", f"--out={tmp_path}/corpus"]
    result = flexolmo("tokenize", *arguments)
    if kind == "wordpiece_without_unknown":
        assert_refused(result, "tokenize", "--tokenizer=", "has no token for", "unk_token")
        assert not (tmp_path / "corpus").exists()
        return
    assert (result.status, result.err) == (0, "")
    corpus = Corpus.open(tmp_path / "corpus")
    tokenizer = corpus.tokenizer()
    assert [document[-1] for document in corpus] == 6 * [tokenizer.eos_id]
    unknown = sum(np.count_nonzero(document == tokenizer.unknown_id) for document in corpus)
    lines = result.out.splitlines()[1:]
    if kind == "bpe_without_unknown":
        lost = "has no token for unknown text; characters that it does not know were left out"
        assert lines == [f"--tokenizer={file}: {lost}"]
    else:
        assert [line.split(" tokens ")[0] for line in lines] == ([f"{unknown} of {corpus.tokens:,}"] if unknown else [])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--input={texts}/nosuch*"], ["--input=", "nosuch*", "matches no file"]),
        (["--input={texts}/a.txt", "--tokenizer={texts}/nosuch"], ["--tokenizer=", "no such file", '"bytes"']),
        (["--input={texts}/a.txt", "--tokenizer={texts}/a.txt"], ["--tokenizer=", "is not a tokenizer.json"]),
        (["--input={texts}/a.txt", "--eos_token=<end>"], ["--eos_token=<end>", "not in the vocabulary"]),
        (["--input={texts}/bad.jsonl"], ["bad.jsonl:2", "is not JSON"]),
        (["--input={texts}/bad.jsonl"], ["stopped after 1 documents, 5 tokens", "--on_error=skip"]),
        (["--input={texts}/latin.txt"], ["latin.txt", "is not UTF-8"]),
        (
            ["--input={texts}/latin.txt", "--on_error=skip"],
            ["--input: holds no usable text; bad records: 1", "latin.txt: is not UTF-8"],
        ),
        (["--input={texts}/c.jsonl", "--text_key=body"], ["c.jsonl:1", 'nothing under "body" (it has "text")']),
        (["--input={texts}/c.jsonl", "--text_key="], ["--text_key", "is empty"]),
        (["--input={texts}/a.txt", "--format=xml"], ["--format", "xml", "auto|text|jsonl|json|parquet"]),
        (["--input={texts}"], ["--input=", "is a directory", "texts/*'"]),
        (["--input={texts}/empty.txt"], ["--input", "holds no text"]),
        (["--input={texts}/a.txt", "--out={texts}"], ["--out=", "exists already"]),
    ],
)
def test_refuses_bad_input(texts, tmp_path, arguments, words):
    (texts / "bad.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    (texts / "latin.txt").write_bytes(b"na\xefve")
    (texts / "empty.txt").write_text("")
    arguments = [argument.format(texts=texts) for argument in arguments]
    flags = with_defaults(arguments, f"--out={tmp_path}/corpus")
    assert_refused(flexolmo("tokenize", *flags), "tokenize", *words)
    assert [path.name for path in tmp_path.iterdir()] == ["texts"]
