"""The leaves a run begins with, and where they and the optimizer's state lie."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from configs import base
from flexolmo_jax import sharding
from flexolmo_jax.checkpoint.params import Slice, write_tree
from flexolmo_jax.errors import UserError
from flexolmo_jax.model.architecture import ANCHOR, PAIR
from flexolmo_jax.model.decoder import Decoder
from flexolmo_jax.training.inputs import Inputs
from flexolmo_jax.training.optimizer import make_optimizer, make_schedule
from flexolmo_jax.training.partition import trainable_paths
from flexolmo_jax.training.state import initial_leaves, initial_state, shardings
from tests.support.tiny import ARCHITECTURE, expert_leaves, random_leaves

EXPERT_ONLY = (("blocks/moe/expert/.*", "trainable"), (".*", "frozen"))
HEAD_ONLY = (("head", "trainable"), (".*", "frozen"))
SHAPE = (ARCHITECTURE.num_layers, ARCHITECTURE.d_model)


def inputs_of(layout, partition, manifest=None):
    model = Decoder(ARCHITECTURE, layout)
    return Inputs(model, manifest, trainable_paths(model.abstract(), partition), [], {})


def begin(config, inputs, **sizes):
    """(trainable, frozen) of a run on the devices that the sizes ask for, by default one."""
    sizes = {**dict.fromkeys(sharding.MESH_AXES, 1), **sizes}
    mesh = sharding.make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])
    return initial_leaves(config, inputs, shardings(inputs, mesh, config.sharding_rules))


@pytest.fixture(scope="module")
def anchor(tmp_path_factory):
    """(a directory with the parameters of an anchor, its leaves)."""
    directory = tmp_path_factory.mktemp("anchor")
    leaves = random_leaves(Decoder(ARCHITECTURE, ANCHOR))
    write_tree(directory / "params", {p: Slice(x, None, p) for p, x in leaves.items()}, digest_name=lambda path: path)
    return directory, leaves


def expert_run(anchor, **values):
    """(trainable, frozen) of an owner's run against that anchor."""
    config = base.get_config()
    config.start_from, config.expert = str(anchor[0]), "news"
    with config.unlocked():
        config.update_from_flattened_dict(values)
    return begin(config, inputs_of(PAIR, EXPERT_ONLY, manifest="an anchor's"))


def test_fresh_leaves_come_from_the_seed_whatever_the_mesh():
    inputs = inputs_of(ANCHOR, HEAD_ONLY)
    config = base.get_config()
    (one, frozen), (spread, _) = begin(config, inputs), begin(config, inputs, fsdp=4, tensor=2)
    np.testing.assert_array_equal(one["head"], spread["head"])
    assert spread["head"].sharding.shard_shape((32, 64)) == (8, 32)
    assert one.keys() == {"head"}
    assert frozen.keys() | one.keys() == inputs.model.abstract().keys()
    config.seed = 1
    other, _ = begin(config, inputs)
    assert (np.asarray(other["head"]) != one["head"]).mean() > 0.99


def test_frozen_leaves_may_be_held_in_bfloat16_but_never_the_trained(anchor):
    trainable, frozen = expert_run(anchor, **{"compute.frozen_dtype": "bfloat16"})
    assert {leaf.dtype for leaf in frozen.values()} == {jnp.dtype("bfloat16")}
    assert {leaf.dtype for leaf in trainable.values()} == {jnp.dtype("float32")}
    np.testing.assert_array_equal(frozen["head"], anchor[1]["head"].astype(jnp.bfloat16))


def test_a_new_expert_is_a_copy_of_the_anchor_with_a_row_and_a_bias_of_its_own(anchor):
    trainable, frozen = expert_run(anchor, **{"init.router_bias": -0.25, "init.router_weight_stddev": 0.5})
    theirs, own = expert_leaves(anchor[1], "anchor"), expert_leaves(trainable, "expert")
    for leaf in ("gate", "up", "down"):
        np.testing.assert_array_equal(own[leaf], theirs[leaf])
    assert (np.asarray(own["router/bias"]) == -0.25).all()
    assert own["router/weight"].shape == SHAPE
    assert 0.3 < np.asarray(own["router/weight"]).std() < 0.6
    assert np.abs(own["router/weight"]).max() <= 1
    assert abs(np.asarray(own["router/weight"]).mean()) < 0.2
    assert frozen.keys() == anchor[1].keys()
    for path, leaf in frozen.items():
        np.testing.assert_array_equal(leaf, anchor[1][path])


