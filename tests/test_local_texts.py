"""Tests of examples/local_texts.py: real text, in corpora and splits that do not overlap."""

import importlib.util
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "examples" / "local_texts.py"
TRAIN_BYTES, HELDOUT_BYTES = 150_000, 24_000


def load_script():
    """Imports the example, which is in no package."""
    spec = importlib.util.spec_from_file_location("local_texts", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


local_texts = load_script()


@pytest.fixture(scope="module")
def corpora():
    """Small corpora of this machine's Python and packages alone."""
    return local_texts.gather(TRAIN_BYTES, HELDOUT_BYTES, system=False)


def plain_shingles(text):
    """Runs of eight lower-case words, or the one shorter run that a tiny text has."""
    words = text.lower().split()
    return {tuple(words[start : start + 8]) for start in range(max(1, len(words) - 7))}


def size(texts):
    """Bytes of all texts."""
    return sum(len(text.encode()) for text in texts)


@pytest.mark.parametrize("domain", ["public", "code", "headers", "legal"])
def test_every_domain_fills_its_splits_and_stays_below_its_limits(corpora, domain):
    train, heldout = corpora[domain]["train"], corpora[domain]["heldout"]
    assert 0.8 * TRAIN_BYTES < size(train) <= TRAIN_BYTES
    assert 0.8 * HELDOUT_BYTES < size(heldout) <= HELDOUT_BYTES
    assert len(heldout) >= 3
    assert all(200 <= len(text.encode()) <= 100_000 for text in train + heldout)
    assert all(len(text.encode()) <= 12_000 for text in heldout)


def test_no_text_is_in_two_places_whatever_its_spacing(corpora):
    texts = [" ".join(text.split()) for splits in corpora.values() for docs in splits.values() for text in docs]
    assert len(set(texts)) == len(texts)


def test_heldout_text_is_mostly_new(corpora):
    seen = set().union(*(plain_shingles(text) for splits in corpora.values() for text in splits["train"]))
    for domain, splits in corpora.items():
        for text in splits["heldout"]:
            runs = plain_shingles(text)
            assert len(runs & seen) <= 0.5 * len(runs), (domain, text[:200])


def test_another_process_writes_the_same_files(corpora, tmp_path):
    command = (
        "import runpy, sys; script = runpy.run_path(sys.argv[1]);"
        "script['write_jsonl'](script['gather'](int(sys.argv[2]), int(sys.argv[3]), False), sys.argv[4])"
    )
    arguments = [str(SCRIPT), str(TRAIN_BYTES), str(HELDOUT_BYTES), str(tmp_path / "second")]
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", command, *arguments], check=True, env=environment)
    local_texts.write_jsonl(corpora, tmp_path / "first")
    first = {path.name: path.read_bytes() for path in (tmp_path / "first").iterdir()}
    second = {path.name: path.read_bytes() for path in (tmp_path / "second").iterdir()}
    assert first == second
    assert len(first) == 8
    lines = (tmp_path / "first" / "legal.train.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["text"] for line in lines] == corpora["legal"]["train"]


def made_up_texts():
    """Random texts, with exact, re-spaced, edited, contained and assembled copies among them."""
    generator = random.Random(0)
    vocabulary = [f"word{number}" for number in range(50)]
    texts = [" ".join(generator.choices(vocabulary, k=generator.randrange(20, 400))) for _ in range(20)]
    edited = texts[2].split()
    edited[len(edited) // 2] = "changed"
    copies = [texts[0], texts[1].replace(" ", "\n  ").upper(), " ".join(edited), texts[3][: len(texts[3]) // 2]]
    assembled = [texts[4] + " " + texts[5], texts[6] + " " + " ".join(generator.choices(vocabulary, k=600))]
    mixed = texts + copies + assembled + ["only three words", "only three  words", "and three others"]
    generator.shuffle(mixed)
    return mixed


def test_near_copies_are_those_a_plain_search_finds():
    texts = made_up_texts()
    expected, seen = [], set()
    for text in texts:
        runs = plain_shingles(text)
        expected.append(len(runs & seen) > 0.8 * len(runs))
        seen |= set() if expected[-1] else runs
    assert local_texts.near_copies(local_texts.number_shingles(texts)) == expected
    assert 5 <= sum(expected) < len(texts) - 15


def test_shared_parts_are_those_a_plain_search_finds():
    texts = made_up_texts()
    all_runs = [plain_shingles(text) for text in texts]
    expected = []
    for index, runs in enumerate(all_runs):
        others = set().union(*(other for number, other in enumerate(all_runs) if number != index))
        expected.append(len(runs & others) / len(runs))
    assert local_texts.shared_parts(local_texts.number_shingles(texts)) == pytest.approx(expected)
    assert min(expected) == 0.0
    assert max(expected) == 1.0


def test_docstrings_keep_sentences_and_leave_code():
    source = '"""First sentence."""\ndef f():\n    """Second one.\n\n    >>> f()\n    3\n    """\n    x = "no"\n'
    assert local_texts.docstrings(source) == "First sentence.\n\nSecond one.\n"
    assert local_texts.docstrings("def broken(:") == ""


def test_bundled_licences_are_split():
    bundle = "First licence.\n" + "-" * 80 + "\nSecond\n------\nlicence.\n----\nThird.\nName: four\nFourth.\n"
    parts = ["First licence.\n", "Second\n------\nlicence.\n", "Third.\n", "Name: four\nFourth.\n"]
    assert local_texts.licences(bundle) == parts
    debian = "Format: any\n\nFiles: *\nLicense: A\n\nLicense: B\n Some terms.\n .\n More.\n\nFiles: x\n"
    assert local_texts.licences(debian) == ["License: B\n Some terms.\n .\n More.\n"]


@pytest.mark.parametrize(
    "junk",
    ["short", "x" * 2_500, "0x00, 0xff, " * 50, "one line again\n" * 100, "Текст не на английском. " * 30],
    ids=["short", "one long line", "table", "repeated", "not English"],
)
def test_junk_is_no_document(junk):
    assert not local_texts.is_document(junk)


def test_the_command_writes_and_says_what_it_found(tmp_path, capsys):
    local_texts.main([f"--out={tmp_path}", "--train_bytes=20000", "--heldout_bytes=4000"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:4] == ["domain", "split", "documents", "bytes"]
    written = {path.name for path in tmp_path.iterdir()}
    assert {f"{line.split()[0]}.{line.split()[1]}.jsonl" for line in lines[1:]} == written
