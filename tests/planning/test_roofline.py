"""The bounds of a step against sums written out by hand, and times against amounts over rates."""

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from configs.base import PARTITIONS
from flexolmo_jax import sharding
from flexolmo_jax.model.architecture import ANCHOR, Layout
from flexolmo_jax.model.flops import recomputed_flops, train_step_flops
from flexolmo_jax.model.kernels.grouped_matmul import MOSAIC_TILE, block_tokens
from flexolmo_jax.planning.chips import CHIPS
from flexolmo_jax.planning.collectives import DCN, ICI, Collective
from flexolmo_jax.planning.roofline import Roofline, block_work, hbm_bytes, network_seconds, recomputed_parts, roofline
from flexolmo_jax.training.run import make_program
from tests.support import planned

D, F, V, N, LAYERS, TOKENS = 32, 24, 64, 16, 2, 16 * 32  # N: width of keys, two heads of 8
# Elements of a block.
ATTENTION = 2 * D * D + 2 * D * N + D + N + 2 * D  # with the norms of queries, keys, and what goes to the stream
EXPERT = 3 * D * F + D + 1
# What goes through memory for a token in a block.
PROJECTIONS = (
    3 * D + (D + 2 * N) + 2 * D
)  # x to each of query, key and value; to them; attention's result to the stream
SCORED = (D + 2 * N) + D
FED = (D + F) + (D + F) + (2 * F + D)  # gate; up; what gate and up are, and the result
SUMS = 2 * 3 * D
END = 5 * D  # the row of the embedding, read and written; head: its input, the gradient of that, the input again


def moved(kind="pair", mesh=None, platform="cpu", **values):
    values = {"compute.dtype": "bfloat16"} | {key.replace("__", "."): value for key, value in values.items()}
    config = planned.config(kind, mesh, values)
    program = make_program(config, jax.devices())
    compute = dataclasses.replace(program.model.compute, platform=platform)
    return hbm_bytes(config, program._replace(model=program.model.clone(compute=compute)))


def pair(attention_passes=2, expert_passes=2, again=0, parts=1):
    """Bytes of a pair in bfloat16 on each of 8 copies; `again` are the elements of a block computed again."""
    weights = 2 * parts * LAYERS * (attention_passes * ATTENTION + expert_passes * 2 * EXPERT)
    head = 2 * parts * 2 * D * V  # for the logits, and for the gradient of the head's input
    trained = LAYERS * EXPERT
    gradients = 2 * parts * 2 * trained + (2 * parts * 4 * trained if parts > 1 else 0)
    block = 3 * (PROJECTIONS + SCORED + 2 * FED + SUMS) + again
    logits = V * (4 + 4 + 2 + 2 + 2)
    return weights + head + gradients + 8 * 4 * trained + TOKENS / 8 * (2 * (LAYERS * block + END) + logits)


@pytest.mark.parametrize(
    ("remat", "closed_form"),
    [
        ("none", pair()),
        ("dots", pair()),
        ("feed_forward", pair(3, 2, PROJECTIONS)),
        ("kernels", pair(3, 3, PROJECTIONS + 2 * FED)),
        ("full", pair(3, 3, PROJECTIONS + 2 * FED + SCORED)),
    ],
)
def test_memory_traffic_of_copies_has_a_closed_form(remat, closed_form):
    assert moved(compute__remat=remat) == closed_form


def test_each_part_reads_weights_and_adds_to_the_gradient():
    assert moved(data__accumulate=2) == pair(parts=2)


