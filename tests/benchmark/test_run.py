"""Sides are measured in turns; those that fail, or are far slower, are left out; every process ends."""

import subprocess
import sys

import pytest

from configs import benchmark as config_file
from flexolmo_jax.benchmark import run
from flexolmo_jax.benchmark.results import experts_table, processes_table, steps_table, versus_table
from flexolmo_jax.errors import UserError
from flexolmo_jax.tables import show
from tests.benchmark.test_jax_steps import SIZES
from tests.support import runs, small

SECONDS = {"flexolmo": 1.0, "eager": 2.0, "grouped_mm": 1.6}


@pytest.fixture
def asked(monkeypatch):
    """[(side, request)] that workers were asked, in order; they need no process."""
    log = []

    class Worker:
        platform, fails = "cpu", ()

        def __init__(self, spec):
            count = spec.config.data.grad_accum_steps
            self.decodes, self.experts = spec.step == "decode", spec.config.moe.num_experts
            self.name = spec.experts or spec.side
            is_divided = count > 1 and spec.side != "flexolmo"
            if self.decodes and self.experts > 1 and spec.side == "flexolmo":
                self.name = f"{self.experts} experts"
            self.name += ", compiled" * spec.compiled + f", {count} micro-batches" * is_divided
            log.append((self.name, "start"))

        def close(self):
            if (self.name, "close") not in log:
                log.append((self.name, "close"))

        def ask(self, request, patience=None):
            assert (self.name, "close") not in log
            log.append((self.name, request))
            if self.name in self.fails:
                raise UserError(f"{self.name} fails")
            seconds = SECONDS.get(self.name.partition(",")[0], 3.0)
            this_program = {"device": "d", "devices": 1, "flops": 8e9, "limit_of": "float32 matmul"}
            if self.decodes:
                this_program |= {"bytes": 4e9, "experts": self.experts}
            built = {"platform": self.platform, "tokens": 100, "compile_seconds": 3.0}
            return {
                "begin": built | (this_program if self.name.startswith(("flexolmo", *"123456789")) else {}),
                "seconds": seconds,
                "token": seconds / 2 * (1.1 if self.experts == 16 else 0.5),
                "limit": 1e10,
                "memory": {"peak_bytes": 2**30, "peak_bytes_above_libraries": 2**29},
            }[request]

    monkeypatch.setattr(run, "Worker", Worker)
    monkeypatch.setattr(run, "PAUSE", 0)
    monkeypatch.setattr(run, "VARIANTS", [(name, False) for name in SECONDS if name != "flexolmo"])
    return log, Worker


def measure(accumulate=1):
    config = config_file.get_config()
    config.data.grad_accum_steps = accumulate
    (result,) = run.benchmark(config, ["pair"], 2, versus=True)
    return result


def test_on_the_host_this_program_takes_turns_with_each_other_side(asked):
    log, _ = asked
    result = measure()
    this_program = [("flexolmo", "limit"), ("flexolmo", "seconds")]
    for name in ("eager", "grouped_mm"):
        first = log.index((name, "memory")) + 1
        assert log[first : first + 7] == [*this_program, (name, "seconds")] * 2 + [(name, "close")]
    assert result["sides"]["flexolmo"]["seconds"] == [1.0] * 6
    assert result["sides"]["flexolmo"]["share_of_limit"] == 0.8
    assert {name for name, request in log if request == "close"} == set(SECONDS)


def test_a_ratio_compares_runs_that_took_turns(asked, monkeypatch):
    """The machine slows down while one side is measured: that is no gain of the others'."""
    log, process = asked
    ask = process.ask

    def slowing(self, request, patience=None):
        answer = ask(self, request, patience)
        slow = request == "seconds" and ("grouped_mm", "start") in log and ("grouped_mm", "close") not in log
        return 3 * answer if slow else answer

    monkeypatch.setattr(process, "ask", slowing)
    sides = measure()["sides"]
    assert sides["transformers, grouped_mm"]["seconds_of_ours"] == [3.0, 3.0]
    names = ("flexolmo", "transformers, eager", "transformers, grouped_mm")
    assert [sides[name]["ratio"] for name in names] == pytest.approx([1, 2, 1.6])


