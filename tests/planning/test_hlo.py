"""Instructions, trips of loops and bytes of programs: of texts written out here, and of programs compiled here."""

import jax
import jax.numpy as jnp
import pytest

from flexolmo_jax.planning.hlo import array_bytes, called, elements, hbm_bytes, parse, split, trip_count

TEXT = """HloModule jit_step, is_scheduled=true, num_partitions=4, replica_count=2

%body (carry: (s32[], f32[8,2])) -> (s32[], f32[8,2]) {
  %carry = (s32[], f32[8,2]{1,0:T(8,128)}) parameter(0)
  %counter = s32[] get-tuple-element(%carry), index=0
  %x = f32[8,2]{1,0} get-tuple-element(%carry), index=1
  %step = s32[] constant(1)
  %same = s32[] copy(%step)
  %next = s32[] add(%counter, %same)
  ROOT %result = (s32[], f32[8,2]{1,0:T(8,128)}) tuple(%next, %x)
}

%condition (carry.1: (s32[], f32[8,2])) -> pred[] {
  %carry.1 = (s32[], f32[8,2]{1,0}) parameter(0)
  %counter.1 = s32[] get-tuple-element(%carry.1), index=0
  %limit = s32[] constant(LIMIT)
  ROOT %test = pred[] compare(%counter.1, %limit), direction=DIRECTION
}

ENTRY %main (x.1: f32[8,2]) -> f32[8,2] {
  %x.1 = f32[8,2]{1,0} parameter(0)
  %start = s32[] constant(0)
  %initial = (s32[], f32[8,2]{1,0}) tuple(%start, %x.1)
  %loop = (s32[], f32[8,2]{1,0}) while(%initial), condition=%condition, body=%body, metadata={op_name="a (b)"}KNOWN
  ROOT %out = f32[8,2]{1,0} get-tuple-element(%loop), index=1
}
"""


def text(limit=5, direction="LT", known=""):
    return TEXT.replace("DIRECTION", direction).replace("KNOWN", known).replace("LIMIT", str(limit))


def test_reads_computations_line_by_line():
    module = parse(text())
    assert (module.entry, module.devices) == ("main", 8)
    assert {name: list(each) for name, each in module.computations.items()} == {
        "body": ["carry", "counter", "x", "step", "same", "next", "result"],
        "condition": ["carry.1", "counter.1", "limit", "test"],
        "main": ["x.1", "start", "initial", "loop", "out"],
    }
    result, loop = module.computations["body"]["result"], module.computations["main"]["loop"]
    assert (result.opcode, result.operands, result.is_root) == ("tuple", ["next", "x"], True)
    assert result.shape == "(s32[], f32[8,2]{1,0:T(8,128)})"
    assert (loop.opcode, loop.operands, loop.is_root) == ("while", ["initial"], False)
    assert loop.attributes.endswith('metadata={op_name="a (b)"}')
    assert (called(loop, "body"), called(loop, "condition"), called(loop, "calls")) == (["body"], ["condition"], [])
    assert module.computations["body"]["step"].operands == ["1"]


def test_splits_outside_of_brackets_alone():
    assert split("(a, {b, c}), [d, e], f", ",") == ("(a, {b, c})", " [d, e], f")
    assert split("(a, b)", ",") == ("(a, b)", "")


@pytest.mark.parametrize(
    ("loop", "trips"),
    [
        (dict(limit=5), 5),
        (dict(limit=0), 0),
        (dict(known=', backend_config={"known_trip_count":{"n":"17"}}'), 17),
    ],
)
def test_trips_are_the_limit_of_a_loop_that_counts_from_0(loop, trips):
    module = parse(text(**loop))
    main = module.computations["main"]
    assert trip_count(module, main["loop"]) == trips


@pytest.mark.parametrize("loop", [dict(direction="NE"), dict(direction="GT"), dict(limit="nan")])
def test_trips_of_other_loops_are_not_known(loop):
    module = parse(text(**loop))
    main = module.computations["main"]
    assert trip_count(module, main["loop"]) is None


