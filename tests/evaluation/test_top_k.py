"""Numbers of experts per token: their losses are those of merges with that top_k, and the rule that recommends one."""

import json

import pytest

import flexolmo_jax
from flexolmo_jax.combine.merge import merge
from flexolmo_jax.data.corpus import Corpus
from flexolmo_jax.evaluation.loss import evaluate
from flexolmo_jax.evaluation.top_k import TOLERANCE, recommend
from tests.support import small
from tests.support.small import assert_refused, flexolmo

LENGTH, CORPORA = 16, ["first", "second"]
SIZES = (f"--length={LENGTH}", "--batch_size=3")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("top_k")
    small.corpus(home / "first")
    small.corpus(home / "second", ["z" * 40, "short"])
    small.anchor(home / "anchor")
    inputs = [small.contribution(home / name, home / "anchor", seed=i) for i, name in enumerate(["a", "b"], 1)]
    for top_k in (1, 2, 3):
        merge(home / "anchor", inputs, home / f"top-{top_k}", top_k)
    return home


def command(home, *arguments, model="top-3"):
    data = [f"--data={home}/{name}" for name in CORPORA]
    return flexolmo("evaluate", *small.with_defaults(arguments, f"--model={home}/{model}", *data, *SIZES))


@pytest.fixture(scope="module")
def compared(home):
    """What the command prints, and the results that it writes, for each number in an order of its own."""
    result = command(home, "--top_k=3,1,2", "--baseline", f"--json={home}/all.json", f"--out={home}/copy")
    assert (result.status, result.err) == (0, "")
    return result.out, json.loads((home / "all.json").read_text())["top_k"]


def bits(home, model, without=()):
    """{corpus: bits per byte} of a model, evaluated alone."""
    corpora = {name: Corpus.open(home / name) for name in CORPORA}
    losses = evaluate(flexolmo_jax.load(home / model), corpora, without=without, length=LENGTH, batch_size=3)
    return {name: loss.bits_per_byte for name, loss in losses.items()}


def test_losses_are_those_of_merges_with_each_top_k(home, compared):
    _, results = compared
    expected = {top_k: bits(home, f"top-{top_k}") for top_k in (1, 2, 3)}
    averages = {top_k: sum(scores.values()) / 2 for top_k, scores in expected.items()}
    assert len({round(average, 3) for average in averages.values()}) == 3
    assert [entry["top_k"] for entry in results["values"]] == [1, 2, 3]
    for entry in results["values"]:
        top_k = entry["top_k"]
        found = {name: loss["bits_per_byte"] for name, loss in entry["data"].items()}
        assert found == pytest.approx(expected[top_k], rel=1e-6)
        assert entry["average_bits_per_byte"] == pytest.approx(averages[top_k], rel=1e-6)
        change = averages[top_k] / min(averages.values()) - 1
        assert entry["change"] == pytest.approx(change, abs=1e-6)
    assert results["anchor"]["average_bits_per_byte"] == pytest.approx(sum(bits(home, "anchor").values()) / 2, rel=1e-6)


def test_flops_are_those_of_the_matmuls_of_a_token(compared):
    """Counted by hand: in a block of width 16, and in the head, on the mean number of visible positions."""
    _, results = compared
    attention = 16 * 16 * 2 + 2 * 16 * 8 + 2 * 16 * (LENGTH + 1) / 2  # query and out; key and value; scores and sums
    expert, head = 3 * 16 * 24, 16 * 260
    anchor = 2 * (2 * (attention + expert) + head)
    assert results["anchor"]["flops_per_token"] == anchor
    assert results["anchor"]["flops_ratio"] == 1
    for entry in results["values"]:
        router = 3 * 16  # of all experts
        flops = 2 * (2 * (attention + entry["top_k"] * expert + router) + head)
        assert entry["flops_per_token"] == flops
        assert entry["flops_ratio"] == pytest.approx(flops / anchor)


def test_the_table_has_a_line_for_each_number(compared):
    out, results = compared
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("|")]
    header = ["top-k", "FLOPs per token", "relative to anchor", *CORPORA, "average", "change from best"]
    assert lines[0] == header
    assert [line[0] for line in lines[2:]] == ["anchor", "1", "2", "3"]
    for line, entry in zip(lines[2:], [results["anchor"], *results["values"]], strict=True):
        assert line[1] == f"{entry['flops_per_token'] / 1000:.1f} kFLOP"
        assert line[2] == f"{entry['flops_ratio']:.2f}"
        scores = [*(entry["data"][name]["bits_per_byte"] for name in CORPORA), entry["average_bits_per_byte"]]
        assert line[3:6] == [f"{score:.3f}" for score in scores]
        assert line[6] == f"{100 * entry['change']:.2f}%"
    assert f"a document of {LENGTH}" in out
    assert f"recommended: top-{results['recommended']}, the smallest of these" in out
    assert "at most 0.5% above the lowest" in out
    assert "the model has top-3" in out


