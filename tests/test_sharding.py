"""The mesh and the rules; and that training is the same on one device and on eight."""

import dataclasses
import itertools
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from configs import base
from flexolmo_jax import sharding
from flexolmo_jax.errors import UserError
from flexolmo_jax.model.decoder import Compute, Decoder
from flexolmo_jax.training.optimizer import make_optimizer, make_schedule
from flexolmo_jax.training.state import abstract_leaves, abstract_state, split, trainable_paths
from flexolmo_jax.training.step import LossWeights, initial_state, make_train_step
from tests.support.tiny import ARCHITECTURE, COMPILE_FAST, LAYOUTS, assert_trees_close, random_batch, random_leaves

RULES = base.SHARDING_RULES
ONE = dict.fromkeys(sharding.MESH_AXES, 1)
PARTITIONS = {
    "anchor": (("blocks/moe/anchor/router/.*", "frozen"), (".*", "trainable")),
    "pair": (("blocks/moe/expert/.*", "trainable"), (".*", "frozen")),
    "stacked": ((".*", "trainable"),),
    "router": (("blocks/moe/experts/router/.*", "trainable"), (".*", "frozen")),
}
BATCH = random_batch(2 * [[16], [3], [2, 9], [1], [5, 5], [1], [8, 8], [16]], 16)


def abstract(**shapes):
    return {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes.items()}


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ({"data": -1}, (8, 1, 1, 1)),
        ({"fsdp": -1, "tensor": 2}, (1, 4, 1, 2)),
        ({"data": 2, "fsdp": 2, "expert": 2}, (2, 2, 2, 1)),
        ({"data": 8, "tensor": -1}, (8, 1, 1, 1)),
    ],
)
def test_a_mesh_has_the_sizes_asked_for_and_fills_the_free_one(sizes, shape):
    mesh = sharding.make_mesh({**ONE, **sizes})
    assert mesh.axis_names == sharding.MESH_AXES
    assert mesh.devices.shape == shape
    assert set(mesh.axis_types) == {AxisType.Auto}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 4}, "does not fit 8 devices"),
        ({"data": 16}, "does not fit 8 devices"),
        ({"data": -1, "tensor": 3}, "does not fit 8 devices"),
        ({"data": -1, "fsdp": -1}, "at most one of them -1"),
        ({"data": 0}, "must be positive"),
        ({"data": -2}, "must be positive"),
    ],
)
def test_sizes_that_do_not_fit_the_devices_are_refused(sizes, message):
    with pytest.raises(UserError, match=message) as error:
        sharding.make_mesh({**ONE, **sizes})
    assert str(error.value).startswith("config.mesh: data=")


def test_rules_translate_logical_axes():
    rules = (("batch", ("data", "fsdp")), ("embed", "fsdp"), ("length", None))
    assert sharding.partition_spec(("batch", "length", None), rules) == PartitionSpec(("data", "fsdp"), None, None)
    assert sharding.partition_spec((None, "embed"), rules) == PartitionSpec(None, ("fsdp",))


def test_a_rule_to_no_axis_of_the_mesh_is_refused():
    with pytest.raises(UserError, match="'model' is no axis of the mesh; use data, fsdp, expert, tensor"):
        sharding.partition_spec(("mlp",), (("mlp", "model"),))


def test_an_axis_without_a_rule_and_rules_that_collide_are_refused():
    with pytest.raises(UserError, match="no rule for logical axis 'colour'"):
        sharding.partition_spec(("batch", "colour"), RULES)
    with pytest.raises(UserError, match=r"\('batch', 'embed'\) of one array use mesh axis 'expert' twice"):
        sharding.partition_spec(("batch", "embed"), RULES)


def test_a_dimension_that_does_not_divide_is_refused():
    mesh = sharding.make_mesh({**ONE, "fsdp": 4, "tensor": 2})
    axes = {"head": ("embed", "vocab")}
    shardings_of = sharding.leaf_shardings(abstract(head=(8, 6)), axes, mesh, RULES)
    assert shardings_of["head"].shard_shape((8, 6)) == (2, 3)
    with pytest.raises(UserError, match=r"dimension 6 of head does not divide over the 4 devices .*'fsdp'"):
        sharding.leaf_shardings(abstract(head=(6, 8)), axes, mesh, RULES)
    with pytest.raises(UserError, match=r"dimension 7 of head does not divide over the 2 devices .*'tensor'"):
        sharding.leaf_shardings(abstract(head=(8, 7)), axes, mesh, RULES)


def test_constraints_hold_on_a_mesh_and_are_nothing_without_one_or_without_rules():
    x = jnp.zeros((8, 2))

    def constrained(rules):
        return jax.jit(lambda x: sharding.constrain(x, ("batch", "length"), rules))(x)

    assert sharding.constrain(x, ("batch", "length"), RULES) is x
    with jax.set_mesh(sharding.make_mesh({**ONE, "data": 8})):
        assert sharding.constrain(x, ("batch", "length"), ()) is x
        assert constrained(RULES).sharding.shard_shape(x.shape) == (1, 2)


