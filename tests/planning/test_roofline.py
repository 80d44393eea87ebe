"""An estimate against the matmuls that XLA compiled, and times against amounts over rates."""

import math
import re
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from configs.base import PARTITIONS
from flexolmo_jax.chips import CHIPS
from flexolmo_jax.planning.collectives import CollectiveTotal, collective_totals
from flexolmo_jax.planning.compilation import compile_program, device_bytes
from flexolmo_jax.planning.hlo import array_bytes, executions, hbm_bytes, parse
from flexolmo_jax.planning.plan import Roofline, roofline
from flexolmo_jax.training.run import make_program
from tests.support import planned

# Short sequences, so that what causality masks, and a program computes nevertheless, is little.
SIZES = {"model.d_model": 64, "model.d_ff": 192, "data.sequence_length": 8, "data.batch_size": 4}


def matmul_flops(module):
    """FLOPs of all matmuls that a program executes, from the shapes of their operands."""
    total = 0
    for dot, name, runs, _ in executions(module):
        if dot.opcode == "dot":
            left = module.computations[name][dot.operands[0]].shape
            sizes = [int(size) for size in re.search(r"\[([\d,]*)\]", left)[1].split(",")]
            contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", dot.attributes)[1].split(",")
            total += runs * 2 * array_bytes(dot.shape) // 4 * math.prod(sizes[int(i)] for i in contracted)
    return total


@pytest.fixture(scope="module")
def pair():
    """(configuration, step, estimate, compiled program) of a pair in float32 on one device, of which all is trained."""
    values = {"compute.remat": "full", "partition": PARTITIONS["joint"]}
    config = planned.config("pair", {"data": 1}, SIZES | values)
    step = make_program(config, jax.devices()[:1])
    compiled, _ = compile_program(step, 10**9)
    module = parse(compiled.as_text())
    return config, step, roofline(config, step, CHIPS["v5e"], hbm_bytes(module), []), module


def test_flops_are_those_of_the_compiled_matmuls(pair):
    _, _, line, module = pair
    assert line.recomputed_flops > 0.1 * line.flops
    assert line.flops + line.recomputed_flops == pytest.approx(matmul_flops(module), rel=0.05)


def test_a_step_reads_its_arguments_and_writes_its_state(pair):
    _, step, line, _ = pair
    frozen, state = device_bytes(step.frozen), device_bytes((step.state.trainable, step.state.optimizer))
    assert line.hbm_bytes > frozen + 2 * state


def test_time_is_amount_over_rate(pair):
    config, step, line, module = pair
    assert line.limits["arithmetic"] == (line.flops + line.recomputed_flops) / 197e12
    assert (line.hbm_bytes, line.limits["HBM"]) == (hbm_bytes(module), line.hbm_bytes / 819e9)
    totals = [CollectiveTotal("all-reduce", (), 2, 3e6, 0.5), CollectiveTotal("all-gather", (), 1, 1e6, 0.25)]
    line = roofline(config, step, CHIPS["v5e"], 10, totals)
    assert (line.sent_bytes, line.limits["interconnect"]) == (4e6, 0.75)
    unknown = roofline(config, step, CHIPS["v5e"], None, None)
    assert (unknown.hbm_bytes, unknown.sent_bytes) == (None, None)
    assert unknown.limits == {"arithmetic": line.limits["arithmetic"]}


def test_at_best_all_overlap_and_at_worst_nothing_does():
    line = Roofline(0, 0, 0, 0, {"arithmetic": 2.0, "HBM": 3.0, "interconnect": 5.0})
    assert (line.at_best, line.at_worst) == (5.0, 10.0)
    line = line._replace(limits={"arithmetic": 2.0})
    assert (line.at_best, line.at_worst) == (2.0, 2.0)


GROUPED = "f32[256]{0} all-reduce(%p), replica_groups={GROUPS}, use_global_device_ids=true, to_apply=%add"


@pytest.mark.parametrize(
    ("groups", "axes", "links"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", ("fsdp",), 1),
        ("{{0,4},{1,5},{2,6},{3,7}}", ("data",), 1),
        ("{}", ("data", "fsdp"), 2),
    ],
)
def test_collectives_take_the_links_of_their_group(groups, axes, links):
    """On a slice of 2 x 4, in a program of two all-reduces along the same axes, which are added up."""
    devices = [SimpleNamespace(coords=(x, y, 0)) for x in range(2) for y in range(4)]
    mesh = SimpleNamespace(devices=np.array(devices, object).reshape(2, 4), shape={"data": 2, "fsdp": 4})
    call = GROUPED.replace("{GROUPS}", groups)
    text = (
        "HloModule m, num_partitions=8\n\n%add (a: f32[], b: f32[]) -> f32[] {\n  ROOT %s = f32[] add(%a, %b)\n}\n\n"
        f"ENTRY %main (p: f32[256]) -> f32[256] {{\n  %p = f32[256]{{0}} parameter(0)\n  %q = {call}\n"
        f"  ROOT %r = {call}\n}}\n"
    )
    (total,) = collective_totals(parse(text), mesh, CHIPS["v5e"], (2, 4))
    n = len(re.findall(r"\d", groups.split("}")[0])) or 8
    sent = 2 * 2 * 1024 * (n - 1) / n
    assert (total.kind, total.axes, total.runs, total.bytes_sent) == ("all-reduce", axes, 2, sent)
    assert total.seconds == pytest.approx(sent / (links * 45e9))