def test_owners_start_from_different_rows_and_an_owner_always_from_the_same(anchor):
    rows = [
        np.asarray(expert_run(anchor, expert=name)[0]["blocks/moe/expert/router/weight"])
        for name in ("news", "law", "news")
    ]
    np.testing.assert_array_equal(rows[0], rows[2])
    assert (rows[0] != rows[1]).all()


@pytest.mark.parametrize("shape", [SHAPE, SHAPE[1:]])
def test_a_row_file_sets_the_rows_of_all_layers(anchor, tmp_path, shape):
    row = np.random.default_rng(0).normal(size=shape)
    np.save(tmp_path / "row.npy", row)
    trainable, _ = expert_run(anchor, **{"init.router_weight_file": str(tmp_path / "row.npy")})
    actual = trainable["blocks/moe/expert/router/weight"]
    np.testing.assert_array_equal(actual, np.broadcast_to(row.astype(np.float32), SHAPE))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"words", "not a .npy file"),
        (np.zeros(3), r"shape \[3\]"),
        (np.full(SHAPE, np.nan), "must be finite"),
        (np.array([None]), "not a .npy file"),
    ],
    ids=["missing", "text", "shape", "nan", "pickled"],
)
def test_a_bad_row_file_is_refused(anchor, tmp_path, content, message):
    file = tmp_path / "row.npy"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        np.save(file, content)
    with pytest.raises(UserError, match=message) as error:
        expert_run(anchor, **{"init.router_weight_file": str(file)})
    assert str(error.value).startswith(f"config.init.router_weight_file={file}")


@pytest.mark.parametrize("wrong", ["missing", "misshapen"])
def test_a_leaf_the_start_lacks_is_named(tmp_path, anchor, wrong):
    leaves = {path: leaf for path, leaf in anchor[1].items() if path != "head"}
    if wrong == "misshapen":
        leaves["head"] = anchor[1]["head"].T
    write_tree(tmp_path / "params", {p: Slice(x, None, p) for p, x in leaves.items()}, digest_name=lambda path: path)
    with pytest.raises(UserError, match="leaf head is missing or misshapen"):
        expert_run((tmp_path, leaves))


def has_moments(part):
    return hasattr(part, "mu")


def test_optimizer_state_lies_where_its_leaves_do_and_scalars_everywhere():
    config = base.get_config()
    model = Decoder(ARCHITECTURE, ANCHOR)
    mesh = sharding.make_mesh({"data": 1, "fsdp": 4, "expert": 1, "tensor": 2})
    where = shardings(inputs_of(ANCHOR, HEAD_ONLY), mesh, config.sharding_rules)
    trainable = {
        path: jax.device_put(np.ones(x.shape, np.float32), where[path]) for path, x in model.abstract().items()
    }
    state = initial_state(trainable, make_optimizer(config.optimizer, make_schedule(config.optimizer, 10)), mesh)
    (moments,) = (part for part in jax.tree.leaves(state.optimizer, is_leaf=has_moments) if has_moments(part))
    for path, leaf in trainable.items():
        for moment in (moments.mu[path], moments.nu[path]):
            assert moment.sharding.is_equivalent_to(leaf.sharding, leaf.ndim), path
    scalars = [x for x in jax.tree.leaves((state.step, state.optimizer)) if not x.ndim]
    assert scalars
    assert all(x.sharding.is_fully_replicated and len(x.devices()) == 8 for x in scalars)
    assert trainable["head"].sharding.spec == PartitionSpec(("fsdp", "expert"), ("tensor",))
