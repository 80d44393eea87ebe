"""Steps of abstract arrays, compiled for the emulated devices; their sizes against those of real arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexolmo_jax.errors import UserError
from flexolmo_jax.model.architecture import PAIR
from flexolmo_jax.planning import compilation
from flexolmo_jax.planning.compilation import Memory, bytes_needed, compile_program, device_bytes
from flexolmo_jax.training.run import make_program
from tests.support import planned, small

MESHES = {"pair": {"data": 2, "fsdp": 2, "tensor": 2}, "stacked": {"fsdp": 2, "expert": 4}}


@pytest.fixture(scope="module", params=MESHES)
def step(request):
    kind = request.param
    return make_program(planned.config(kind, MESHES[kind], {"compute.frozen_dtype": "bfloat16"}), jax.devices())


def arguments(step):
    return step.state.trainable, step.frozen, step.state.optimizer, step.batch


def test_a_step_has_the_layout_and_the_partition_of_the_configuration(step):
    layout = step.model.layout
    assert layout == planned.LAYOUTS[layout.kind]
    assert set(step.state.trainable) | set(step.frozen) == set(step.model.abstract())
    assert step.state.trainable.keys().isdisjoint(step.frozen)
    assert {leaf.dtype for leaf in step.frozen.values()} <= {jnp.dtype(jnp.bfloat16)}
    assert {name: leaf.shape for name, leaf in step.batch.items()} == dict.fromkeys(
        ("tokens", "targets", "segment_ids", "positions"), (16, 32)
    )


def test_sizes_are_those_of_real_arrays_on_a_device(step):
    for arrays in arguments(step):
        real = jax.tree.map(lambda leaf: jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding), arrays)
        shards = [leaf.addressable_shards[3].data.nbytes for leaf in jax.tree.leaves(real)]
        assert device_bytes(arrays) == sum(shards)


def test_a_step_compiles_and_its_memory_is_what_xla_counts():
    step = make_program(planned.config("stacked", MESHES["stacked"]), jax.devices())
    compiled, memory = compile_program(step, 10**9)
    new_state, metrics = jax.tree.map(lambda leaf: leaf.shape, compiled.out_info)
    assert new_state == jax.tree.map(lambda leaf: leaf.shape, step.state)
    assert metrics["loss"] == ()
    analysis = compiled.memory_analysis()
    held = memory.state + memory.batch
    assert held == sum(map(device_bytes, arguments(step)))
    # The step's number, and alignment.
    assert analysis.argument_size_in_bytes == pytest.approx(held, abs=64)
    assert memory.peak == analysis.peak_memory_in_bytes == held + memory.temporaries
    assert memory.fits
    assert not memory._replace(available=memory.peak - 1).fits


def test_a_model_directory_gives_architecture_and_layout(tmp_path):
    config = planned.config("pair", None, {"start_from": str(small.anchor(tmp_path / "anchor")), "expert": "news"})
    step = make_program(config, jax.devices())
    assert step.model.architecture == small.ARCHITECTURE
    assert step.model.layout is PAIR


@pytest.mark.parametrize(
    ("mesh", "values", "words"),
    [
        ({"data": 8}, {"data.batch_size": 12}, "config.data.batch_size=12: its "),
        ({"data": 8}, {"data.grad_accum_steps": 4}, " do not divide over the 8 devices"),
        ({"data": 3}, {}, "config.mesh: data=3, fsdp=1, expert=1, tensor=1 does not fit 8 devices"),
        ({"tensor": 8}, {}, "config.mesh: dimension"),  # two heads of keys do not divide by 8
        ({"data": 8}, {"compute.remat": "some"}, "config.compute.remat=some: must be one of none, dots"),
    ],
)
def test_configurations_that_do_not_fit_the_devices_are_refused(mesh, values, words):
    with pytest.raises(UserError) as error:
        make_program(planned.config("pair", mesh, values), jax.devices())
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("message", "needed"),
    [
        ("Ran out of memory in memory space hbm. Used 27.40G of 15.75G hbm.\nMore", int(27.4 * 2**30)),
        ("total memory required for HLO temporaries (2.5K) exceeds available HBM (95.74G)", 2560 + 1000),
        ("Used 512.5M of 15.75G hbm", int(512.5 * 2**20)),
        ("Used 1.25T of 15.75G hbm", int(1.25 * 2**40)),
        ("something else", None),
    ],
)
def test_xla_says_how_much_memory_is_needed(message, needed):
    assert bytes_needed(message, arguments=1000) == needed


def test_a_step_that_does_not_fit_has_no_program(step, monkeypatch):
    def fail(*_):
        raise jax.errors.JaxRuntimeError(message)

    monkeypatch.setattr(compilation, "compile_step", fail)
    message = "RESOURCE_EXHAUSTED: Used 2.00G of 1.00G hbm"
    compiled, memory = compile_program(step, 2**30)
    assert compiled is None
    assert (memory.peak, memory.fits) == (2**31, False)
    message = "INTERNAL: something else"
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        compile_program(step, 2**30)


def test_memory_has_closed_forms():
    config = planned.config("pair", {"fsdp": 4, "tensor": 2}, {"compute.frozen_dtype": "bfloat16"})
    held = Memory(*map(device_bytes, arguments(make_program(config, jax.devices()))), 0, 0, 0)
    layers, width, hidden, vocabulary = 2, 32, 24, 64
    kernels = 3 * layers * width * hidden / 8  # split over both
    router = layers * width + layers  # whole
    assert held.trained == 4 * (kernels + router)
    assert held.optimizer == 2 * held.trained + 2 * 4  # two moments, and the steps that Adam and the schedule count
    # query and out are width x width, key and value half of it; norms: two of a block, that of queries, half for keys
    attention = layers * 3 * width * width / 8
    norms = layers * (2 * width / 4 + width / 2 + width / 4) + width / 4
    shared = attention + norms + 2 * vocabulary * width / 8
    # What an expert ships is float32 though frozen; of the pair all of the expert is trained, and the anchor is not.
    assert held.frozen == 2 * (shared + kernels + router)
    assert held.batch == 4 * 4 * 16 * 32 / 4
