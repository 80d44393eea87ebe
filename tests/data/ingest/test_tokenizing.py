"""Text files to a corpus: the same whatever processes take part, and however often they are interrupted."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flexolmo_jax.data.corpus import Corpus
from flexolmo_jax.data.corpus_writer import write_corpus
from flexolmo_jax.data.ingest import tokenizing, units
from flexolmo_jax.data.ingest.splits import parse_splits
from flexolmo_jax.data.ingest.tokenizing import tokenize_files
from flexolmo_jax.data.ingest.work_directory import WorkDirectory
from flexolmo_jax.data.ingest.worker_pool import map_in_processes
from flexolmo_jax.data.text.documents import read_documents
from flexolmo_jax.data.tokenization.tokenizer import byte_tokenizer
from flexolmo_jax.errors import UserError
from tests.support import workers
from tests.support.small import files as digests

EOS = 256
FOLDER = settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SPLITS = parse_splits("train:0.5,test:0.5")
documents_of_files = st.lists(st.lists(st.text(max_size=12), max_size=5), min_size=1, max_size=6)


class Killed(BaseException):
    """Stands for the end of the process."""


def write_inputs(folder, texts_of_files):
    folder.mkdir(exist_ok=True)
    for number, texts in enumerate(texts_of_files):
        lines = "".join(json.dumps({"id": str(i), "text": text}) + "\n" for i, text in enumerate(texts))
        (folder / f"{number:03}.jsonl").write_text(lines)
    return [f"{folder}/*.jsonl"]


def make(out, patterns, unit_bytes=20, range_bytes=20, **options):
    with mock.patch.multiple(units, _UNIT_BYTES=unit_bytes, _RANGE_BYTES=range_bytes):
        return tokenize_files(out, patterns, byte_tokenizer(), tokens_per_file=30, **options)


def killed_after(count):
    """A `tokenize_unit` whose process is killed at unit `count`, in the midst of it."""
    calls = iter(range(count + 1))

    def tokenize_unit(unit, advance, **options):
        if next(calls) == count:
            (pathlib.Path(options["directory"]) / f"{unit.key}.all-00000.npy").write_bytes(b"half")
            raise Killed
        return units.tokenize_unit(unit, advance, **options)

    return mock.patch.object(tokenizing, "tokenize_unit", tokenize_unit)


@FOLDER
@given(documents_of_files, st.integers(1, 200), st.integers(1, 200))
def test_is_what_a_plain_loop_over_the_documents_gives(texts_of_files, unit_bytes, range_bytes):
    texts = [text for texts in texts_of_files for text in texts if text]
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        patterns = write_inputs(folder / "in", texts_of_files)
        if not texts:
            with pytest.raises(UserError, match="holds no text"):
                make(folder / "out", patterns, unit_bytes, range_bytes)
        else:
            make(folder / "out", patterns, unit_bytes, range_bytes)
            corpus = Corpus.open(folder / "out")
            assert [document.tolist() for document in corpus] == [[*text.encode(), EOS] for text in texts]
            plain = write_corpus(folder / "plain", texts, byte_tokenizer(), tokens_per_file=30)
            assert corpus.files == plain.files
            assert (corpus.documents, corpus.tokens, corpus.bytes) == (plain.documents, plain.tokens, plain.bytes)
            assert corpus.card["sources"]["count"] == len(texts_of_files)
            assert sum(file["bytes"] for file in corpus.card["sources"]["files"]) == corpus.bytes
            assert corpus.card["dropped"].get("empty", 0) == sum(map(len, texts_of_files)) - len(texts)
        assert {path.name for path in folder.iterdir()} <= {"in", "out", "plain"}


@FOLDER
@given(st.lists(st.integers(0, 5), max_size=4), st.booleans())
def test_interruptions_lose_and_double_nothing(kills, with_splits):
    options = {"splits": SPLITS} if with_splits else {}
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        patterns = write_inputs(folder / "in", [[f"text {i} of {file}" for i in range(4)] for file in range(5)])
        make(folder / "whole", patterns, unit_bytes=10_000, range_bytes=10_000, **options)
        for count in kills:
            with killed_after(count):
                try:
                    make(folder / "out", patterns, **options)
                    break
                except Killed:
                    assert not (folder / "out").exists()
        if not (folder / "out").exists():
            make(folder / "out", patterns, **options)
        assert digests(folder / "out") == digests(folder / "whole")
        assert {path.name for path in folder.iterdir()} == {"in", "out", "whole"}


@FOLDER
@given(st.lists(st.text(min_size=1, max_size=12), min_size=12, max_size=30, unique=True))
def test_splits_divide_the_documents(texts):
    sides = [SPLITS.index(text) for text in texts]
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        patterns = write_inputs(folder / "in", [texts[:5], texts[5:]])
        if len(set(sides)) == 1:
            with pytest.raises(UserError, match=r"^split=train:0.5,test:0.5: none of \d+ documents falls into"):
                make(folder / "out", patterns, splits=SPLITS)
            assert not (folder / "out").exists()
            return
        make(folder / "out", patterns, splits=SPLITS)
        for index, split in enumerate(("train", "test")):
            corpus = Corpus.open(folder / "out" / split)
            expected = [text for text, side in zip(texts, sides, strict=True) if side == index]
            assert [corpus.tokenizer().decode(document) for document in corpus] == expected
            assert corpus.card["split"] == {"name": split, "shares": dict(SPLITS.shares), "key": "flexolmo"}
            assert sum(file["documents"] for file in corpus.card["sources"]["files"]) == len(expected)


def test_finished_units_are_not_read_again(tmp_path):
    patterns = write_inputs(tmp_path / "in", [[f"text {file}"] for file in range(4)])
    with killed_after(2), pytest.raises(Killed):
        make(tmp_path / "out", patterns)
    for file in sorted((tmp_path / "in").iterdir())[:2]:
        state = file.stat()
        file.write_bytes(b"#" * state.st_size)  # not JSON: reading it would be an error
        os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    make(tmp_path / "out", patterns)
    assert Corpus.open(tmp_path / "out").documents == 4


def test_a_file_that_changed_between_two_attempts_is_read_again(tmp_path):
    patterns = write_inputs(tmp_path / "in", [["old"], ["b"], ["c"]])
    with killed_after(2), pytest.raises(Killed):
        make(tmp_path / "out", patterns)
    (tmp_path / "in" / "000.jsonl").write_text('{"text": "new and longer"}\n')
    make(tmp_path / "out", patterns)
    corpus = Corpus.open(tmp_path / "out")
    assert [corpus.tokenizer().decode(document) for document in corpus] == ["new and longer", "b", "c"]


def test_other_settings_are_refused_and_the_work_is_kept(tmp_path):
    patterns = write_inputs(tmp_path / "in", [["a"], ["b"]])
    with killed_after(1), pytest.raises(Killed):
        make(tmp_path / "out", patterns)
    with pytest.raises(UserError, match=r"out\.incomplete: was begun with another split; .* or remove it$"):
        make(tmp_path / "out", patterns, splits=SPLITS)
    with pytest.raises(UserError, match=r"out\.incomplete: was begun with another text_key"):
        make(tmp_path / "out", patterns, text_key="body")
    make(tmp_path / "out", patterns)
    assert Corpus.open(tmp_path / "out").documents == 2


def test_a_folder_of_someone_else_is_not_touched(tmp_path):
    patterns = write_inputs(tmp_path / "in", [["a"]])
    (tmp_path / "out.incomplete").mkdir()
    (tmp_path / "out.incomplete" / "mine").write_text("mine")
    with pytest.raises(UserError, match=r"out\.incomplete: exists, and `flexolmo tokenize` did not make it"):
        make(tmp_path / "out", patterns)
    assert (tmp_path / "out.incomplete" / "mine").read_text() == "mine"


def test_two_at_once_are_refused(tmp_path):
    patterns = write_inputs(tmp_path / "in", [["a"]])

    def second(unit, advance, **options):
        with pytest.raises(UserError, match=r"out\.incomplete: another process tokenizes there"):
            tokenize_files(tmp_path / "out", patterns, byte_tokenizer())
        return units.tokenize_unit(unit, advance, **options)

    with mock.patch.object(tokenizing, "tokenize_unit", second):
        make(tmp_path / "out", patterns)
    assert Corpus.open(tmp_path / "out").documents == 1


def test_a_bad_record_stops_the_work_and_may_be_skipped_later(tmp_path):
    patterns = write_inputs(tmp_path / "in", [["one"], ["two"], ["three"]])
    (tmp_path / "in" / "001.jsonl").write_text('{"text": "fine"}\n{"text": 3}\n')
    kept = rf"\(stopped after 2 documents, 9 tokens; no corpus is made, finished files are kept in {tmp_path}/out.inc"
    with pytest.raises(UserError, match=rf"001.jsonl:2: has a number under .*{kept}"):
        make(tmp_path / "out", patterns)
    made = make(tmp_path / "out", patterns, skip=True)
    assert made.bad_records.count == 1
    corpus = Corpus.open(tmp_path / "out")
    assert corpus.card["dropped"] == {"no text": 1}
    assert corpus.card["bad_records"]["records"][0]["place"].endswith("001.jsonl:2")


def test_a_bad_record_of_a_divided_file_is_named_with_the_range(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' * 3 + '{"text": 3}\n')
    made = make(tmp_path / "out", [f"{tmp_path}/a.jsonl"], range_bytes=17, skip=True)
    assert made.bad_records.description()["records"][0]["place"] == f"{tmp_path}/a.jsonl from byte 51:1"


def test_a_file_that_changes_while_it_is_read_is_named(tmp_path):
    patterns = write_inputs(tmp_path / "in", [["a", "b"]])
    texts = read_documents(patterns)
    next(texts)
    with (tmp_path / "in" / "000.jsonl").open("a") as file:
        file.write('{"text": "c"}\n')
    with pytest.raises(UserError, match=r"^.*000\.jsonl: changed while it was read; wait"):
        list(texts)


def test_a_pipe_takes_a_single_process(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match=r"^processes=2: .*/pipe is a pipe, which only a single process can read"):
        make(tmp_path / "out", [f"{tmp_path}/pipe"], processes=2)


def start(folder, processes, *flags):
    """Starts the command on the texts of a folder, with units of a few bytes."""
    code = (
        "from flexolmo_jax.data.ingest import units; units._UNIT_BYTES = 1; "
        "from flexolmo_jax.cli import main; import sys; main(sys.argv[1:])"
    )
    arguments = ["tokenize", f"--input={folder}/in/*", f"--out={folder}/out", f"--processes={processes}", *flags]
    return subprocess.Popen([sys.executable, "-c", code, *arguments], stderr=subprocess.PIPE, text=True)


def test_a_killed_command_is_resumed_by_another_number_of_processes(tmp_path):
    texts = [[f"{file} {i} " + "some words " * 200 for i in range(40)] for file in range(30)]
    patterns = write_inputs(tmp_path / "in", texts)
    command = start(tmp_path, 2)
    work = WorkDirectory(tmp_path / "out").path
    while not list(work.glob("*.unit")) and command.poll() is None:
        time.sleep(0.01)
    command.send_signal(signal.SIGKILL)
    command.wait()
    assert not (tmp_path / "out").exists(), "the command was faster than its end"
    finished = {path.name: path.stat().st_mtime_ns for path in work.glob("*.unit")}
    assert 0 < len(finished) < 30
    tokenize_files(tmp_path / "out", patterns, byte_tokenizer())
    tokenize_files(tmp_path / "whole", patterns, byte_tokenizer())
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_a_process_that_dies_is_an_error_and_no_hang():
    with pytest.raises(UserError, match=r"^a process of those that work together has ended early"):
        list(map_in_processes(workers.die_at_two, [0, 1, 2, 3], 2, lambda count: None))
