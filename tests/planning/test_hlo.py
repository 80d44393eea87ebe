"""A program's text as instructions, and its loops' trips, of texts written out here."""

import pytest

from flexolmo_jax.planning.hlo import called, parse, split, trip_count

TEXT = """HloModule jit_step, is_scheduled=true, num_partitions=4, replica_count=2

%body (carry: (s32[], f32[8,2])) -> (s32[], f32[8,2]) {
  %carry = (s32[], f32[8,2]{1,0:T(8,128)}) parameter(0)
  %counter = s32[] get-tuple-element(%carry), index=0
  %x = f32[8,2]{1,0} get-tuple-element(%carry), index=1
  %step = s32[] constant(STEP)
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
  %start = s32[] constant(START)
  %initial = (s32[], f32[8,2]{1,0}) tuple(%start, %x.1)
  %loop = (s32[], f32[8,2]{1,0}) while(%initial), condition=%condition, body=%body, metadata={op_name="a (b)"}KNOWN
  ROOT %out = f32[8,2]{1,0} get-tuple-element(%loop), index=1
}
"""


def text(start=0, step=1, limit=5, direction="LT", known=""):
    filled = TEXT.replace("DIRECTION", direction).replace("KNOWN", known)
    return filled.replace("START", str(start)).replace("STEP", str(step)).replace("LIMIT", str(limit))


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
        (dict(start=2, limit=11, step=3), 3),
        (dict(start=2, limit=12, step=3), 4),
        (dict(start=7, limit=-1, step=-1, direction="GT"), 8),
        (dict(start=5, limit=5), 0),
        (dict(known=', backend_config={"known_trip_count":{"n":"17"}}'), 17),
    ],
)
def test_trips_follow_from_start_step_and_limit(loop, trips):
    module = parse(text(**loop))
    main = module.computations["main"]
    assert trip_count(module, main, main["loop"]) == trips


@pytest.mark.parametrize("loop", [dict(step=-1), dict(direction="NE"), dict(limit="nan")])
def test_a_loop_that_cannot_be_counted_counts_as_one_trip_with_a_warning(loop, caplog):
    module = parse(text(**loop))
    main = module.computations["main"]
    assert trip_count(module, main, main["loop"]) == 1
    assert "the trip count of loop loop is not known" in caplog.text
