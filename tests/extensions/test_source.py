"""A new format of input files is one class: tab-separated values, from a compressed file to a trained anchor."""

import csv
import gzip
import io
import json

import pytest

from flexolmo_jax.data.corpus import Corpus
from flexolmo_jax.data.text import sources
from flexolmo_jax.data.text.bad_records import BadRecordError
from tests.support import runs
from tests.support.small import assert_refused, flexolmo


class TabSeparated(sources.Source):
    """Each line after the header is a record."""

    name = "tsv"
    suffixes = (".tsv", ".tab")
    document = "each line after the header"

    def records(self, stream, text_key):
        """Yields {column: value} of each line."""
        reader = csv.DictReader(io.TextIOWrapper(stream, "utf-8"), delimiter="\t", quoting=csv.QUOTE_NONE)
        if text_key not in (reader.fieldnames or ()):
            raise BadRecordError(f'has no column "{text_key}"; name the column of the text with text_key')
        for record in reader:
            yield f":{reader.line_num}", record

    def text(self, record, text_key):
        """Returns the value of the column."""
        if record[text_key] is None:
            raise BadRecordError("has too few columns; add them")
        return record[text_key]


@pytest.fixture
def tsv():
    sources.register(TabSeparated)
    yield
    del sources.SOURCES["tsv"]


@pytest.fixture
def table(tmp_path):
    words = " ".join(f"word{number % 7}" for number in range(60))
    lines = ["id\tbody", *(f"{number}\ttext {number}: {words}" for number in range(20)), "20"]
    (tmp_path / "news.tsv.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    return tmp_path / "news.tsv.gz"


@pytest.mark.usefixtures("tsv")
def test_a_new_source_makes_a_corpus_that_trains(table, tmp_path):
    flags = [f"--input={table}", "--text_key=body", "--on_error=skip", f"--out={tmp_path}/corpus"]
    result = flexolmo("tokenize", *flags)
    assert (result.status, result.err) == (0, "")
    corpus = Corpus.open(tmp_path / "corpus")
    decode = corpus.tokenizer().decode
    assert [decode(document).partition(":")[0] for document in corpus] == [f"text {number}" for number in range(20)]
    (bad,) = json.loads((tmp_path / "corpus" / "corpus.json").read_text())["bad_records"]["records"]
    assert bad == {"place": f"{table}:22", "reason": "has too few columns; add them"}
    config = runs.make_config("anchor", data__train=str(corpus.path), model__num_layers=1, steps=2)
    with runs.one_device():
        run = runs.train(config, tmp_path / "run")
    assert (run.workdir / "model" / "model.json").exists()


@pytest.mark.usefixtures("tsv")
def test_the_command_line_offers_a_new_source(table, tmp_path):
    assert "tsv (.tsv, .tab): a document is each line after the header" in " ".join(
        flexolmo("tokenize", "--help").out.split()
    )
    table.rename(tmp_path / "table")
    flags = [f"--input={tmp_path}/table", "--format=tsv", f"--out={tmp_path}/corpus"]
    words = ["--input=", 'table: has no column "text"', "with --text_key"]
    assert_refused(flexolmo("tokenize", *flags), "tokenize", *words)


def test_without_it_the_command_line_does_not_know_the_format(tmp_path):
    flags = ["--input=x", "--format=tsv", f"--out={tmp_path}/corpus"]
    assert_refused(flexolmo("tokenize", *flags), "tokenize", "--format", "auto|text|jsonl|json|parquet")