def test_progress_counts_sides(asked):
    shown = []
    run.benchmark(config_file.get_config(), ["pair"], 1, True, say=lambda *progress: shown.append(progress))
    of_transformers = ("eager", "grouped_mm", "eager, 2 micro-batches", "grouped_mm, 2 micro-batches")
    names = ["flexolmo", *(f"transformers, {name}" for name in of_transformers)]
    assert [what for what, *_ in shown[:5]] == [f"pair: {name}" for name in names]
    assert [progress[1:] for progress in shown] == [(done, 5) for done in range(5)]


def test_micro_batches_are_compared_with_the_batch_at_once_and_with_as_many(asked, monkeypatch):
    log, _ = asked
    monkeypatch.setattr(run, "VARIANTS", [("eager", False), ("eager", True)])
    expected = ["flexolmo", "eager", "eager, compiled", "eager, 2 micro-batches"]
    assert [name.removeprefix("transformers, ") for name in measure(accumulate=2)["sides"]] == expected
    assert [name for name, request in log if request == "start"] == expected


def decoding(num_experts, **options):
    (result,) = run.benchmark(config_file.get_config(), ["decode"], 2, num_experts=num_experts, **options)
    return result


def test_models_with_more_experts_decode_in_turns_with_the_first(asked, capsys):
    log, _ = asked
    result = decoding([1, 4, 16], selection="ngram")
    assert list(result["sides"]) == ["flexolmo", "4 experts", "16 experts"]
    started = log.index(("4 experts", "memory")) + 1
    requests = ("limit", "seconds", "token")
    turns = [(name, request) for name in ("flexolmo", "4 experts") for request in requests]
    assert log[started : started + 13] == [*turns, *turns, ("4 experts", "close")]
    # Tokens, of 0.25 s with the anchor: 0.75 and 1.65.
    ratios = [side["token_ratio"] for side in result["sides"].values()]
    assert ratios == pytest.approx([1, 3, 6.6])
    show(experts_table(result))
    lines = [line.split("|")[1:4] for line in capsys.readouterr().out.splitlines() if "|" in line and "--" not in line]
    assert [[cell.strip() for cell in line] for line in lines[1:]] == [
        ["1", "250.00", "1.00"],
        ["4", "750.00", "3.00"],
        ["16", "1,650.00", "6.60"],
    ]


def test_processes_train_in_turns_with_one_that_has_as_many_devices(asked, monkeypatch, capsys):
    log, worker = asked
    places = []

    class Workers(worker):
        def __init__(self, spec, count):
            super().__init__(spec)
            self.name = f"{count} processes"

        def ask(self, request, patience=None):
            answer = super().ask(request, patience)
            return answer | {"processes": 2} if request == "begin" else 1.1 if request == "seconds" else answer

    class Alone(worker):
        def __init__(self, spec):
            super().__init__(spec)
            places.append(spec.place)

    monkeypatch.setattr(run, "Workers", Workers)
    monkeypatch.setattr(run, "Worker", Alone)
    (result,) = run.benchmark(config_file.get_config(), ["solo"], 2, processes=2)
    assert [(place.devices, place.processes) for place in places] == [(2, 1)]
    started = log.index(("2 processes", "memory")) + 1
    requests = [("flexolmo", "limit"), ("flexolmo", "seconds"), ("2 processes", "seconds")]
    assert log[started:] == [*requests, *requests, ("2 processes", "close"), ("flexolmo", "close")]
    show(processes_table(result))
    lines = [line.split("|")[1:4] for line in capsys.readouterr().out.splitlines() if "|" in line and "--" not in line]
    assert [[cell.strip() for cell in line] for line in lines[1:]] == [
        ["1", "1,000.0", "1.00"],
        ["2", "1,100.0", "1.10"],
    ]


def test_the_number_of_experts_per_token_is_at_most_theirs():
    config = config_file.get_config()
    config.moe.top_k = 3
    specs = run._specs("decode", config, False, [1, 2, 64], "ngram")
    assert [(spec.config.moe.num_experts, spec.config.moe.top_k) for spec in specs.values()] == [
        (1, 1),
        (2, 2),
        (64, 3),
    ]
    assert {spec.selection for spec in specs.values()} == {"ngram"}