def test_elements_and_bytes_of_shapes():
    shape = "((f32[2,3]{1,0}), bf16[4]{0:T(128)S(1)}, pred[5])"
    assert elements(shape) == ["(f32[2,3]{1,0})", "bf16[4]{0:T(128)S(1)}", "pred[5]"]
    assert elements("s4[3]{0}") == ["s4[3]{0}"]
    assert array_bytes(shape) == 24 + 8 + 5
    assert array_bytes(shape, hbm_only=True) == 24 + 5
    assert array_bytes("s4[3]{0}") == 2


# Bytes: of programs that are compiled here, against sums over the arrays that they must read and write.


def moved(function, *shapes):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return hbm_bytes(parse(jax.jit(function).lower(*arguments).compile().as_text()))


def test_a_matmul_reads_its_operands_and_writes_its_result():
    m, k, n = 64, 128, 256
    assert moved(jnp.dot, (m, k), (k, n)) == 4 * (m * k + k * n + m * n)


def test_elementwise_operations_move_no_more_than_their_fusion():
    assert moved(lambda x, y: jnp.sin(x) * jnp.cos(y) + 1, (1000,), (1000,)) == 4 * 3 * 1000


def test_a_loop_over_stacked_kernels_reads_each_once():
    """Of the stack each trip takes its kernel; x and the result are read and written in each."""
    layers, n = 6, 256
    loop = lambda x, kernels: jax.lax.scan(lambda x, kernel: (jnp.dot(x, kernel), None), x, kernels)[0]  # noqa: E731
    least = 4 * layers * (n * n + 2 * n)
    assert least <= moved(loop, (n,), (layers, n, n)) < 3.1 * least  # a backend may copy a kernel out of the stack


def test_a_loop_that_fills_an_array_writes_each_part_once():
    """Results are put in their places of one array, which a loop does not copy."""
    layers, n = 64, 1024
    loop = lambda x: jax.lax.scan(lambda x, _: (jnp.sin(x), jnp.cos(x)), x, None, length=layers)[1]  # noqa: E731
    least = 4 * layers * 3 * n  # x read and written, and the result
    assert least <= moved(loop, (n,)) < 3 * least


TPU = """HloModule jit_step

%fused (p0: f32[4,64], p1: s32[], p2: f32[4,64]) -> (f32[64], f32[4,64]) {
  %p0 = f32[4,64]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %p2 = f32[4,64]{1,0} parameter(2)
  %zero = s32[] constant(0)
  %slice = f32[1,64]{1,0} dynamic-slice(%p0, %p1, %zero), dynamic_slice_sizes={1,64}
  %flat = f32[64]{0} bitcast(%slice)
  %updated = f32[4,64]{1,0} dynamic-update-slice(%p2, %slice, %p1, %zero)
  ROOT %both = (f32[64]{0}, f32[4,64]{1,0}) tuple(%flat, %updated)
}

ENTRY %main (x: f32[4,64], i: s32[]) -> (f32[64], f32[4,64]) {
  %x = f32[4,64]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %near = (f32[4,64]{1,0:S(1)}, f32[4,64]{1,0}, u32[]{:S(2)}) copy-start(%x)
  %vmem = f32[4,64]{1,0:S(1)} copy-done(%near)
  %part = ((f32[4,64]{1,0}), f32[1,64]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%x), slice={[0:1], [0:64]}
  ROOT %both = (f32[64]{0}, f32[4,64]{1,0}) fusion(%x, %i, %x), kind=kLoop, calls=%fused
}
"""


def test_slices_updates_and_copies_to_vmem_move_what_is_in_hbm():
    whole, part, index = 4 * 4 * 64, 4 * 64, 4
    copied, sliced = whole, part  # read from HBM, written to VMEM
    fused = part + index + part + part  # the slice and the index read, the slice and the update written
    assert hbm_bytes(parse(TPU)) == copied + sliced + fused
