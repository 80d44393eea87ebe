"""`flexolmo benchmark`: tables, results as JSON, and refusals."""

import importlib.util
import json
import pathlib
import statistics

import pytest

from flexolmo_jax.benchmark import run
from flexolmo_jax.model.architecture import PAIR, Architecture, Layout
from flexolmo_jax.model.flops import decode_step_flops, train_step_flops
from tests.support.small import assert_refused, flexolmo

# ml_collections loads configuration files by a method that Python is about to lose.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

CONFIG = "--config=configs/benchmark.py:300"
SIZES = {
    "model.num_layers": 1,
    "model.d_model": 32,
    "model.num_heads": 2,
    "model.num_kv_heads": 1,
    "model.d_ff": 48,
    "data.sequence_length": 16,
    "data.grad_accum_steps": 1,
    "data.batch_size": 2,
}
OVERRIDES = [f"--config.{key}={value}" for key, value in SIZES.items()]
ARCHITECTURE = Architecture(300, 1, 32, 2, 1, 48, 500_000.0, 1e-6)


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(pathlib.Path(__file__).parents[2])


def measured(file, *arguments):
    result = flexolmo("benchmark", CONFIG, *OVERRIDES, "--runs=2", f"--json={file}", *arguments)
    assert result.status == 0, result
    assert result.err  # a log is told how far it is
    assert all(line.startswith("flexolmo benchmark: ") for line in result.err.splitlines())
    return result.out, json.loads(file.read_text())


def cells(line):
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def assert_metrics(side, count):
    """Those that each side of this program has."""
    assert len(side["seconds"]) == len(side["limit"]) == count
    assert side["tokens_per_second"] == pytest.approx(side["tokens"] / statistics.median(side["seconds"]))
    assert 0 < side["peak_bytes_above_libraries"] < side["peak_bytes"]


def test_a_step_is_shown_in_a_table_and_written_as_json(tmp_path):
    out, results = measured(tmp_path / "new" / "results.json", "--step=decode")
    assert results["config"]["data"]["sequence_length"] == 16
    assert results["machine"]["cores"] > 0
    assert "jax" in results["versions"]
    (result,) = results["steps"]
    assert result["step"] == "decode"
    decode = result["sides"]["flexolmo"]
    assert_metrics(decode, 2)
    assert decode["tokens"] == 2 * 8  # half of each sequence
    # The last six of the eight new tokens are timed by themselves: they see 13 positions on average.
    assert decode["flops"] == decode_step_flops(ARCHITECTURE, Layout("stacked", 4, 2), 2, keys=13)
    share = decode["bytes"] / statistics.median(decode["token_seconds"]) / statistics.median(decode["limit"])
    assert decode["share_of_limit"] == pytest.approx(share)
    header, _, line = map(cells, out.strip().splitlines())
    assert header[:2] == ["step", "tokens/s"]
    assert line[:2] == ["decode", f"{decode['tokens_per_second']:,.1f}"]


@pytest.mark.slow
def test_compares_with_transformers_in_turns(tmp_path, monkeypatch):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(run, "VARIANTS", [("eager", False)])
    monkeypatch.setattr(run, "PAUSE", 0)
    out, results = measured(tmp_path / "results.json", "--step=pair", "--versus=transformers")
    (result,) = results["steps"]
    this_program, eager = result["sides"]["flexolmo"], result["sides"]["transformers, eager"]
    assert_metrics(this_program, 2 + 2)  # alone, and in turns
    trained = {f"blocks/moe/expert/{leaf}" for leaf in ("gate", "up", "down", "router/weight", "router/bias")}
    assert this_program["tokens"] == 32
    assert this_program["flops"] == train_step_flops(ARCHITECTURE, PAIR, trained, batch=2, length=16)
    share = (
        this_program["flops"] / statistics.median(this_program["seconds"]) / statistics.median(this_program["limit"])
    )
    assert this_program["share_of_limit"] == pytest.approx(share)

    ratio = statistics.median(eager["seconds"]) / statistics.median(eager["seconds_of_ours"])
    assert len(eager["seconds"]) == len(eager["seconds_of_ours"]) == 2
    (line,) = [cells(line) for line in out.splitlines() if line.startswith("| transformers, ")]
    assert line[1:5] == [
        f"{eager['tokens_per_second']:,.2f}",
        f"{ratio:.2f}",
        f"{eager['peak_bytes'] / 2**30:.2f}",
        f"{this_program['peak_bytes'] / eager['peak_bytes']:.2f}",
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--step=sleep"], ["--step=sleep", "anchor|solo|pair|joint|router|decode"]),
        (["--runs=0"], ["--runs=0", "positive integer"]),
        (["--versus=megatron"], ["--versus=megatron", "transformers"]),
        (["--config.moe.num_experts=1"], ["--config.moe.num_experts=1", "step=joint", "2 at least"]),
        (["--config.start_from=model"], ["--config.start_from=model", "fresh weights"]),
        (["--config.expert=news"], ["--config.expert=news", "fresh weights"]),
        (["--config.data.batch_size=0"], ["--config.data.batch_size=0", "at least 1"]),
    ],
    ids=lambda value: value[0],
)
def test_bad_options_are_refused_before_any_process_starts(arguments, words, monkeypatch):
    monkeypatch.delattr(run, "Worker")
    assert_refused(flexolmo("benchmark", CONFIG, *arguments), "benchmark", *words)


def test_an_unknown_vocabulary_is_refused():
    assert_refused(flexolmo("benchmark", "--config=configs/benchmark.py:large"), "benchmark", ":large", "ValueError")


def assert_refused_after_progress(result, *words):
    """The last line says why; those before it, what was begun."""
    *progress, line = result.err.splitlines(keepends=True)
    assert all(line.endswith(" done)\n") for line in progress)
    assert_refused(result._replace(err=line), "benchmark", *words)


def test_a_refusal_of_a_worker_is_one_line():
    arguments = ["--step=pair", "--config.mesh.data=3", *OVERRIDES]
    assert_refused_after_progress(flexolmo("benchmark", CONFIG, *arguments), "--config.mesh: data=3")


def test_a_worker_that_fails_is_one_line(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "no_such_platform")
    result = flexolmo("benchmark", CONFIG, "--step=anchor")
    assert_refused_after_progress(
        result, "--step=anchor: flexolmo: ", "Unable to initialize backend 'no_such_platform'"
    )


def test_a_comparison_needs_what_it_compares_with(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else find_spec(name))
    result = flexolmo("benchmark", CONFIG, "--versus=transformers")
    assert_refused(result, "benchmark", "--versus=transformers", "torch", "flexolmo-jax[interop]")
