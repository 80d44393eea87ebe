"""`flexolmo clean` on corpora with planted duplicates, repetitions and held-out text."""

import json

import numpy as np
import pytest

from flexolmo_jax.data.corpus import Corpus
from flexolmo_jax.data.corpus_writer import write_corpus
from flexolmo_jax.data.tokenization.tokenizer import byte_tokenizer
from tests.support import kinds, small
from tests.support.small import assert_refused, flexolmo

EOS = 256


def sentences(seed, words=80):
    """A text of random words, so that no two texts share 13 bytes by chance."""
    letters = np.random.default_rng(seed).integers(97, 123, (words, 7)).astype(np.uint8)
    return " ".join(bytes(word).decode() for word in letters)


HELD_OUT = [sentences(100), sentences(101), "short"]
NEWS = [
    sentences(0),
    sentences(1),
    sentences(0),  # exact
    sentences(2) + "ab" * 32 + sentences(3),  # repeated
    sentences(4) + HELD_OUT[1][:500] + sentences(5),  # contaminated
    sentences(1)[:-20] + sentences(6)[:20],  # near
    sentences(7),
    sentences(8) + HELD_OUT[0][:100],  # shares too little
]
CODE = [
    sentences(7)[20:],  # near, of a document of the other corpus
    sentences(9),
    sentences(2) + "ab" * 32 + sentences(3),  # repeated, and therefore not compared
    sentences(8) + HELD_OUT[0][:100],  # exact
]


@pytest.fixture
def home(tmp_path):
    for name, texts in {"news": NEWS, "code": CODE, "test": HELD_OUT, "more/test": [sentences(102)]}.items():
        small.corpus(tmp_path / "corpora" / name, texts)
    return tmp_path


def texts(path):
    corpus = Corpus.open(path)
    return [corpus.tokenizer().decode(ids) for ids in corpus]


def clean(home, *arguments, data=("news", "code"), against=("test", "more/test")):
    inputs = [f"--data={home}/corpora/{name}" for name in data]
    inputs += [f"--against={home}/corpora/{name}" for name in against]
    return flexolmo("clean", *inputs, *arguments)


def cells(table):
    return [line.replace(" ", "").strip("|").split("|") for line in table.splitlines() if line.startswith("|")]


def test_planted_documents_are_dropped_each_for_its_reason(home):
    result = clean(home, f"--out={home}/out", f"--json={home}/out.json")
    assert (result.status, result.err) == (0, "")
    assert texts(home / "out/news") == [NEWS[i] for i in (0, 1, 6, 7)]
    assert texts(home / "out/code") == [CODE[1]]
    results = json.loads((home / "out.json").read_text())
    share = results["dropped"][2].pop("share")
    assert min(results["dropped"][i].pop("similarity") for i in (3, 4)) > 0.8
    assert share == pytest.approx(488 / (len(HELD_OUT[1]) - 12))
    assert results["dropped"] == [
        {"corpus": "news", "index": 2, "reason": "exact", "original": {"corpus": "news", "index": 0}},
        {"corpus": "news", "index": 3, "reason": "repeated", "times": 32, "ngram": 2},
        {"corpus": "news", "index": 4, "reason": "contaminated", "held_out": {"corpus": "test", "index": 1}},
        {"corpus": "news", "index": 5, "reason": "near", "original": {"corpus": "news", "index": 1}},
        {"corpus": "code", "index": 0, "reason": "near", "original": {"corpus": "news", "index": 6}},
        {"corpus": "code", "index": 2, "reason": "repeated", "times": 32, "ngram": 2},
        {"corpus": "code", "index": 3, "reason": "exact", "original": {"corpus": "news", "index": 7}},
    ]
    counts = {label: results["corpora"][label]["dropped"] for label in ("news", "code")}
    assert counts["news"] == {"repeated": 1, "contaminated": 1, "exact": 1, "near": 1}
    assert counts["code"] == {"repeated": 1, "contaminated": 0, "exact": 1, "near": 1}
    for label, dropped in counts.items():
        record = json.loads((home / "out" / label / "corpus.json").read_text())
        assert record["dropped"] == dropped
        assert record["documents"] == results["corpora"][label]["kept_documents"]
        assert record["tokens"] == results["corpora"][label]["kept_tokens"]


def test_tables_have_the_counts(home):
    header, _, news, code, *overlap = cells(clean(home).out)
    assert header[3:7] == ["repeated", "contaminated", "exact", "near"]
    tokens = sum(len(text) + 1 for text in NEWS)
    kept = sum(len(NEWS[i]) + 1 for i in (0, 1, 6, 7))
    assert news == ["news", "8", f"{tokens:,}", "1", "1", "1", "1", "4", f"{kept:,}"]
    assert code[3:8] == ["1", "0", "1", "1", "1"]
    share = (88 / (len(HELD_OUT[0]) - 12), 488 / (len(HELD_OUT[1]) - 12))
    assert overlap[2:] == [
        ["test", "3", "1", "1", "0", f"{sum(share) / 3:.1%}", f"{share[0] / 3:.1%}"],
        ["more/test", "1", "0", "0", "0", "0.0%", "0.0%"],
    ]
    assert not (home / "out").exists()


def test_what_is_cleaned_is_clean_and_has_the_overlap_that_was_reported(home):
    clean(home, f"--out={home}/out", f"--json={home}/first.json", "--ngram=8", "--overlap=0.05")
    again = [f"--data={home}/out/{name}" for name in ("news", "code")]
    again += [f"--against={home}/corpora/{name}" for name in ("test", "more/test")]
    flexolmo("clean", *again, f"--json={home}/second.json", "--ngram=8", "--overlap=0.05")
    first, second = (json.loads((home / f"{name}.json").read_text()) for name in ("first", "second"))
    assert second["dropped"] == []
    assert first["held_out"]["test"]["above_before"] == 2
    assert first["held_out"]["test"]["mean_after"] == second["held_out"]["test"]["mean_before"] < 0.05


