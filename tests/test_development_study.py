"""Tests of examples/comparison.py and examples/development_study.py; nothing is trained here."""

import importlib
import json
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"

# Bits per byte that bear every finding out, and what of them to change so that just one no longer holds.
HOLDS = {
    "anchor": {"public": 2.0, "code": 4.0, "headers": 4.0, "legal": 4.0},
    "solo:code": {"public": 2.0, "code": 3.0, "headers": 4.0, "legal": 4.0},
    "solo:headers": {"public": 2.0, "code": 4.0, "headers": 3.0, "legal": 4.0},
    "solo:legal": {"public": 2.0, "code": 4.0, "headers": 4.0, "legal": 3.0},
    "merged": {"public": 2.01, "code": 3.05, "headers": 3.05, "legal": 3.05},
    "merged-without:code": {"public": 2.02, "code": 3.9, "headers": 3.06, "legal": 3.04},
    "merged-without:headers": {"public": 2.0, "code": 3.04, "headers": 3.9, "legal": 3.06},
    "merged-without:legal": {"public": 2.01, "code": 3.06, "headers": 3.04, "legal": 3.9},
}
SHARES = {"code": 0.7, "headers": 0.8, "legal": 0.9}
FAILS = {
    "an expert on its own domain": (0, {"solo:headers": {"headers": 4.0}, "merged": {"headers": 3.06}}),
    "2% on an own domain": (1, {"merged": {"legal": 3.062}}),
    "90% of the gain": (
        2,
        {
            "anchor": {"legal": 3.1},
            "merged": {"legal": 3.02},
            "merged-without:headers": {"legal": 3.02},
            "merged-without:code": {"legal": 3.02},
            "merged-without:legal": {"legal": 3.05},
        },
    ),
    "the public domain": (3, {"merged": {"public": 2.021}, "merged-without:headers": {"public": 2.02}}),
    "the average, against an expert": (4, {"solo:legal": {"public": 0.0}}),
    "another owner's domain": (5, {"merged-without:code": {"legal": 3.09}}),
    "public text without an owner": (5, {"merged-without:legal": {"public": 1.98}}),
    "the floor": (6, {"merged-without:legal": {"legal": 4.01}}),
}


