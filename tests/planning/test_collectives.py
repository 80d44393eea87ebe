"""Collectives are counted as closed forms say, in programs compiled here and in HLO as TPUs have it."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from flexolmo_jax.planning.collectives import axes_of, collectives
from flexolmo_jax.planning.hlo import parse

SHAPE = {"data": 2, "tensor": 4}
BLOCK = (16, 8)  # of each device
SIZE = 16 * 8 * 4  # its bytes


def compiled(function, devices=None):
    mesh = jax.make_mesh(tuple(SHAPE.values()), tuple(SHAPE), axis_types=(AxisType.Auto,) * 2, devices=devices)
    everywhere = P(("data", "tensor"))
    mapped = jax.shard_map(function, mesh=mesh, in_specs=everywhere, out_specs=everywhere, check_vma=False)
    x = jax.ShapeDtypeStruct((8 * BLOCK[0], BLOCK[1]), jnp.float32, sharding=NamedSharding(mesh, everywhere))
    return jax.jit(mapped).lower(x).compile().as_text()


def repeat(times, function):
    return lambda x: lax.scan(lambda carry, _: (jnp.sin(function(carry)), None), x, None, length=times)[0]


@pytest.fixture(scope="module")
def program():
    """All kinds, in and out of loops: each kind once."""

    def step(x):
        x = repeat(5, lambda x: lax.all_gather(x, "tensor", tiled=True)[8:24])(x)
        x = repeat(3, repeat(4, lambda x: jnp.tile(lax.psum_scatter(x, "tensor", tiled=True), (4, 1))))(x)
        x = jnp.cos(lax.all_to_all(x, "tensor", 0, 0, tiled=True))
        x = jnp.cos(lax.ppermute(x, "data", [(0, 1), (1, 0)]))
        return repeat(2, lambda x: lax.psum(jnp.cos(x), "data"))(x)

    return {found.kind: found for found in collectives(parse(compiled(step)))}


@pytest.mark.parametrize(
    ("kind", "runs", "sent", "group"),
    [
        ("all-gather", 5, 3 * SIZE, (0, 1, 2, 3)),
        ("reduce-scatter", 3 * 4, SIZE * 3 / 4, (0, 1, 2, 3)),
        ("all-to-all", 1, SIZE * 3 / 4, (0, 1, 2, 3)),
        ("collective-permute", 1, SIZE, (0, 4)),
        ("all-reduce", 2, 2 * SIZE * 1 / 2, (0, 4)),
    ],
)
def test_counts_each_kind_with_its_runs_bytes_and_group(program, kind, runs, sent, group):
    found = program[kind]
    assert (found.runs, found.bytes_sent, found.group) == (runs, sent, group)
    assert len(program) == 5


def test_counts_every_branch_of_a_conditional():
    half, whole = (lambda x: jnp.tile(lax.psum(x[:8], "data"), (2, 1))), (lambda x: lax.psum(jnp.cos(x), "data"))
    text = compiled(repeat(2, lambda x: lax.cond(x[0, 0] > 0, half, whole, x)))
    assert sorted((found.runs, found.bytes_sent) for found in collectives(parse(text))) == [(2, SIZE / 2), (2, SIZE)]


def test_devices_are_numbered_by_their_place_in_the_mesh():
    text = compiled(lambda x: lax.psum(x, "data"), devices=[jax.devices()[i] for i in (7, 2, 5, 0, 1, 4, 3, 6)])
    assert [found.group for found in collectives(parse(text))] == [(0, 4)]


def test_counts_what_the_partitioner_adds():
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    x, w = (
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for shape, spec in [((32, 64), P("data", "tensor")), ((64, 24), P("tensor", None))]
    )
    text = jax.jit(jnp.dot, out_shardings=NamedSharding(mesh, P("data", None))).lower(x, w).compile().as_text()
    (found,) = collectives(parse(text))
    assert (found.kind, found.runs, found.bytes_sent) == ("all-reduce", 1, 2 * 3 / 4 * 16 * 24 * 4)
    assert axes_of(found.group, SHAPE) == ("tensor",)


def test_axes_are_those_along_which_a_group_differs():
    shape = {"data": 2, "fsdp": 1, "expert": 2, "tensor": 2}
    assert axes_of((0, 2), shape) == ("expert",)
    assert axes_of((1, 0, 5, 4), shape) == ("data", "tensor")
    assert axes_of(range(8), shape) == ("data", "expert", "tensor")


# Forms of TPU programs.

ARRAY = "f32[64,8]{1,0:T(8,128)S(1)}"  # 2048 bytes
GROUPS = "replica_groups={{0,1,2,3},{4,5,6,7}}, use_global_device_ids=true"


def module(entry, *computations):
    """A program of 8 devices, with these instructions in its entry and these other computations."""
    others = "".join(f"%{name} (p: f32[]) -> f32[] {{\n{body}}}\n\n" for name, body in computations)
    return f"HloModule jit_step, num_partitions=8\n\n{others}ENTRY %main (p: f32[]) -> f32[] {{\n{entry}}}\n"


def only(text):
    (found,) = collectives(parse(text))
    return found


@pytest.mark.parametrize(
    ("groups", "group"),
    [
        ("{{0,2},{1,3},{4,6},{5,7}}", (0, 2)),
        ("{}", (0, 1, 2, 3, 4, 5, 6, 7)),
        ("[2,4]<=[8]", (0, 1, 2, 3)),
        ("[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("[4,2]<=[2,2,2]T(0,2,1)", (0, 2)),
        ("mesh['axis_0'=4,'axis_1'=1,'axis_2'=2] {'axis_0'}", (0, 2, 4, 6)),
        ("mesh['axis_0'=2,'axis_1'=2,'axis_2'=2] {'axis_0','axis_2'}", (0, 1, 4, 5)),
        ("mesh['axis_0'=2,'axis_1'=4], device_ids=([4,2]T(1,0)) {'axis_1'}", (0, 2, 4, 6)),
    ],
)
def test_reads_groups_in_the_syntaxes_of_the_compilers(groups, group):
    text = f"  ROOT %a = {ARRAY} all-gather(%p), channel_id=1, replica_groups={groups}, dimensions={{0}}, "
    found = only(module(text + "use_global_device_ids=true\n"))
    n = len(group)
    assert (found.group, found.bytes_sent) == (group, 2048 * (n - 1) / n)


@pytest.mark.parametrize(
    ("instruction", "kind", "sent"),
    [
        (f"({ARRAY}, f32[256,8]{{1,0}}) all-gather-start(%p), {GROUPS}", "all-gather", 8192 * 3 / 4),
        (f"{ARRAY} all-reduce-start(%p), {GROUPS}", "all-reduce", 2 * 2048 * 3 / 4),
        (f"(({ARRAY}), {ARRAY}) all-reduce-start(%p), {GROUPS}", "all-reduce", 2 * 2048 * 3 / 4),
        (f"(({ARRAY}), bf16[16,8]{{1,0}}, u32[]{{:S(2)}}) reduce-scatter-start(%p), {GROUPS}", "reduce-scatter", 768),
        (f"(s32[4]{{0}}, pred[8]{{0}}, s4[3]{{0}}) all-reduce(%a, %b, %c), {GROUPS}", "all-reduce", 2 * 26 * 3 / 4),
    ],
)
def test_reads_asynchronous_forms_and_tuples(instruction, kind, sent):
    text = f"  %p = {ARRAY} parameter(0)\n  %s = {instruction}\n  ROOT %d = f32[] {kind}-done(%s)\n"
    found = only(module(text))
    assert (found.kind, found.bytes_sent, found.group) == (kind, sent, (0, 1, 2, 3))


def test_a_permutation_groups_the_devices_among_which_it_moves():
    pairs = "source_target_pairs={{1,1},{0,2},{2,4},{5,7}}"
    text = f"  ROOT %s = ({ARRAY}, {ARRAY}, u32[]{{:S(2)}}) collective-permute-start(%p), channel_id=2, {pairs}\n"
    found = only(module(text))
    assert (found.kind, found.bytes_sent, found.group) == ("collective-permute", 2048, (0, 2, 4))


@pytest.mark.parametrize(
    "call",
    [
        "fusion(%p), kind=kCustom, calls=%inner",
        "async-start(%p), calls=%inner",
        'call-start(%p), async_execution_thread="sparsecore", to_apply=%inner',
        'custom-call(%p), custom_call_target="x", called_computations={%inner}',
    ],
)
def test_finds_collectives_in_computations_that_are_called(call):
    inner = f"  %q = {ARRAY} parameter(0)\n  ROOT %r = {ARRAY} all-reduce(%q), {GROUPS}, to_apply=%add\n"
    add = "  ROOT %sum = f32[] add(%a, %b)\n"
    entry = f"  %f = {ARRAY} {call}\n  ROOT %d = {ARRAY} async-done(%f), calls=%inner\n"
    assert only(module(entry, ("add", add), ("inner", inner))).kind == "all-reduce"


def test_a_sum_of_which_a_slice_is_kept_is_a_reduce_scatter():
    inner = f"  %r = {ARRAY} all-reduce(%q), {GROUPS}, to_apply=%add\n  ROOT %s = f32[16,8] dynamic-slice(%r, %i)\n"
    call = "  ROOT %f = f32[16,8] fusion(%p), kind=kCustom, calls=%all-reduce-scatter.2.clone\n"
    add = "  ROOT %sum = f32[] add(%a, %b)\n"
    found = only(module(call, ("add", add), ("all-reduce-scatter.2.clone", inner)))
    assert (found.kind, found.bytes_sent) == ("reduce-scatter", 2048 * 3 / 4)


def loop(limit, call):
    """Computations of a loop that does this call, and the instructions that run it."""
    condition = (
        f"  %limit = s32[] {limit}\n  %state = (s32[], f32[]) parameter(0)\n"
        "  %i = s32[]{:T(128)} get-tuple-element(%state), index=1\n"
        "  ROOT %test = pred[] compare(%i, %limit), direction=LT\n"
    )
    body = (
        "  %state = (f32[], s32[]) parameter(0)\n  %i = s32[] get-tuple-element(%state), index=1\n"
        f"  %x = f32[] get-tuple-element(%state), index=0\n  %y = {call}\n"
        "  ROOT %result = (f32[], /*index=1*/s32[]) tuple(%x, %i)\n"
    )
    entry = (
        "  %initial = (f32[], s32[]) tuple(%p, %p)\n"
        "  ROOT %loop = (f32[], s32[]) while(%initial), condition=%condition, body=%body\n"
    )
    return entry, ("condition", condition), ("body", body)


def test_a_loop_multiplies_the_runs_of_its_collectives():
    call = f"{ARRAY} all-reduce(%x), {GROUPS}, to_apply=%add"
    text = module(*loop("constant(3)", call), ("add", "  ROOT %s = f32[] add(%a, %b)\n"))
    assert only(text).runs == 3


def test_an_unknown_trip_count_counts_once_and_warns(caplog):
    call = f"{ARRAY} all-gather(%x), {GROUPS}"
    assert only(module(*loop("parameter(1)", call))).runs == 1
    assert "trip count of loop loop is not known" in caplog.text


def test_a_collective_spread_over_fusions_counts_once():
    """Its start, a part within a loop and its end each contain it."""
    gather = f'  %g = {ARRAY} all-gather(%q), channel_id=3, {GROUPS}, frontend_attributes={{chain_id="0"}}\n'
    start = gather + '  ROOT %c = (f32[]) custom-call(%g), custom_call_target="AsyncCollectiveStart"\n'
    middle = gather + "  ROOT %t = (f32[]) tuple(%g)\n"
    end = gather + '  ROOT %c = f32[] custom-call(%g), custom_call_target="AsyncCollectiveDone"\n'
    entry, *computations = loop("constant(2)", "f32[] fusion(%x), kind=kOutput, calls=%middle")
    entry = "  %s = (f32[]) fusion(%p), kind=kCustom, calls=%start\n" + entry.replace("ROOT ", "")
    entry += "  ROOT %e = f32[] fusion(%s), kind=kCustom, calls=%end\n"
    found = only(module(entry, *computations, ("start", start), ("middle", middle), ("end", end)))
    assert (found.runs, found.bytes_sent) == (1, 2048 * 3 / 4)


def test_attributes_may_take_several_lines():
    kernel = (
        '  %k = f32[] custom-call(%p), custom_call_target="tpu_custom_call", frontend_attributes={metadata={\n'
        '"block": 512\n}}, metadata={op_name="kernel"}\n'
    )
    assert only(module(f"{kernel}  ROOT %g = {ARRAY} all-gather(%p), {GROUPS}\n")).kind == "all-gather"
