"""The held-out loss, against plain numpy on the model's logits."""

import dataclasses
import json
import math
import shutil

import numpy as np
import pytest

import flexolmo_jax
from flexolmo_jax.data.corpus import Corpus
from flexolmo_jax.data.tokenization.tokenizer import byte_tokenizer
from flexolmo_jax.errors import UserError
from flexolmo_jax.evaluation.loss import evaluate, evaluate_models
from flexolmo_jax.evaluation.results import format_bits
from tests.support import small
from tests.support.small import assert_refused, flexolmo

LENGTH, EOS = 16, 256
SHAPE = (f"--length={LENGTH}", "--batch_size=3")  # of all batches that can, so that they are compiled once


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("loss")
    small.corpus(home / "first")
    small.corpus(home / "second", ["z" * 40, "short"])
    small.anchor(home / "anchor")
    contributions = [
        f"--contribution={small.contribution(home / n, home / 'anchor', seed=i)}" for i, n in enumerate(["a", "b"])
    ]
    flexolmo("merge", f"--anchor={home}/anchor", *contributions, "--top_k=2", f"--out={home}/merged")
    return home


def plain_nats(model, texts, without):
    """Negative log likelihood of every token: the stream of documents is cut into sequences, those into segments."""
    stream = [(i, pair) for i, text in enumerate(texts) for pair in pairs(text)]
    segments = []
    for start in range(0, len(stream), LENGTH):
        sequence = stream[start : start + LENGTH]
        segments += [[pair for j, pair in sequence if j == i] for i in sorted({i for i, _ in sequence})]
    tokens = np.zeros((len(segments), LENGTH), int)
    for sequence, segment in zip(tokens, segments, strict=True):
        sequence[: len(segment)] = [token for token, _ in segment]
    logits = np.asarray(model.logits(tokens, without=without), np.float64)
    log_normaliser = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
    return sum(
        log_normaliser[i, j] - logits[i, j, target]
        for i, segment in enumerate(segments)
        for j, (_, target) in enumerate(segment)
    )


def pairs(text):
    ids = [*text.encode(), EOS]
    return list(zip([EOS, *ids[:-1]], ids, strict=True))


