"""Sides are measured in turns; what fails, or is far slower than the others, is left out; every process ends."""

import itertools
import subprocess
import sys

import pytest

from configs import benchmark as config_file
from flexolmo_jax.benchmark import run
from flexolmo_jax.benchmark.tables import limit_notes, steps_table, versus_table
from flexolmo_jax.errors import UserError
from flexolmo_jax.tables import show

SECONDS = {"flexolmo": 1.0, "eager": 2.0, "grouped_mm": 1.6, "batched_mm": 100.0}


@pytest.fixture
def asked(monkeypatch):
    """[(side, request)] of workers that need no process: of what was asked, in order."""
    log = []

    class Process:
        platform, fails = "cpu", ()

        def __init__(self, spec):
            parts = spec.config["data"]["accumulate"]
            self.name = spec.experts or spec.side
            self.name += ", compiled" * spec.compiled + f", {parts} parts" * (parts > 1 and spec.side != "flexolmo")
            log.append((self.name, "start"))

        def close(self):
            if (self.name, "close") not in log:
                log.append((self.name, "close"))

        def ask(self, request, patience=None):
            assert (self.name, "close") not in log
            log.append((self.name, request))
            if self.name in self.fails:
                raise UserError(f"{self.name} fails")
            seconds = SECONDS[self.name.partition(",")[0]]
            ours = {"device": "d", "devices": 1, "flops": 8e9, "limit_of": "float32 matmul"}
            built = {"platform": self.platform, "first_seconds": seconds, "tokens": 100, "compile_seconds": 3.0}
            return {
                "build": built | (ours if self.name == "flexolmo" else {}),
                "step": seconds,
                "limit": 1e10,
                "memory": {"peak_bytes": 2**30, "peak_bytes_above_libraries": 2**29},
            }[request]

    monkeypatch.setattr(run, "Process", Process)
    monkeypatch.setattr(run, "PAUSE", 0)
    monkeypatch.setattr(run, "VARIANTS", [(name, False) for name in SECONDS if name != "flexolmo"])
    return log, Process


def measure(accumulate=1):
    config = config_file.get_config()
    config.data.grad_accum_steps = accumulate
    (result,) = run.benchmark(config, ["expert"], 2, versus=True)
    return result


def test_on_the_host_ours_takes_turns_with_one_after_the_other(asked):
    log, _ = asked
    result = measure()
    ours = [("flexolmo", "limit"), ("flexolmo", "step")]
    for name in ("eager", "grouped_mm"):
        first = log.index((name, "memory")) + 1
        assert log[first : first + 7] == [*ours, (name, "step")] * 2 + [(name, "close")]
    assert result["sides"]["flexolmo"]["seconds"] == [1.0] * 6
    assert result["sides"]["flexolmo"]["share_of_limit"] == 0.8
    assert {name for name, request in log if request == "close"} == set(SECONDS)


def test_a_ratio_is_of_the_runs_in_turns(asked, monkeypatch):
    """The machine slows down while one side is measured: that is no gain of the others'."""
    log, process = asked
    ask = process.ask

    def slowing(self, request, patience=None):
        answer = ask(self, request, patience)
        slow = request == "step" and ("grouped_mm", "start") in log and ("grouped_mm", "close") not in log
        return 3 * answer if slow else answer

    monkeypatch.setattr(process, "ask", slowing)
    sides = measure()["sides"]
    assert sides["grouped_mm"]["seconds_of_ours"] == [3.0, 3.0]
    assert [sides[name]["ratio"] for name in ("flexolmo", "eager", "grouped_mm")] == pytest.approx([1, 2, 1.6])


