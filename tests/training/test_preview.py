"""What `flexolmo inspect --config` says of a run's data."""

import pytest

from configs import anchor
from flexolmo_jax.data.batches.packing import packing_report
from flexolmo_jax.data.batches.pipeline import TrainingBatches
from flexolmo_jax.data.corpus import Corpus
from flexolmo_jax.data.corpus_writer import write_corpus
from flexolmo_jax.data.tokenization.tokenizer import byte_tokenizer
from flexolmo_jax.errors import UserError
from flexolmo_jax.training.data import open_data
from flexolmo_jax.training.preview import describe_data
from tests.support.small import flexolmo

STEPS, CHANGE = 30, 11  # steps of the run, and that at which another phase begins


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A run of two phases over three sources, whose texts are of one letter each."""
    folder = tmp_path_factory.mktemp("preview")
    for letter, size in (("a", 20), ("b", 45), ("c", 7)):
        write_corpus(folder / letter, [letter * size] * 9, byte_tokenizer())
    config = anchor.get_config("tiny")
    config.steps, config.data.sequence_length, config.data.batch_size = STEPS, 16, 4
    weights = {"a": 3.0, "b": 1.0, "c": 0.0}
    config.data.mixture = tuple((letter, f"{folder}/{letter}", weight) for letter, weight in weights.items())
    config.data.phases = ((CHANGE, (("b", 0.5), ("c", 0.5))),)
    return config


def lines_of(table):
    """{header: cell} of each line."""
    columns = {str(column.header): list(column.cells) for column in table.columns}
    return [{header: cells[line] for header, cells in columns.items()} for line in range(len(columns["steps"]))]


def test_the_table_counts_what_the_steps_take(config):
    table = lines_of(describe_data(config)[1])
    assert [(line["steps"], line["source"]) for line in table] == [
        ("1 to 10", "a"),
        ("1 to 10", "b"),
        ("11 to 30", "b"),
        ("11 to 30", "c"),
    ]
    data = open_data(config)
    batches = TrainingBatches(data.sources, data.mixture, 16, 4, data.seed)
    so_far = dict.fromkeys("abc", 0)
    for line in table:
        first, last = map(int, line["steps"].split(" to "))
        letter = line["source"]
        tokens = [batches.batch(step)["tokens"] for step in range(first - 1, last)]
        # Every source has documents of one size, so that its letters tell its sequences.
        taken = sum(16 for batch in tokens for sequence in batch if ord(letter) in sequence)
        so_far[letter] += taken
        corpus = Corpus.open(dict((name, path) for name, path, _ in config.data.mixture)[letter])
        assert line["taken"] == f"{taken:,}"
        assert line["share"] == f"{taken / (64 * len(tokens)):.1%}"
        assert line["epochs so far"] == f"{so_far[letter] / corpus.tokens:.2f}"
        assert (line["documents"], line["tokens"]) == ("9", f"{corpus.tokens:,}")
        report = packing_report([corpus], 16, "concatenate")
        assert line["documents cut"] == f"{report.cut_documents / 9:.1%}"


def test_the_command_shows_the_first_sequences(config, tmp_path):
    file = tmp_path / "mine.py"
    lines = [f"config.data.{key} = {getattr(config.data, key)!r}" for key in ("mixture", "phases", "sequence_length")]
    body = "\n    ".join(["config = anchor.get_config('tiny')", "config.steps = 30", *lines, "return config"])
    file.write_text(f"from configs import anchor\n\ndef get_config():\n    {body}\n")
    result = flexolmo("inspect", f"--config={file}", "--samples=2", "--config.data.packing=best_fit")
    assert result.status == 0, result.err
    assert "30 of 8 sequences of 16 tokens" in result.out
    shown = [line for line in result.out.splitlines() if line.startswith("sequence ")]
    assert len(shown) == 2
    for line in shown:
        letter = line[line.index("(") + 1]
        assert set(line.partition(")")[2].replace(" ", "")) == {letter}


def test_bad_keys_are_named(config):
    other = config.copy_and_resolve_references()
    other.data.phases = ((CHANGE, (("d", 1.0),)),)
    with pytest.raises(UserError, match=r"config.data.phases=.*'d' is not in config.data.mixture"):
        describe_data(other)
    result = flexolmo("inspect")
    assert result.status == 2
    assert result.err.startswith("flexolmo inspect: no directory given; write `flexolmo inspect DIR`")