def test_options_of_decoding_are_refused_elsewhere():
    config = config_file.get_config()
    with pytest.raises(UserError, match="num_experts=1,4: is for decoding alone"):
        run.benchmark(config, ["pair"], 1, num_experts=[1, 4])
    with pytest.raises(UserError, match="selection=ngram: is for decoding alone"):
        run.benchmark(config, ["pair"], 1, selection="ngram")
    with pytest.raises(UserError, match="selection=ngram: transformers has no selector"):
        run.benchmark(config, ["decode"], 1, versus=True, selection="ngram")


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one():
    config = config_file.get_config("64")
    config.update_from_flattened_dict(SIZES)
    (result,) = run.benchmark(config, ["anchor"], 1, processes=2)
    alone, together = result["sides"].values()
    assert (alone["devices"], together["devices"], together["processes"]) == (2, 2, 2)
    assert (alone["tokens"], alone["flops"]) == (together["tokens"], together["flops"])
    assert together["seconds"][0] > 0


@pytest.mark.parametrize("options", [{"versus": True}, {}])
def test_processes_are_for_training_alone(options):
    step = "solo" if options else "decode"
    with pytest.raises(UserError, match="processes=2: is for training steps alone"):
        run.benchmark(config_file.get_config(), [step], 1, processes=2, **options)


def test_decoding_needs_no_batch_that_divides_into_micro_batches():
    config = config_file.get_config()
    config.data.batch_size, config.data.grad_accum_steps = 1, 2
    assert run.prepared(config, "decode").data.grad_accum_steps == 1
    with pytest.raises(UserError, match="grad_accum_steps=2: must divide"):
        run.prepared(config, "joint")


def test_each_side_has_a_device_alone(asked):
    log, process = asked
    process.platform = "gpu"
    measure()
    started = [i for i, (_, request) in enumerate(log) if request == "start"]
    closed = [i for i, (_, request) in enumerate(log) if request == "close"]
    assert all(end < start for end, start in zip(closed, started[1:], strict=False))
    assert log[started[1] - 1] == ("flexolmo", "close")


def test_a_failure_leaves_a_side_out_unless_it_is_this_program(asked):
    log, process = asked
    process.fails = ("eager",)
    assert measure()["left_out"]["transformers, eager"] == "eager fails"
    log.clear()
    process.fails = ("flexolmo",)
    with pytest.raises(UserError, match="flexolmo fails"):
        measure()
    assert log[-1] == ("flexolmo", "close")


# ml_collections loads configuration files by a method that Python is about to lose.
@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_the_command_names_what_is_left_out(asked, monkeypatch):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    _, process = asked
    process.fails = ("eager",)
    monkeypatch.chdir(runs.ROOT)
    result = small.flexolmo("benchmark", "--config=configs/benchmark.py:300", "--step=pair", "--versus=transformers")
    assert result.status == 0
    assert "\npair: transformers, eager is left out: eager fails\n" in result.out


def test_tables_show_medians_and_ratios_to_the_fastest_first(asked, capsys):
    result = measure()
    show(steps_table([result]))
    show(versus_table(result))
    lines = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if "|" in line and "--" not in line]
    lines = [[cell.strip() for cell in line] for line in lines]
    assert lines[1] == [
        "pair",
        "100.0",
        "1,000.0",
        "8.00 GFLOP/s",
        "80%",
        "10.0 GFLOP/s (float32 matmul)",
        "3.0",
        "1.00",
        "0.50",
    ]
    assert [line[:3] for line in lines[3:]] == [
        ["flexolmo", "100.00", ""],
        ["transformers, grouped_mm", "62.50", "1.60"],
        ["transformers, eager", "50.00", "2.00"],
    ]


def test_this_process_leaves_the_devices_to_its_workers():
    code = """
import jax._src.xla_bridge
from configs import benchmark
from flexolmo_jax.benchmark import results, run
run.prepared(benchmark.get_config(), "pair")
results.description()
print(jax._src.xla_bridge.backends_are_initialized())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