def test_what_is_ten_times_as_slow_is_left_out_at_once(asked):
    log, _ = asked
    result = measure()
    assert result["sides"].keys() == {"flexolmo", "eager", "grouped_mm"}
    assert result["left_out"] == {"batched_mm": "more than 10 times as slow as another"}
    assert log[-2:] == [("batched_mm", "close"), ("flexolmo", "close")]


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_progress_counts_every_part_and_tells_the_time_left_once_it_can(asked, monkeypatch, platform):
    log, process = asked
    process.platform, process.fails = platform, ("eager",)
    clock = itertools.count(0, 10)
    monkeypatch.setattr(run.time, "monotonic", lambda: float(next(clock)))
    said = []
    run.benchmark(config_file.get_config(), ["expert"], 4, False, say=lambda *what: said.append(what))
    assert [(done, total) for _, done, total, _ in said] == [(i, 5) for i in range(5)]
    # Ten seconds a part; before the first measurement is done its time is not known.
    assert [left for *_, left in said] == [None, None, 30.0, 20.0, 10.0]
    said.clear()
    log.clear()
    run.benchmark(config_file.get_config(), ["expert"], 2, True, say=lambda *what: said.append(what))
    _, done, total, left = said[-1]
    assert left == 10.0 * (total - done)
    # What failed by then is not counted; the last part begun is that of the slowest, which is left out after it.
    assert said[0][2] > total


def test_a_share_above_the_limit_is_explained(asked):
    result = measure()
    assert limit_notes([result]) == []
    result["sides"]["flexolmo"]["share_of_limit"] = 1.2
    decode = {"step": "decode", "sides": {"flexolmo": {"share_of_limit": 1.5, "bytes": 1}}}
    matmul, reading = limit_notes([result, decode])
    assert matmul.startswith("expert: a share above 100% is no error; ")
    assert "matmul" in matmul
    assert reading.startswith("decode: ")
    assert "caches" in reading


def test_where_ours_takes_rows_in_parts_others_take_them_at_once_and_in_parts(asked, monkeypatch):
    log, _ = asked
    monkeypatch.setattr(run, "VARIANTS", [("eager", False), ("eager", True)])
    expected = ["flexolmo", "eager", "eager, compiled", "eager, 2 parts"]
    assert list(measure(accumulate=2)["sides"]) == expected
    assert [name for name, request in log if request == "start"] == expected


def test_decoding_has_rows_that_do_not_divide_into_parts():
    config = config_file.get_config()
    config.data.batch_size, config.data.grad_accum_steps = 1, 2
    assert run.prepared(config, "decode")["data"]["accumulate"] == 1
    with pytest.raises(UserError, match="accumulate=2: must divide"):
        run.prepared(config, "joint")


def test_on_a_device_each_side_has_it_alone(asked):
    log, process = asked
    process.platform = "gpu"
    measure()
    started = [i for i, (_, request) in enumerate(log) if request == "start"]
    closed = [i for i, (_, request) in enumerate(log) if request == "close"]
    assert all(end < start for end, start in zip(closed, started[1:], strict=False))
    assert log[started[1] - 1] == ("flexolmo", "close")


def test_what_fails_is_left_out_unless_it_is_ours(asked):
    log, process = asked
    process.fails = ("eager",)
    assert measure()["left_out"]["eager"] == "eager fails"
    log.clear()
    process.fails = ("flexolmo",)
    with pytest.raises(UserError, match="flexolmo fails"):
        measure()
    assert log[-1] == ("flexolmo", "close")


def test_tables_show_medians_and_ratios_to_the_fastest_first(asked, capsys):
    result = measure()
    show(steps_table([result]))
    show(versus_table(result))
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if "|" in line and "--" not in line]
    rows = [[cell.strip() for cell in row] for row in rows]
    assert rows[1] == [
        "expert",
        "100.0",
        "1,000.0",
        "8.0 GFLOP/s",
        "80%",
        "10.0 GFLOP/s (float32 matmul)",
        "3.0",
        "1.00",
        "0.50",
    ]
    assert [row[:3] for row in rows[3:]] == [
        ["flexolmo", "100.00", ""],
        ["transformers, grouped_mm", "62.50", "1.60"],
        ["transformers, eager", "50.00", "2.00"],
    ]


def test_this_process_leaves_the_devices_to_its_workers():
    code = """
import jax._src.xla_bridge
from configs import benchmark
from flexolmo_jax.benchmark import machine, run, tables
run.prepared(benchmark.get_config(), "expert")
machine.description()
print(jax._src.xla_bridge.backends_are_initialized())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
