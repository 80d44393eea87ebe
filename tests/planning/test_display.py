"""The tables of a plan, cell by cell."""

import json

import pytest

from flexolmo_jax.chips import CHIPS
from flexolmo_jax.planning.collectives import CollectiveTotal
from flexolmo_jax.planning.compilation import Memory
from flexolmo_jax.planning.display import collectives_table, heading, memory_table, roofline_table, run_line
from flexolmo_jax.planning.plan import Plan, Roofline
from flexolmo_jax.tables import scaled

MIB = 2**20
PLAN = Plan(
    topology="v5e:2x4",
    devices=16,
    chip=CHIPS["v5e"],
    mesh={"data": 2, "fsdp": 8},
    tokens=2_000_000,
    steps=7200,
    parameters=1_234_567,
    compile_seconds=3.4,
    memory=Memory(100 * MIB, 50 * MIB, 200 * MIB, 1024, 649 * MIB, 1000 * MIB, 2000 * MIB),
    collectives=[
        CollectiveTotal("all-gather", ("fsdp", "tensor"), 1200, 4.5e9, 0.1),
        CollectiveTotal("all-reduce", (), 1, 1e6, 3.2e-4),
        CollectiveTotal("collective-permute", (), 1, 1e3, 1e-8),
    ],
    roofline=Roofline(197e12, 197e12 / 3, 819e9, 9e9, {"arithmetic": 4 / 3, "HBM": 1.0, "interconnect": 0.2}),
    advice=["fits"],
)


def cells(table):
    columns = [list(map(str, column.cells)) for column in table.columns]
    return {name: values for name, *values in zip(*columns, strict=True)}


@pytest.mark.parametrize(
    ("value", "unit", "base", "text"),
    [
        (0, "B", 1024, "0.00 B"),
        (0, "s", 1000, "0.00 s"),
        (1023, "B", 1024, "1,023.00 B"),
        (1024, "B", 1024, "1.00 KiB"),
        (15.75 * 2**30, "B", 1024, "15.75 GiB"),
        (2**50 * 2000, "B", 1024, "2,000.00 PiB"),
        (999, "B", 1000, "999 B"),
        (1000, "B", 1000, "1.00 kB"),
        (12_345, "B", 1000, "12.3 kB"),
        (1e6, "B", 1000, "1.00 MB"),
        (1e9, "B", 1000, "1.00 GB"),
        (1.97e14, "FLOP/s", 1000, "197 TFLOP/s"),
        (3e18, "FLOP", 1000, "3,000 PFLOP"),
        (1, "s", 1000, "1.00 s"),
        (1e-3, "s", 1000, "1.00 ms"),
        (4.21e-5, "s", 1000, "42.1 us"),
        (2e-10, "s", 1000, "0.20 ns"),
    ],
)
def test_quantities_get_a_prefix(value, unit, base, text):
    assert scaled(value, unit, base) == text


def test_the_heading_names_model_and_devices():
    assert heading(PLAN) == (
        "1,234,567 parameters on v5e:2x4: 16 devices (TPU v5 lite), mesh data 2, fsdp 8; "
        "2,000,000 tokens a step; compiled in 3 s"
    )
    assert " on v5e:1x1: 1 device (" in heading(PLAN._replace(topology="v5e:1x1", devices=1))


def test_memory_is_a_size_and_a_share_of_what_is_available():
    assert cells(memory_table(PLAN)) == {
        "parameters, trained": ["100.00 MiB", "5.0%"],
        "parameters, frozen": ["50.00 MiB", "2.5%"],
        "optimizer state": ["200.00 MiB", "10.0%"],
        "batch": ["1.00 KiB", "0.0%"],
        "activations, gradients, other temporaries": ["649.00 MiB", "32.5%"],
        "peak": ["1,000.00 MiB", "50.0%"],
        "available": ["1.95 GiB", "100.0%"],
    }


def test_collectives_have_their_axes():
    assert cells(collectives_table(PLAN)) == {
        "all-gather": ["fsdp x tensor", "1,200", "4.50 GB", "100 ms"],
        "all-reduce": ["-", "1", "1.00 MB", "320 us"],
        "collective-permute": ["-", "1", "1.00 kB", "10.0 ns"],
    }
    assert cells(collectives_table(PLAN._replace(collectives=None))) == {}


def test_the_roofline_has_rates_tokens_and_mfu():
    assert cells(roofline_table(PLAN)) == {
        "arithmetic": ["263 TFLOP, 25% recomputed", "197 TFLOP/s", "1.33 s"],
        "HBM": ["819 GB", "819 GB/s", "1.00 s"],
        "interconnect": ["9.00 GB", "45.0 GB/s a link", "200 ms"],
        "at best": ["1,500,000 tokens/s", "75% MFU", "1.33 s"],
        "at worst": ["789,474 tokens/s", "39% MFU", "2.53 s"],
    }
    unknown = PLAN.roofline._replace(hbm_bytes=None, sent_bytes=None, limits={"arithmetic": 4 / 3})
    too_large = PLAN._replace(roofline=unknown)
    assert list(cells(roofline_table(too_large))) == ["arithmetic", "at best"]


def test_the_run_takes_hours_and_chip_hours():
    # 7200 steps of 4/3 s to 38/15 s
    assert run_line(PLAN) == "7,200 steps take 2.67 h to 5.07 h: 43 to 81 chip-hours"
    halves = PLAN._replace(chip=CHIPS["tpu7x"], steps=720)
    assert run_line(halves) == "720 steps take 960 s to 1.82 ks: 2.13 to 4.05 chip-hours"
    assert run_line(PLAN._replace(steps=72_000)) == "72,000 steps take 27 h to 51 h: 427 to 811 chip-hours"


def test_json_has_what_the_tables_show():
    made = json.loads(json.dumps(PLAN.to_json(), allow_nan=False))
    assert made["memory"] == PLAN.memory._asdict() | {"fits": True}
    assert made["roofline"]["at_best"] == 4 / 3
    assert made["chip"]["device_kind"] == "TPU v5 lite"
    assert made["collectives"][0] == {
        "kind": "all-gather",
        "axes": ["fsdp", "tensor"],
        "runs": 1200,
        "bytes_sent": 4.5e9,
        "seconds": 0.1,
    }
    assert PLAN._replace(collectives=[]).to_json()["collectives"] == []
    assert PLAN._replace(collectives=None).to_json()["collectives"] is None