@pytest.mark.parametrize("without", [(), ("a",)])
def test_bits_per_byte_are_those_of_the_logits(home, without):
    model = flexolmo_jax.load(home / "merged")
    corpora = {"first": Corpus.open(home / "first")}
    steps = []
    loss = evaluate(model, corpora, without=without, length=LENGTH, batch_size=3, advance=lambda: steps.append(1))
    nats, size = plain_nats(model, small.TEXTS, without), len("".join(small.TEXTS).encode())
    tokens = size + len(small.TEXTS)
    row = loss["first"].as_dict()
    assert (row["documents"], row["tokens"], row["bytes"]) == (len(small.TEXTS), tokens, size)
    assert row["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert row["nats_per_token"] == pytest.approx(nats / tokens, rel=1e-5)
    assert row["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    assert list(row["routing"]) == ["anchor", "a", "b"]
    assert sum(row["routing"].values()) == pytest.approx(1)
    assert [name for name, share in row["routing"].items() if share == 0] == list(without)
    assert len(steps) == math.ceil(tokens / LENGTH / 3)


def test_the_command_prints_a_line_for_each_corpus_and_writes_them(home, tmp_path):
    arguments = [f"--model={home}/merged", f"--data={home}/first", f"--data={home}/second/"]
    result = flexolmo("evaluate", *arguments, *SHAPE, f"--json={tmp_path}/new/rows.json")
    assert (result.status, result.err) == (0, "")
    rows = json.loads((tmp_path / "new" / "rows.json").read_text())["data"]
    assert list(rows) == ["first", "second"]
    nats = plain_nats(flexolmo_jax.load(home / "merged"), small.TEXTS, ())
    size = len("".join(small.TEXTS).encode())
    assert rows["first"]["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in result.out.strip().splitlines()]
    assert table[0] == ["data", "documents", "tokens", "bytes", "nats per token", "bits per byte", "perplexity"]
    for line in table[2:]:
        row = rows[line[0]]
        assert line[1:4] == [str(row[key]) for key in ("documents", "tokens", "bytes")]
        assert line[4:] == [f"{row[key]:.3f}" for key in ("nats_per_token", "bits_per_byte", "perplexity")]


def test_the_command_refuses_another_tokenizer(home, tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.backend.add_special_tokens(["<|another|>"])
    small.corpus(tmp_path / "other", tokenizer=dataclasses.replace(tokenizer))
    result = flexolmo("evaluate", f"--model={home}/merged", f"--data={tmp_path}/other")
    assert_refused(result, "evaluate", tmp_path / "other", "tokenizer", "tokenize the text with that one")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--without=nosuch"], ["--without=nosuch", "anchor, a, b"]),
        (["--without=anchor", "--without=a", "--without=b"], ["--without=b", "keep at least one"]),
        (["--length=0"], ["--length=0", "positive"]),
        (["--batch_size=0"], ["--batch_size=0", "positive"]),
        (["--dtype=float16"], ["--dtype=float16", "float32|bfloat16"]),
        (["--data={home}/nosuch"], ["nosuch", "no such directory"]),
        (["--data={home}/anchor"], ["anchor", "not a corpus"]),
        (["--model={home}/nosuch"], ["--model=", "no such directory", "give a model directory"]),
        (["--model={home}/a"], ["--model=", "is a contribution directory", "give a model directory"]),
    ],
)
def test_the_command_refuses_bad_values(home, arguments, words):
    flags = [argument.format(home=home) for argument in arguments]
    flags = small.with_defaults(flags, f"--model={home}/merged", f"--data={home}/first")
    assert_refused(flexolmo("evaluate", *flags), "evaluate", *words)


def test_the_baseline_is_the_anchors_own_loss(home, tmp_path):
    def rows(model, *flags):
        file = tmp_path / "results.json"
        data = [f"--data={home}/first", f"--data={home}/second", *SHAPE]
        result = flexolmo("evaluate", f"--model={home}/{model}", *data, f"--json={file}", *flags)
        assert (result.status, result.err) == (0, "")
        return json.loads(file.read_text())["data"], result.out

    anchor, _ = rows("anchor")
    merged, _ = rows("merged")
    for without in ([], ["--without=a"]):
        found, out = rows("merged", "--baseline", *without)
        for name in anchor:
            baseline = found[name].pop("anchor")
            assert baseline["nats_per_token"] == pytest.approx(anchor[name]["nats_per_token"], rel=1e-6)
            difference = found[name]["bits_per_byte"] - baseline["bits_per_byte"]
            assert f" {format_bits(difference, '+')} |" in out
        assert (found == merged) == (not without)
        assert "the anchor it was merged from" in out
    found, out = rows("anchor", "--baseline")
    assert found == anchor
    assert f"{home}/anchor: is an anchor" in out


def test_a_baseline_without_corpora_is_refused(home):
    result = flexolmo("evaluate", f"--model={home}/merged", "--tasks=hellaswag", "--baseline")
    assert_refused(result, "evaluate", "--baseline", "give --data")


def test_a_batch_beyond_memory_is_refused_before_it_is_computed(home, monkeypatch):
    corpus = small.corpus(home / "long", ["x" * 40_000]) if not (home / "long").exists() else home / "long"
    monkeypatch.setattr("flexolmo_jax.memory.available_bytes", lambda _: 2**30)
    monkeypatch.setattr("flexolmo_jax.inference.model.Model.loss_step", None)
    flags = [f"--model={home}/anchor", f"--data={corpus}", "--length=10000000"]
    words = ["--length=10000000", "1 x 40,001 tokens", "GiB of memory, and 1.0 are free", "--batch_size"]
    assert_refused(flexolmo("evaluate", *flags), "evaluate", *words)


def test_sequences_longer_than_any_corpus_are_as_long_as_the_longest(home, tmp_path):
    losses = []
    for length in (Corpus.open(home / "first").tokens, 10**12):
        file = tmp_path / f"{length}.json"
        flags = [f"--model={home}/anchor", f"--data={home}/first", f"--length={length}", f"--json={file}"]
        assert flexolmo("evaluate", *flags).status == 0
        losses.append(json.loads(file.read_text())["data"]["first"]["nats_per_token"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.fixture
def damaged(home, tmp_path):
    """A corpus with one token changed, to another of the vocabulary."""
    shutil.copytree(home / "first", tmp_path / "damaged")
    tokens = np.memmap(tmp_path / "damaged" / "tokens-00000.npy", "<u2", "r+")
    tokens[3] ^= 1
    tokens.flush()
    return tmp_path / "damaged"


def test_the_command_verifies_token_files_when_told_to(home, damaged):
    arguments = [f"--model={home}/merged", f"--data={home}/first", f"--data={damaged}", *SHAPE]
    assert flexolmo("evaluate", *arguments).status == 0
    words = [f"{damaged}/tokens-00000.npy", "differs from the digest in corpus.json"]
    assert_refused(flexolmo("evaluate", *arguments, "--verify"), "evaluate", *words)


def test_the_command_refuses_ids_outside_the_vocabulary(home, damaged, tmp_path):
    tokens = np.memmap(damaged / "tokens-00000.npy", "<u2", "r+")
    tokens[7] = 259  # of the model's vocabulary of 260, and not of the tokenizer's
    tokens.flush()
    flags = [f"--model={home}/merged", f"--data={damaged}", f"--json={tmp_path}/rows.json", *SHAPE]
    result = flexolmo("evaluate", *flags)
    assert_refused(result, "evaluate", f"{damaged}/tokens-00000.npy: damaged: the id 259 at offset 7")
    assert not (tmp_path / "rows.json").exists()


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_a_loss_that_is_no_number_is_an_error(home, value):
    model = flexolmo_jax.load(home / "merged")
    model.params["head"] = model.params["head"].at[:, 3].set(value)
    with pytest.raises(UserError, match=r"first: the loss is (nan|inf|[0-9.e+]+) nats per token"):
        evaluate(model, {"first": Corpus.open(home / "first")}, length=LENGTH, batch_size=3)


def test_models_are_evaluated_with_each_expert_left_out(home):
    corpora = {"first": Corpus.open(home / "first")}
    directories = {"before": home / "anchor", "after": home / "merged"}
    results = evaluate_models(directories, corpora, length=LENGTH, batch_size=3)
    assert list(results) == ["before", "after"]
    assert results["before"].without == {}
    assert results["after"].roster == ["anchor", "a", "b"]
    model = flexolmo_jax.load(home / "merged")
    assert list(results["after"].without) == ["a", "b"]
    for name, losses in [(None, results["after"].losses), *results["after"].without.items()]:
        expected = evaluate(model, corpora, without=[name] if name else [], length=LENGTH, batch_size=3)
        assert losses["first"].nats == pytest.approx(expected["first"].nats, rel=1e-6)


@pytest.fixture(scope="module")
def opted_out(home):
    assert flexolmo("opt-out", f"--model={home}/merged", "--expert=a", f"--out={home}/opted-out").status == 0
    return home / "opted-out"


def test_the_report_command_compares_any_models(home, opted_out, tmp_path):
    (home / "run").mkdir()
    (home / "run" / "metrics.jsonl").write_text('{"step": 1, "loss": 4.5}\n{"step": 2, "loss": 3.25}\n')
    models = [f"--model=before={home}/anchor", f"--model={home}/merged", f"--model={opted_out}"]
    options = [f"--data=news={home}/first", f"--data={home}/second", f"--run={home}/run", *SHAPE]
    result = flexolmo("report", *models, *options, f"--out={tmp_path}/new/report.html", "--title=My models")
    assert (result.status, result.err) == (0, "")
    labels = ["before", "merged", "merged without a", "merged without b", "opted-out"]
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in result.out.splitlines()]
    assert [line[0] for line in table if line][2:] == labels
    assert ["bits per byte", "news", "second", "average"] in table
    news = {"news": Corpus.open(home / "first")}
    expected = evaluate(flexolmo_jax.load(opted_out), news, length=LENGTH, batch_size=3)
    page = (tmp_path / "new" / "report.html").read_text()
    for text in (*labels, "My models", f"{expected['news'].bits_per_byte:.3f}", "3.250", "Opt-out certificate"):
        assert text in page
    assert f"{expected['news'].bits_per_byte:.3f}" in next(line for line in table if line[:1] == ["opted-out"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data={home}/first"], ["--model: none given", "once for each"]),
        (["--model={home}/anchor"], ["--data: none given", "once for each"]),
        (["--model={home}/nosuch", "--data={home}/first"], ["--model={home}/nosuch: no such directory"]),
        (["--model={home}/anchor", "--data=news={home}/nosuch"], ["{home}/nosuch: no such directory"]),
        (["--model=x={home}/a", "--data={home}/first"], ["{home}/a: is a contribution directory"]),
        (["--model={home}/anchor", "--model=anchor={home}/merged", "--data={home}/first"], ["second called 'anchor'"]),
        (["--model=x=", "--data={home}/first"], ["--model=x=: is neither a directory nor NAME=DIR"]),
        (["--model={home}/anchor", "--data={home}/first", "--reference=x"], ["--reference=x", "anchor"]),
        (["--model={home}/anchor", "--data={home}/first", "--run={home}"], ["{home}/metrics.jsonl"]),
        (["--model={home}/anchor", "--data={home}/first", "--out={home}"], ["--out={home}: is a directory"]),
    ],
)
def test_the_report_command_refuses_bad_values(home, tmp_path, arguments, words):
    flags = small.with_defaults([argument.format(home=home) for argument in arguments], f"--out={tmp_path}/x.html")
    assert_refused(flexolmo("report", *flags), "report", *(word.format(home=home) for word in words))
    assert not list(tmp_path.iterdir())
