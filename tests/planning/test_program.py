"""Programs of abstract arrays, compiled for the emulated devices; their sizes against those of real arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexolmo_jax.errors import UserError
from flexolmo_jax.model.architecture import PAIR
from flexolmo_jax.planning import program as programs
from flexolmo_jax.planning.memory import Memory, device_bytes, kept_bytes, memory
from flexolmo_jax.planning.program import TooLargeError, compile_program
from flexolmo_jax.training.run import make_program
from tests.support import planned, small

MESHES = {"pair": {"data": 2, "fsdp": 2, "tensor": 2}, "stacked": {"fsdp": 2, "expert": 4}}


@pytest.fixture(scope="module", params=MESHES)
def program(request):
    kind = request.param
    return make_program(planned.config(kind, MESHES[kind], {"compute.frozen_dtype": "bfloat16"}), jax.devices())


def test_has_the_layout_and_the_partition_of_the_configuration(program):
    layout = program.model.layout
    assert layout == planned.LAYOUTS[layout.kind]
    assert set(program.state.trainable) == program.trainable
    assert set(program.state.trainable) | set(program.frozen) == set(program.model.abstract())
    assert program.state.trainable.keys().isdisjoint(program.frozen)
    assert {leaf.dtype for leaf in program.frozen.values()} <= {jnp.dtype(jnp.bfloat16)}
    assert {name: leaf.shape for name, leaf in program.batch.items()} == dict.fromkeys(
        ("tokens", "targets", "segment_ids", "positions"), (16, 32)
    )


def test_sizes_are_those_of_real_arrays_on_a_device(program):
    for part in (program.state.trainable, program.state.optimizer, program.frozen, program.batch):
        real = jax.tree.map(lambda leaf: jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding), part)
        shards = [leaf.addressable_shards[3].data.nbytes for leaf in jax.tree.leaves(real)]
        assert device_bytes(part) == sum(shards)


def test_compiles_to_a_step_that_takes_and_gives_back_the_state(program):
    compiled = compile_program(program)
    (state, frozen, batch), _ = compiled.in_avals
    assert jax.tree.map(lambda leaf: leaf.shape, state) == jax.tree.map(lambda leaf: leaf.shape, program.state)
    assert frozen.keys() == program.frozen.keys()
    assert batch.keys() == program.batch.keys()
    new_state, metrics = jax.tree.map(lambda leaf: leaf.shape, compiled.out_info)
    assert new_state == jax.tree.map(lambda leaf: leaf.shape, program.state)
    assert metrics["loss"] == ()
    taken = compiled.memory_analysis().argument_size_in_bytes
    parts = (program.state.trainable, program.state.optimizer, program.frozen, program.batch)
    assert taken == pytest.approx(sum(map(device_bytes, parts)), abs=64)  # the step's number, and alignment


def test_a_model_directory_gives_architecture_and_layout(tmp_path):
    config = planned.config("pair", None, {"start_from": str(small.anchor(tmp_path / "anchor")), "expert": "news"})
    program = make_program(config, jax.devices())
    assert program.model.architecture == small.ARCHITECTURE
    assert program.model.layout is PAIR


@pytest.mark.parametrize(
    ("mesh", "values", "words"),
    [
        ({"data": 8}, {"data.batch_size": 12}, "--config.data.batch_size=12: its parts of 12 rows do not divide"),
        ({"data": 8}, {"data.grad_accum_steps": 4}, "its parts of 4 rows do not divide over the 8 devices"),
        ({"data": 3}, {}, "config.mesh: data=3, fsdp=1, expert=1, tensor=1 does not fit 8 devices"),
        ({"tensor": 8}, {}, "config.mesh: dimension"),  # two heads of keys do not divide by 8
        ({"data": 8}, {"compute.remat": "some"}, "--config.compute.remat=some: must be one of none, dots"),
    ],
)
def test_refuses_what_does_not_fit_the_devices(mesh, values, words):
    with pytest.raises(UserError) as error:
        make_program(planned.config("pair", mesh, values), jax.devices())
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("message", "needed", "temporaries"),
    [
        ("Ran out of memory in memory space hbm. Used 27.40G of 15.75G hbm.\nMore", 27.4, 0),
        ("total memory required for HLO temporaries (104.85G) exceeds available HBM (95.74G)", 104.85, 1),
        ("Used 512.5M of 15.75G hbm", 512.5 / 1024, 0),
        ("Used 1.25T of 15.75G hbm", 1280, 0),
    ],
)
def test_reads_how_much_is_missing(program, monkeypatch, message, needed, temporaries):
    def fail(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: " + message)

    monkeypatch.setattr(programs, "compile_step", fail)
    with pytest.raises(TooLargeError) as error:
        compile_program(program)
    assert error.value.needed == int(needed * 2**30)
    assert error.value.temporaries == temporaries


def test_other_errors_of_the_compiler_pass(program, monkeypatch):
    def fail(*_):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    monkeypatch.setattr(programs, "compile_step", fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        compile_program(program)


def test_memory_divides_the_peak(program):
    parts = [program.state.trainable, program.frozen, program.state.optimizer, program.batch]
    held = [device_bytes(part) for part in parts]
    assert memory(program, sum(held) + 1000, 5 * 10**6) == Memory(*held, 1000, sum(held) + 1000, 5 * 10**6)
    assert memory(program, 0, 1).temporaries == 0
    assert memory(program, 10, 10).fits
    assert not memory(program, 11, 10).fits


def test_memory_has_closed_forms():
    config = planned.config("pair", {"fsdp": 4, "tensor": 2}, {"compute.frozen_dtype": "bfloat16"})
    held = memory(make_program(config, jax.devices()), 0, 1)
    layers, width, hidden, vocabulary = 2, 32, 24, 64
    kernels = 3 * layers * width * hidden / 8  # split over both
    rows_and_biases = layers * width + layers  # whole
    assert held.trained == 4 * (kernels + rows_and_biases)
    assert held.optimizer == 2 * held.trained + 2 * 4  # two moments, and the steps that Adam and the schedule count
    # query and out are width x width, key and value half of it; norms: two of a block, that of queries, half for keys
    attention = layers * 3 * width * width / 8
    norms = layers * (2 * width / 4 + width / 2 + width / 4) + width / 4
    shared = attention + norms + 2 * vocabulary * width / 8
    # What an expert ships is float32 though frozen; of the pair all of the expert is trained, and the anchor is not.
    assert held.frozen == 2 * (shared + kernels + rows_and_biases)
    assert held.batch == 4 * 4 * 16 * 32 / 4


def test_what_is_kept_has_a_closed_form():
    """2 layers of d_model 32, 4 heads and 2 of keys and values, 24 hidden units; float32; 16 rows of 32 tokens."""
    pair = planned.config("pair", {"data": 4, "tensor": 2}, {"data.grad_accum_steps": 2})
    full, kernels = 32, 32 + 16
    feed_forward = kernels + 2 * (2 * 12 + 32)
    dots = feed_forward + 16 + 2 * 8 + 32
    none = dots + 6 * 32 + 2 * 12
    each = 2 * 32 * 4  # tokens of a part on a device, bytes
    assert kept_bytes(pair, make_program(pair, jax.devices())) == {
        "full": each * (2 * full + none),  # layers, and the one at work
        "kernels": each * (2 * kernels + none),
        "feed_forward": each * (2 * feed_forward + none),
        "dots": each * (2 * dots + none),
        "none": each * (2 * none + none),
    }
    # Four devices share the experts, one each: there may be a row for every token of all four.
    stacked = planned.config("stacked", {"data": 2, "expert": 4})
    kept = kept_bytes(stacked, make_program(stacked, jax.devices()))
    assert kept["kernels"] == kept["feed_forward"]
    each = 2 * 32 * 2 * 4  # and layers
    assert kept["kernels"] - kept["full"] == each * (32 + 4 * (2 * 24 + 2 * 32))
    assert kept["dots"] - kept["kernels"] == each * (32 + 2 * 16 + 32)