def train(kind, sizes, grad_accum_steps):
    """Losses of three steps and the leaves after them, on the devices that the sizes ask for."""
    config = base.get_config()
    config.optimizer.learning_rate = 1e-2
    config.optimizer.weight_decay = 0.1
    layout = LAYOUTS["stacked" if kind == "router" else kind]
    model = Decoder(ARCHITECTURE, layout, Compute(rules=config.sharding_rules))
    paths = trainable_paths(model.abstract(), PARTITIONS[kind])
    sizes = {**ONE, **sizes}
    mesh = sharding.make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])
    shardings = sharding.leaf_shardings(model.abstract(), model.logical_axes(), mesh, config.sharding_rules)
    abstract = abstract_leaves(model, shardings, paths, "float32")
    batch_sharding = NamedSharding(mesh, sharding.partition_spec(("batch", "length"), config.sharding_rules))
    schedule = make_schedule(config.optimizer, 10)
    optimizer = make_optimizer(config.optimizer, schedule)
    weights = LossWeights(z_loss=1e-3, router_z_loss=1e-2, load_balancing=1e-2)
    with jax.set_mesh(mesh):
        values = split(random_leaves(model), paths)
        trainable, frozen = jax.tree.map(lambda leaf, like: jax.device_put(leaf, like.sharding), values, abstract)
        state = initial_state(trainable, optimizer, abstract_state(trainable, optimizer, mesh))
        step = make_train_step(model, optimizer, schedule, weights, grad_accum_steps)
        batch = jax.device_put(BATCH, batch_sharding)
        # One program for all steps: it refuses a state that lies elsewhere than the first one did.
        step = jax.jit(step, donate_argnums=0).lower(state, frozen, batch).compile(COMPILE_FAST)
        losses = []
        for _ in range(3):
            state, metrics = step(state, frozen, batch)
            losses.append(float(metrics["loss"]))
        for path, leaf in state.trainable.items():
            assert leaf.sharding.is_equivalent_to(shardings[path], leaf.ndim), path
    return losses, jax.tree.map(np.asarray, state.trainable)


@pytest.mark.parametrize(
    ("kind", "grad_accum_steps", "meshes"),
    [
        ("anchor", 1, [{"data": 2, "fsdp": 2, "tensor": 2}]),
        ("pair", 2, [{"fsdp": 4, "tensor": 2}]),
        ("stacked", 2, [{"data": 2, "fsdp": 2, "expert": 2}, {"fsdp": 2, "expert": 2, "tensor": 2}]),
        ("router", 1, [{"expert": 4, "tensor": 2}]),
    ],
    ids=PARTITIONS,
)
def test_eight_devices_train_as_one_does(kind, grad_accum_steps, meshes):
    """The gradients of micro-batches are added on devices as on one."""
    losses, leaves = train(kind, {}, grad_accum_steps)
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > losses[2] + 0.01
    for sizes in meshes:
        spread, spread_leaves = train(kind, sizes, grad_accum_steps)
        assert spread == pytest.approx(losses, rel=1e-5), sizes
        assert_trees_close(spread_leaves, leaves, 1e-3)


@dataclasses.dataclass(frozen=True)
class Chip:
    """A device of a TPU slice, as far as meshes go by it."""

    id: int
    coords: tuple[int, int, int]
    slice_index: int
    device_kind: str = "TPU v5 lite"
    platform: str = "tpu"
    core_on_chip: int = 0
    process_index: int = 0


def chips(slices, width=2, height=4):
    """The chips of some slices, in no order."""
    places = [(x, y, 0) for y in range(height) for x in range(width)]
    found = [Chip(i + len(places) * which, place, which) for which in range(slices) for i, place in enumerate(places)]
    return random.Random(0).sample(found, len(found))


def test_slices_hold_copies_of_the_parameters():
    mesh = sharding.make_mesh({**ONE, "data": 4, "fsdp": 2, "tensor": 2}, chips(slices=2))
    assert mesh.devices.shape == (4, 2, 1, 2)
    # The program of a slice is that of its part of the mesh: the first copies are the first slice's.
    assert [{chip.slice_index for chip in copy.flat} for copy in mesh.devices] == [{0}, {0}, {1}, {1}]
    assert {chip.id for chip in mesh.devices.flat} == set(range(16))


@pytest.mark.parametrize("sizes", [{"fsdp": 16}, {"data": 1, "fsdp": 8, "tensor": 2}])
def test_parameters_are_not_split_over_slices(sizes):
    with pytest.raises(UserError, match="does not fit 2 slices; data must be a multiple of their number"):
        sharding.make_mesh({**ONE, **sizes}, chips(slices=2))


def test_neighbours_in_the_mesh_are_neighbours_in_the_slice():
    mesh = sharding.make_mesh({**ONE, "fsdp": 4, "tensor": 4}, chips(slices=1, width=4))
    for axis in (1, 3):
        lines = np.moveaxis(mesh.devices, axis, -1).reshape(-1, mesh.devices.shape[axis])
        for a, b in (pair for line in lines for pair in itertools.pairwise(line)):
            assert np.abs(np.subtract(a.coords, b.coords)).sum() == 1


def test_an_axis_of_the_slice_may_be_divided_among_axes_of_the_mesh():
    mesh = sharding.make_mesh({**ONE, "data": 2, "fsdp": 4, "tensor": 2}, chips(slices=1, width=4))
    assert mesh.devices.shape == (2, 4, 1, 2)


def test_parameters_may_be_split_over_the_gpus_of_two_hosts():
    """JAX numbers the slices of GPUs by host."""
    gpus = [Chip(i, (0, 0, 0), i // 8, "NVIDIA H200", "gpu", process_index=i // 8) for i in range(16)]
    mesh = sharding.make_mesh({**ONE, "fsdp": 8, "tensor": 2}, gpus)
    assert mesh.devices.shape == (1, 8, 1, 2)
    assert [[gpu.id for gpu in pair] for pair in mesh.devices[0, :, 0]] == [[2 * i, 2 * i + 1] for i in range(8)]
    mesh = sharding.make_mesh({**ONE, "data": 2, "fsdp": 8}, gpus)
    assert [{gpu.process_index for gpu in copy.flat} for copy in mesh.devices] == [{0}, {1}]