@pytest.mark.parametrize(("platform", "piece"), [("cpu", 128), ("gpu", 512), ("tpu", 512)])
def test_longer_rows_read_the_head_for_each_piece(platform, piece):
    """From half a piece to a whole only what tokens move doubles; to twice that there is a second piece as well."""
    lengths = (piece // 2, piece, 2 * piece)
    short, one_piece, two_pieces = (moved(platform=platform, data__sequence_length=length) for length in lengths)
    assert two_pieces - one_piece == 2 * (one_piece - short) + 2 * 2 * D * V


def test_split_weights_are_gathered_before_each_use():
    """What lies over fsdp is written by a gather, then read; whole rows, biases and norms of heads are just read."""
    whole = LAYERS * (2 * (D + 1) + D + N)
    split = LAYERS * (ATTENTION + 2 * EXPERT) - whole
    trained, own = LAYERS * EXPERT, (LAYERS * (EXPERT - D - 1)) / 8 + LAYERS * (D + 1)
    gathered = 2 * 2 * split + 2 * (2 * D * V + D)  # of head, embedding and last norm once; these it need not read
    assert moved(mesh={"fsdp": 8}) - moved() == gathered - 8 * 4 * (trained - own)


def test_a_mesh_over_tensor_splits_hidden_units_heads_and_vocabulary():
    half = moved(mesh={"fsdp": 4, "tensor": 2})
    norms_and_rows = 2 * 2 * LAYERS * (4 * D)
    assert moved(mesh={"fsdp": 8}) < half < 2 * moved(mesh={"fsdp": 8}) + norms_and_rows


def test_stacked_experts_move_rows_to_the_chosen_ones_alone():
    values = {"compute__remat": "kernels", "data__batch_size": 64}
    four = moved("stacked", **values)
    mixed = 3 * 2 * (FED + 4 * D)  # top 2, whose rows are copied; kept, so that nothing of them is computed again
    block = 3 * (PROJECTIONS + SCORED + SUMS) + mixed + PROJECTIONS
    logits = V * (4 + 4 + 2 + 2 + 2)
    weights = 2 * LAYERS * (3 * ATTENTION + 2 * 4 * EXPERT) + 2 * 2 * D * V
    leaves = LAYERS * (ATTENTION + 4 * EXPERT) + 2 * D * V + D
    gradients = 2 * 2 * leaves + 2 * 4 * D * V  # that of the head is added up in float32
    tokens = 64 * 32 / 8
    assert four == weights + gradients + 8 * 4 * leaves + tokens * (2 * (LAYERS * block + END) + logits)


def test_tied_embeddings_have_one_matrix():
    values = {"model.tied_embeddings": True, "compute.dtype": "bfloat16"}
    config = planned.config("stacked", None, values)
    tied = hbm_bytes(config, make_program(config, jax.devices()))
    # The embedding had no use but that rows of it are read: what it took is gradient and optimizer.
    assert moved("stacked") - tied == D * V * (2 * 2 + 8 * 4)


@pytest.mark.parametrize(
    ("layout", "remat", "again"),
    [
        (ANCHOR, "none", set()),
        (ANCHOR, "dots", set()),
        (ANCHOR, "feed_forward", {"projections"}),
        (ANCHOR, "kernels", {"projections", "experts"}),
        (ANCHOR, "full", {"projections", "attention", "experts"}),
        (Layout("stacked", 4, 2), "dots", set()),
        (Layout("stacked", 4, 2), "kernels", {"projections"}),
        # All are chosen: plain matmuls.
        (Layout("stacked", 2, 2), "dots", set()),
        (Layout("stacked", 2, 2), "feed_forward", {"projections"}),
        (Layout("stacked", 2, 2), "kernels", {"projections", "experts"}),
    ],
)
def test_what_is_recomputed_parts_depends_on_policy_and_layout(layout, remat, again):
    assert recomputed_parts(remat, layout) == again


@pytest.mark.parametrize(("length", "near"), [(32, 0.3), (2048, 0.1)])
@pytest.mark.parametrize(("partition", "remat"), [("joint", "dots"), ("router", "full")])
def test_blocks_copy_kernels_and_the_last_of_each_expert_is_in_part_in_vain(length, near, partition, remat):
    """4 experts, top-2, on 4 devices, by half of the hidden units: one expert each, which half of the tokens choose."""
    values = {"compute.dispatch": "blocks", "compute.dtype": "bfloat16", "compute.remat": remat}
    values |= {"data.grad_accum_steps": 2, "data.sequence_length": length, "partition": PARTITIONS[partition]}
    config = planned.config("stacked", {"expert": 4, "tensor": 2}, values)
    parts, matmuls, kernel = 2, 3, D * F / 2
    tokens = 16 * length / parts
    size = min(tokens, block_tokens(tokens / 2, 1))
    # An expert that gets about that many rows: the mean over what it may get, from half to half as much again.
    rows = np.linspace(0.5, 1.5, 10_001) * tokens / 2
    blocks = np.mean(np.ceil(rows / size))
    passes, trained = (2, 1) if partition == "joint" else (3, 0)
    each = parts * LAYERS * matmuls * kernel
    copies = 2 * passes * (3 * blocks - 1) + 4 * 6 * blocks * trained
    idle, copied = block_work(config, make_program(config, jax.devices()))
    assert copied == pytest.approx(each * copies, rel=near)
    computed = each * 2 * (passes + trained) * blocks * size
    needed = each * 2 * (passes + trained) * tokens / 2
    assert needed + idle == pytest.approx(computed, rel=near)
    assert idle > 0


def work_on_hopper(monkeypatch, dispatch, mesh):
    monkeypatch.setattr(sharding, "platform_of", lambda device: "hopper")
    values = {"model.d_model": 128, "model.d_ff": 256, "data.sequence_length": 2048, "compute.dtype": "bfloat16"}
    kernels = {"compute.attention": "reference", "compute.dispatch": dispatch}
    config = planned.config("stacked", mesh, values | kernels)
    return block_work(config, make_program(config, jax.devices()))


def test_tiles_of_hopper_copy_nothing_and_each_expert_but_the_first_begins_in_one(monkeypatch):
    passes, matmuls, row = 2, 3, 2 * 128 * 256
    idle = LAYERS * matmuls * passes * row * 3 * MOSAIC_TILE
    assert work_on_hopper(monkeypatch, "mosaic", {"data": 8}) == (idle, 0)


def test_where_half_of_the_tiles_are_for_no_token_blocks_are_planned(monkeypatch):
    """One expert on each of four devices, and room there for all tokens, of which half choose it."""
    tiles, blocks = (work_on_hopper(monkeypatch, how, {"expert": 4, "data": 2}) for how in ("mosaic", "blocks"))
    assert tiles == blocks


def test_only_blocks_work_in_blocks():
    config = planned.config("stacked", {"data": 8}, {"compute.dispatch": "ragged"})
    assert block_work(config, make_program(config, jax.devices())) == (0, 0)


@pytest.fixture(scope="module")
def planned_step():
    config = planned.config("stacked", {"data": 2, "expert": 4}, {"compute.remat": "full"})
    return config, make_program(config, jax.devices())


def test_time_is_amount_over_rate(planned_step):
    config, program = planned_step
    chip = CHIPS["v5e"]
    along_expert = Collective("all-gather", DCN, 2, (), ("f32",), 1e6, 3, "")
    line = roofline(config, program, chip, (2, 4), [along_expert, along_expert._replace(runs=1)])
    arch, layout = program.model.architecture, program.model.layout
    assert line.flops == train_step_flops(arch, layout, program.trainable, 16, 32) / 8
    assert line.recomputed_flops == recomputed_flops(arch, layout, "full", 16, 32) / 8
    assert line.idle_flops == 0
    assert line.compute_seconds == (line.flops + line.recomputed_flops) / 197e12
    assert line.hbm_bytes == hbm_bytes(config, program)
    assert line.hbm_seconds == line.hbm_bytes / 819e9
    assert line.sent_bytes == 4e6
    assert line.network_seconds == pytest.approx(4e6 / 3.125e9)
    unknown = roofline(config, program, chip, (2, 4), None)
    assert (unknown.sent_bytes, unknown.network_seconds) == (None, None)
    assert unknown[:4] == line[:4]


def test_at_best_all_overlap_and_at_worst_nothing_does():
    line = Roofline(0, 0, 0, 0, 0, 2.0, 3.0, 5.0)
    assert (line.at_best, line.at_worst) == (5.0, 10.0)
    line = line._replace(network_seconds=None)
    assert (line.at_best, line.at_worst) == (3.0, 5.0)


@pytest.mark.parametrize(("group", "links"), [((0, 1, 2, 3), 1), ((0, 4), 1), (tuple(range(8)), 2)])
def test_collectives_take_the_links_of_their_group(group, links):
    devices = [SimpleNamespace(coords=(x, y, 0)) for x in range(2) for y in range(4)]
    program = SimpleNamespace(mesh=SimpleNamespace(devices=np.array(devices, object).reshape(2, 4)))
    one = Collective("all-reduce", ICI, len(group), group, ("f32",), 1e6, 3, "")
    assert network_seconds(one, program, CHIPS["v5e"], (2, 4)) == 3e6 / (links * 45e9)