def test_the_copy_has_the_recommended_number(home, compared):
    out, results = compared
    averages = {entry["top_k"]: entry["average_bits_per_byte"] for entry in results["values"]}
    assert results["recommended"] == recommend(averages) != 3
    assert small.files(home / "copy") == small.files(home / f"top-{results['recommended']}")
    assert f"{home}/copy: top-{results['recommended']}" in out


@pytest.mark.parametrize(
    ("averages", "expected"),
    [
        ({1: 3.0}, 1),
        ({1: 2.009, 2: 2.0, 4: 2.001}, 1),
        ({1: 2.011, 2: 2.009, 4: 2.0}, 2),
        ({4: 2.0, 2: 2.009, 1: 2.011}, 2),
        ({1: 2.5, 2: 2.2, 4: 2.0}, 4),
        ({1: 2.0, 2: 2.1, 4: 2.2}, 1),
        ({2: 2.0, 3: 2.0}, 2),
    ],
)
def test_the_smallest_within_half_a_percent_of_the_best_is_recommended(averages, expected):
    assert TOLERANCE == 0.005
    assert recommend(averages) == expected


def test_the_numbers_are_those_of_the_experts_that_take_part(home, tmp_path):
    result = command(home, "--top_k=2,1", "--without=a", f"--json={tmp_path}/results.json")
    assert (result.status, result.err) == (0, "")
    entries = json.loads((tmp_path / "results.json").read_text())["top_k"]["values"]
    for entry in entries:
        found = {name: loss["bits_per_byte"] for name, loss in entry["data"].items()}
        assert found == pytest.approx(bits(home, f"top-{entry['top_k']}", ["a"]), rel=1e-6)
    assert_refused(command(home, "--top_k=3", "--without=a"), "evaluate", "--top_k=3", "from 1 to 2")


def test_help_states_the_rule():
    text = " ".join(flexolmo("evaluate", "--help").out.split())
    assert f"the smallest whose average bits per byte is at most {TOLERANCE:.1%} above the lowest" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--top_k=0,1"], ["--top_k=0", "integer from 1 to 3"]),
        (["--top_k=1,4"], ["--top_k=4", "integer from 1 to 3"]),
        (["--top_k=-1"], ["--top_k=-1", "integer from 1 to 3"]),
        (["--top_k=1.5"], ["--top_k=1.5", "integer from 1 to 3"]),
        (["--top_k=all"], ["--top_k=all", "integer from 1 to 3"]),
        (["--top_k=1,,2"], ["--top_k=:", "integer from 1 to 3"]),
        (["--top_k=1,2,01"], ["--top_k=01", "given twice"]),
        (["--top_k="], ["--top_k: none given"]),
        (["--top_k=1", "--tasks=hellaswag"], ["--tasks", "leave one out"]),
        (["--top_k=1", "--model={home}/anchor"], ["--model={home}/anchor: has one expert", "give a merged model"]),
        (["--top_k=1", "--without=nosuch"], ["--without=nosuch", "anchor, a, b"]),
        (["--top_k=1", "--without=anchor", "--without=a", "--without=b"], ["--without=b", "keep at least one"]),
        (["--out={out}"], ["--out={out}", "give --top_k"]),
        (["--top_k=1", "--without=a", "--out={out}"], ["--out={out}", "opt out first"]),
        (["--top_k=1", "--model={home}/anchor", "--out={out}"], ["--model={home}/anchor: has one expert"]),
        (["--top_k=1", "--out={home}/top-1"], ["--out={home}/top-1: exists already"]),
        (["--top_k=1", "--out="], ["exists already"]),
    ],
)
def test_the_command_refuses_bad_values(home, tmp_path, arguments, words):
    arguments, words = (
        [text.format(home=home, out=tmp_path / "out") for text in texts] for texts in (arguments, words)
    )
    assert_refused(command(home, *arguments), "evaluate", *words)
    assert not list(tmp_path.iterdir())


def test_numbers_without_corpora_are_refused(home):
    result = flexolmo("evaluate", f"--model={home}/top-2", "--top_k=1")
    assert_refused(result, "evaluate", "--top_k", "give --data")