@pytest.fixture(scope="module")
def examples():
    """Imports an example, which is in no package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        yield importlib.import_module


@pytest.fixture
def findings(examples):
    return examples("comparison").findings


def test_findings_hold_where_the_table_bears_them_out(findings):
    assert [finding.holds for finding in findings(HOLDS, SHARES, "public")] == [True] * 8


@pytest.mark.parametrize(("which", "changes"), FAILS.values(), ids=FAILS.keys())
def test_a_finding_fails_where_the_table_denies_it(findings, which, changes):
    table = {model: {**scores, **changes.get(model, {})} for model, scores in HOLDS.items()}
    found = findings(table, SHARES, "public")
    assert [i for i, finding in enumerate(found) if not finding.holds] == [which]


def test_an_expert_with_little_weight_on_its_own_text_fails(findings):
    found = findings(HOLDS, SHARES | {"legal": 0.69}, "public")
    assert [finding.holds for finding in found] == [True] * 7 + [False]
    assert str(found[-1]).startswith("NO  ")
    assert found[-1].result == "69.0% (legal)"


def test_another_owners_expert_may_be_the_best_single_model(findings):
    # Code's expert reads legal text better than the merged model does, by more than 2%.
    table = HOLDS | {"solo:code": HOLDS["solo:code"] | {"legal": 2.95}}
    assert not findings(table, SHARES, "public")[1].holds


@pytest.mark.parametrize(("change", "holds"), [(0.02, True), (0.03, False)])
def test_text_that_nobody_owns_stays_near_the_anchor(findings, change, holds):
    table = {model: scores | {"poems": 3.0 + (change if model == "merged" else 0)} for model, scores in HOLDS.items()}
    found = findings(table, SHARES, "public", ["poems"])
    assert [finding.holds for finding in found] == [True] * 8 + [holds]


def test_scores_are_averaged_over_seeds(examples):
    seeds = [{"anchor": {"code": 1.0, "mail": 2.0}}, {"anchor": {"code": 2.0, "mail": 5.0}}]
    assert examples("comparison").mean_scores(seeds) == {"anchor": {"code": 1.5, "mail": 3.5}}


def test_the_gap_that_is_closed(examples):
    study = examples("development_study")
    domains = (study.PUBLIC, *study.OWNERS)
    values = {"pair": 5.0, "merged": 4.0, "joint": 3.0, "unrestricted": 1.0}
    closed, of_unrestricted = study.gaps({model: dict.fromkeys(domains, value) for model, value in values.items()})
    assert closed.startswith("NO ")
    assert closed.endswith("50.0%")
    assert of_unrestricted.endswith("25.0%")


class Recorder:
    """In place of `flexolmo`: records the commands, and makes what they would make."""

    def __init__(self):
        self.commands = []

    def __call__(self, command, *arguments):
        flags = dict(argument.removeprefix("--").split("=", 1) for argument in arguments)
        self.commands.append((command, flags))
        if command == "merge":
            Path(flags["out"]).mkdir(parents=True)
        else:
            (Path(flags["workdir"]) / ("contribution" if "config.expert" in flags else "model")).mkdir(parents=True)


@pytest.fixture
def study(examples, monkeypatch, tmp_path):
    """A study whose commands are recorded, and its module."""
    module = examples("development_study")
    recorder = Recorder()
    monkeypatch.setattr(module, "flexolmo", recorder)
    monkeypatch.setattr(module.Corpus, "open", lambda path: type("Corpus", (), {"vocab_size": 300}))
    return module.Study(tmp_path / "seed-3", tmp_path / "corpora", 3, module.SIZES["full"]), recorder, module


def test_each_model_is_trained_once_with_the_seed(study):
    study, recorder, module = study
    for _ in range(2):
        study.merge("solo")
        study.merge("pair")
        study.jointly("joint")
    trained = [flags["workdir"].rsplit("/", 1)[-1] for command, flags in recorder.commands if command == "train"]
    kinds = ("solo", "pair", "copy")
    assert trained == ["anchor", *(f"{kind}-{owner}" for kind in kinds for owner in module.OWNERS), "joint"]
    assert {flags["config.seed"] for command, flags in recorder.commands if command == "train"} == {"3"}


def test_joint_training_sees_as_much_text_of_each_domain_as_an_owner_trains_on(study):
    study, recorder, _ = study
    study.jointly("joint")
    study.merge("solo")
    commands = {flags.get("workdir", "").rsplit("/", 1)[-1]: flags for _, flags in recorder.commands}
    joint, solo = commands["joint"], commands["solo-mail"]
    assert joint["config.steps"] == solo["config.steps"]
    assert int(joint["config.data.batch_size"]) == 7 * int(solo["config.data.batch_size"])
    assert len(joint["config.data.train"].split(",")) == 7
    assert solo["config.data.train"].endswith("mail/train")
    assert joint["config.start_from"].endswith("models/copy")


def test_only_the_merge_of_solos_has_the_default_selection(study):
    study, recorder, _ = study
    study.merge("solo")
    study.merge("pair")
    merges = [flags for command, flags in recorder.commands if command == "merge"]
    assert ["selection" in flags for flags in merges] == [False, True]


def test_results_that_are_there_are_read(study):
    study, recorder, _ = study
    study.folder.mkdir()
    results = {"bits_per_byte": {"merged": {"public": 1.0}, "pair": {"public": 2.0}}, "own_shares": {}}
    (study.folder / "test.json").write_text(json.dumps(results))
    assert study.evaluate("test", ["pair"]) == results
    assert recorder.commands == []