def test_the_overlap_after_cleaning_is_without_duplicates(home):
    similar = small.corpus(home / "similar", [sentences(1), sentences(1)[:-30] + HELD_OUT[0][:30]])
    flexolmo("clean", f"--data={similar}", f"--against={home}/corpora/test", f"--json={home}/out.json")
    results = json.loads((home / "out.json").read_text())
    assert results["corpora"]["similar"]["dropped"]["near"] == 1
    assert results["held_out"]["test"]["mean_before"] > results["held_out"]["test"]["mean_after"] == 0


def test_the_same_input_gives_the_same_bytes(home):
    for name in ("first", "second"):
        clean(home, f"--out={home}/{name}/out", f"--json={home}/{name}/out.json")
    assert small.files(home / "first") == small.files(home / "second")


def test_one_corpus_is_written_to_out_itself(home):
    result = clean(home, f"--out={home}/out", data=["news"], against=())
    assert result.out.splitlines()[-1] == f"{home}/out: 5 documents"
    assert texts(home / "out") == [NEWS[i] for i in (0, 1, 4, 6, 7)]


def test_the_order_of_the_corpora_says_which_document_stays(home):
    clean(home, f"--out={home}/out", data=["code", "news"], against=())
    assert texts(home / "out/code") == [CODE[i] for i in (0, 1, 3)]
    assert texts(home / "out/news") == [NEWS[i] for i in (0, 1, 4)]


@pytest.mark.parametrize(
    ("flags", "dropped"),
    [
        (["--drop=exact"], {2}),
        (["--drop=near"], {2, 5}),
        (["--drop=repeated,near", "--near=0"], {3}),
        (["--drop=repeated", "--repeats=33"], set()),
        (["--near=0.99"], {2, 3}),
        (["--near=0"], {2, 3}),
    ],
)
def test_checks_are_chosen(home, flags, dropped):
    clean(home, f"--out={home}/out", *flags, data=["news"], against=())
    assert texts(home / "out") == [text for i, text in enumerate(NEWS) if i not in dropped]


def test_copies_of_what_is_dropped_do_not_stay(home):
    twice = small.corpus(home / "twice", [*NEWS[3:5], *NEWS[3:5], NEWS[0]])
    flexolmo("clean", f"--data={twice}", f"--against={home}/corpora/test", f"--out={home}/out")
    assert texts(home / "out") == [NEWS[0]]


def test_tokens_of_a_document_are_compared_without_eos(home):
    tokens = np.memmap(home / "corpora/news/tokens-00000.npy", "<u2", "r+")
    assert tokens[-1] == EOS
    tokens[-1] = 97  # the last document may have none
    tokens.flush()
    same = small.corpus(home / "same", [NEWS[7] + "a", sentences(50)])
    flexolmo("clean", f"--data={home}/corpora/news", f"--data={same}", f"--out={home}/out")
    assert texts(home / "out/same") == [sentences(50)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--drop=exact,fuzzy"], ["--drop=exact,fuzzy", "repeated, contaminated, exact, near"]),
        (["--drop="], ["--drop=", "repeated, contaminated, exact, near"]),
        (["--drop=contaminated"], ["--against: none given"]),
        (["--drop=exact", "--against={home}/corpora/test"], ["--against", "--drop=contaminated"]),
        (["--near=1.5"], ["--near=1.5", "from 0 to 1"]),
        (["--near=nan"], ["--near=nan", "from 0 to 1"]),
        (["--overlap=-1"], ["--overlap=-1", "from 0 to 1"]),
        (["--repeats=1"], ["--repeats=1", "at least 2"]),
        (["--ngram=0"], ["--ngram=0", "at least 1"]),
        (["--out={home}/corpora"], ["--out={home}/corpora", "exists already"]),
        (["--data={home}/nosuch"], ["--data={home}/nosuch", "no such directory"]),
        (["--against={home}/corpora/news"], ["corpora/news", "is held out", "is the same"]),
        (["--data={home}/words"], ["words", "its tokenizer is not that of", "corpora/news"]),
    ],
)
def test_bad_flags_are_refused(home, arguments, words):
    file = kinds.write("wordpiece", home)
    flexolmo(
        "tokenize",
        f"--input={home}/corpora/news/corpus.json",
        "--format=text",
        f"--tokenizer={file}",
        f"--out={home}/words",
    )
    arguments = [argument.format(home=home) for argument in arguments]
    result = clean(home, *arguments, data=["news"], against=())
    assert_refused(result, "clean", *(word.format(home=home) for word in words))


def test_nothing_is_written_if_nothing_of_a_corpus_is_kept(home):
    small.corpus(home / "corpora/same", NEWS[:1])
    result = clean(home, f"--out={home}/out", data=["news", "same"], against=())
    assert result.status == 2
    assert result.err.startswith(f"flexolmo clean: --data={home}/corpora/same: no document would be kept")
    assert not (home / "out").exists()


def test_a_failing_copy_leaves_nothing(home):
    corpus = write_corpus(home / "corpora/damaged", [sentences(60), sentences(61)], byte_tokenizer())
    tokens = np.memmap(corpus.path / "tokens-00000.npy", "<u2", "r+")
    tokens[5] = 300
    tokens.flush()
    result = clean(home, f"--out={home}/out", data=["code", "damaged"], against=())
    assert result.status == 2
    assert "the id 300 at offset 5" in result.err
    assert [path.name for path in home.iterdir()] == ["corpora"]
