"""The opt-out matrix of harness tasks, and the command that prints it."""

import json
import sys

import pytest

from tests.support import harness_tasks, small
from tests.support.small import assert_refused, flexolmo

pytest.importorskip("lm_eval")

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

import flexolmo_jax
from flexolmo_jax.interop import harness
from flexolmo_jax.interop.harness import FlexOlmoLM

TASKS = ["local_choice", "local_rolling"]
BATCH, MAX_LENGTH = 8, 127  # few shapes, and a text in several windows where its tokens are characters
OPTIONS = {"include_path": str(harness_tasks.TASKS), "batch_size": BATCH, "max_length": MAX_LENGTH}
COLUMNS = ["local_choice:acc", "local_choice:acc_norm"]
COLUMNS += [f"local_rolling:{metric}" for metric in ("word_perplexity", "byte_perplexity", "bits_per_byte")]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("harness")
    harness_tasks.write_models(home)
    small.corpus(home / "corpus")
    with harness_tasks.offline(home / "cache"), pytest.MonkeyPatch.context() as patch:
        # The harness's own tasks take seconds to list.
        patch.setattr(harness, "_TaskManager", lambda **options: TaskManager(include_defaults=False, **options))
        yield home


@pytest.fixture(scope="module")
def expected(home):
    """{label: {column: (value, standard error or None)}} by the harness alone, each label from a merge of its own."""
    manager = TaskManager(include_path=OPTIONS["include_path"], include_defaults=False)
    results = {}
    for label in ("merged", *(f"without-{name}" for name in harness_tasks.EXPERTS)):
        lm = FlexOlmoLM(str(home / label), batch_size=BATCH, max_length=MAX_LENGTH)
        found = simple_evaluate(lm, tasks=TASKS, task_manager=manager)["results"]
        results[label.replace("merged", "full model").replace("-", " ")] = {
            f"{task}:{metric}": (found[task][f"{metric},none"], found[task][f"{metric}_stderr,none"])
            for task, metric in (column.split(":") for column in COLUMNS)
        }
    return results


def assert_equal(matrix, expected):
    assert list(matrix) == list(expected)
    for label, columns in expected.items():
        assert list(matrix[label]) == COLUMNS
        for column, (value, error) in columns.items():
            found = matrix[label][column]
            assert found["value"] == pytest.approx(value, rel=1e-6)
            assert found["standard_error"] == (None if error == "N/A" else pytest.approx(error, rel=1e-6))


def run(home, *arguments, model="merged"):
    options = [f"--{name}={value}" for name, value in OPTIONS.items()]
    return flexolmo("evaluate", f"--model={home}/{model}", *small.with_defaults(arguments, *options))


def cells(text):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.strip().splitlines() if "|" in line]


def test_the_command_prints_a_line_for_each_expert_left_out(home, expected, tmp_path):
    """Each equals the merge that never had that expert; a table of corpora may stand before."""
    result = run(home, f"--tasks={','.join(TASKS)}", f"--data={home}/corpus", f"--json={tmp_path}/written.json")
    assert result.status == 0, result.err
    written = json.loads((tmp_path / "written.json").read_text())
    assert list(written["data"]) == ["corpus"]
    assert_equal(written["tasks"], expected)
    table = cells(result.out)[3:]
    assert table[0] == ["model", *COLUMNS]
    for line in table[2:]:
        estimates = [estimate.values() for estimate in written["tasks"][line[0]].values()]
        assert line[1:] == [f"{v:.3f}" if error is None else f"{v:.3f} ({error:.3f})" for v, error in estimates]
    assert [line[0] for line in table[2:]] == list(expected)
    assert len({columns["local_rolling:bits_per_byte"] for columns in expected.values()}) == len(expected)


def test_experts_that_are_named_give_a_single_line(home, expected, tmp_path):
    result = run(home, f"--tasks={','.join(TASKS)}", "--without=news", f"--json={tmp_path}/written.json")
    assert result.status == 0, result.err
    written = json.loads((tmp_path / "written.json").read_text())
    assert list(written) == ["tasks"]
    assert_equal(written["tasks"], {"without news": expected["without news"]})


def test_a_limit_takes_the_first_documents_and_an_anchor_has_one_line(home):
    model = flexolmo_jax.load(home / "anchor")
    found = harness.evaluate_tasks(model, ["local_ch*"], limit=2, **OPTIONS)
    assert list(found) == ["full model"]
    assert list(found["full model"]) == COLUMNS[:2]
    assert {estimate["value"] for estimate in found["full model"].values()} <= {0.0, 0.5, 1.0}


def test_a_group_with_metrics_stands_for_its_tasks():
    """And a filter is named, unless it is the plain one."""
    results = {
        "results": {
            "mean": {"name": "mean", "sample_len": 4, "acc,none": 0.5, "acc_stderr,none": 0.1},
            "first": {"acc,none": 0.25, "acc_stderr,none": 0.1},
            "other": {"alias": "other", "exact_match,strict": 1, "exact_match_stderr,strict": "N/A", "note,none": "x"},
        },
        "groups": {"mean": {}},
        "group_subtasks": {"mean": ["first"], "tagged": ["other"]},
    }
    assert harness._estimates(results) == {
        "mean:acc": {"value": 0.5, "standard_error": 0.1},
        "other:exact_match,strict": {"value": 1.0, "standard_error": None},
    }


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tasks=nosuch"], ["--tasks=nosuch", "no such task", "include_path"]),
        (["--tasks=local_choice,nosuch"], ["--tasks=nosuch", "no such task"]),
        (["--tasks=local_choice", "--include_path=nosuch"], ["--include_path=nosuch", "no such directory"]),
        (["--tasks=local_choice", "--limit=0"], ["--limit=0"]),
        (["--tasks=local_choice", "--without=nosuch"], ["--without=nosuch", "anchor, code, news"]),
        (["--tasks=local_generate", "--max_length=8"], ["max_length=8", "16 tokens of max_gen_toks"]),
        ([], ["--data: none given", "--tasks"]),
    ],
)
def test_the_command_refuses_bad_values(home, arguments, words):
    result = run(home, *arguments)
    assert_refused(result._replace(err=result.err.splitlines(keepends=True)[-1]), "evaluate", *words)


def test_without_the_extra_it_says_what_to_install(home, monkeypatch):
    monkeypatch.delitem(sys.modules, harness.__name__)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delattr("flexolmo_jax.interop.harness")
    result = run(home, "--tasks=local_choice")
    assert_refused(result, "evaluate", "--tasks: needs lm-eval; pip install 'flexolmo-jax[eval]'")
