"""The leaves that a run begins with, which of them it trains, and the shardings of these and of optimizer state."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from configs import base
from flexolmo_jax import sharding
from flexolmo_jax.checkpoint.copying import write_tree
from flexolmo_jax.checkpoint.params import Slice
from flexolmo_jax.errors import UserError
from flexolmo_jax.model.architecture import ANCHOR, PAIR
from flexolmo_jax.model.decoder import Decoder
from flexolmo_jax.training.optimizer import make_optimizer, make_schedule
from flexolmo_jax.training.state import (
    Initialization,
    Start,
    abstract_leaves,
    abstract_state,
    initial_leaves,
    split,
    trainable_paths,
)
from flexolmo_jax.training.step import initial_state
from tests.support.tiny import ARCHITECTURE, expert_leaves, random_leaves

EXPERT_ONLY = (("blocks/moe/expert/.*", "trainable"), (".*", "frozen"))
HEAD_ONLY = (("head", "trainable"), (".*", "frozen"))
SHAPE = (ARCHITECTURE.num_layers, ARCHITECTURE.d_model)


def begin(layout, partition, start=None, frozen_dtype="float32", mesh=None, seed=0, expert="news", **values):
    """(trainable, frozen) of a run on a mesh of these sizes, by default one device."""
    sizes = dict.fromkeys(sharding.MESH_AXES, 1) | (mesh or {})
    mesh = sharding.make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])
    model = Decoder(ARCHITECTURE, layout)
    trainable = trainable_paths(model.abstract(), partition)
    shardings = sharding.leaf_shardings(model.abstract(), model.logical_axes(), mesh, base.SHARDING_RULES)
    abstract = abstract_leaves(model, shardings, trainable, frozen_dtype)
    options = base.get_config().init
    options.update(values)
    return initial_leaves(model, *abstract, start, Initialization(seed, expert if start else "", options))


@pytest.fixture(scope="module")
def anchor(tmp_path_factory):
    """(a directory with the parameters of an anchor, its leaves)."""
    directory = tmp_path_factory.mktemp("anchor")
    leaves = random_leaves(Decoder(ARCHITECTURE, ANCHOR))
    write_tree(directory / "params", {p: Slice(x, None, p) for p, x in leaves.items()}, digest_name=lambda path: path)
    return directory, leaves


def expert_run(anchor, **values):
    """(trainable, frozen) of an owner's run against that anchor."""
    return begin(PAIR, EXPERT_ONLY, Start(anchor[0], manifest=None), **values)


def test_fresh_leaves_come_from_the_seed_whatever_the_mesh():
    (single, frozen), (spread, _) = (begin(ANCHOR, HEAD_ONLY, mesh=mesh) for mesh in ({}, {"fsdp": 4, "tensor": 2}))
    np.testing.assert_array_equal(single["head"], spread["head"])
    assert spread["head"].sharding.shard_shape((32, 64)) == (8, 32)
    assert single.keys() == {"head"}
    assert frozen.keys() | single.keys() == Decoder(ARCHITECTURE, ANCHOR).abstract().keys()
    other, _ = begin(ANCHOR, HEAD_ONLY, seed=1)
    assert (np.asarray(other["head"]) != single["head"]).mean() > 0.99


def test_frozen_leaves_may_be_held_in_bfloat16_but_never_the_trained(anchor):
    trainable, frozen = expert_run(anchor, frozen_dtype="bfloat16")
    assert {leaf.dtype for leaf in frozen.values()} == {jnp.dtype("bfloat16")}
    assert {leaf.dtype for leaf in trainable.values()} == {jnp.dtype("float32")}
    np.testing.assert_array_equal(frozen["head"], anchor[1]["head"].astype(jnp.bfloat16))


def test_a_new_expert_is_a_copy_of_the_anchor_with_a_router_of_its_own(anchor):
    trainable, frozen = expert_run(anchor, router_bias=-0.25, router_weight_stddev=0.5)
    of_anchor, of_expert = expert_leaves(anchor[1], "anchor"), expert_leaves(trainable, "expert")
    for leaf in ("gate", "up", "down"):
        np.testing.assert_array_equal(of_expert[leaf], of_anchor[leaf])
    assert (np.asarray(of_expert["router/bias"]) == -0.25).all()
    weight = np.asarray(of_expert["router/weight"])
    assert weight.shape == SHAPE
    assert 0.3 < weight.std() < 0.6
    assert np.abs(weight).max() <= 1
    assert abs(weight.mean()) < 0.2
    assert frozen.keys() == anchor[1].keys()
    for path, leaf in frozen.items():
        np.testing.assert_array_equal(leaf, anchor[1][path])


def test_owners_start_from_different_router_weights_and_an_owner_always_from_the_same(anchor):
    weights = [
        np.asarray(expert_run(anchor, expert=name)[0]["blocks/moe/expert/router/weight"])
        for name in ("news", "law", "news")
    ]
    np.testing.assert_array_equal(weights[0], weights[2])
    assert (weights[0] != weights[1]).all()


@pytest.mark.parametrize("shape", [SHAPE, SHAPE[1:]])
def test_a_file_sets_the_router_weights_of_all_layers(anchor, tmp_path, shape):
    weight = np.random.default_rng(0).normal(size=shape)
    np.save(tmp_path / "weight.npy", weight)
    trainable, _ = expert_run(anchor, router_weight_file=str(tmp_path / "weight.npy"))
    actual = trainable["blocks/moe/expert/router/weight"]
    np.testing.assert_array_equal(actual, np.broadcast_to(weight.astype(np.float32), SHAPE))


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
def test_a_bad_file_of_a_router_weight_is_refused(anchor, tmp_path, content, message):
    file = tmp_path / "weight.npy"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        np.save(file, content)
    with pytest.raises(UserError, match=message) as error:
        expert_run(anchor, router_weight_file=str(file))
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


def test_optimizer_state_has_the_shardings_of_its_leaves_and_scalars_are_replicated():
    config, model = base.get_config().optimizer, Decoder(ARCHITECTURE, ANCHOR)
    mesh = sharding.make_mesh({"data": 1, "fsdp": 4, "expert": 1, "tensor": 2})
    shardings = sharding.leaf_shardings(model.abstract(), model.logical_axes(), mesh, base.SHARDING_RULES)
    abstract, _ = abstract_leaves(model, shardings, frozenset(shardings), "float32")
    trainable = {path: jax.device_put(np.ones(x.shape, np.float32), x.sharding) for path, x in abstract.items()}
    optimizer = make_optimizer(config, make_schedule(config, 10))
    state = initial_state(trainable, optimizer, abstract_state(abstract, optimizer, mesh))
    (moments,) = (part for part in jax.tree.leaves(state.optimizer, is_leaf=has_moments) if has_moments(part))
    for path, leaf in trainable.items():
        for moment in (moments.mu[path], moments.nu[path]):
            assert moment.sharding.is_equivalent_to(leaf.sharding, leaf.ndim), path
    scalars = [x for x in jax.tree.leaves((state.step, state.optimizer)) if not x.ndim]
    assert scalars
    assert all(x.sharding.is_fully_replicated and len(x.devices()) == 8 for x in scalars)
    assert trainable["head"].sharding.spec == PartitionSpec(("fsdp", "expert"), ("tensor",))


PATHS = ("blocks/moe/anchor/gate", "blocks/moe/expert/gate", "blocks/moe/expert/router/weight", "head")


def test_the_first_pattern_that_matches_a_whole_path_decides():
    table = (("blocks/.*/expert/router/weight", "frozen"), ("blocks/.*/expert/.*", "trainable"), (".*", "frozen"))
    assert trainable_paths(PATHS, table) == {"blocks/moe/expert/gate"}
    assert trainable_paths(PATHS, ((".*gate", "frozen"), (".*", "trainable"))) == set(PATHS[2:])


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ((("blocks/.*", "trainable"),), "no pattern matches the leaf head"),
        ((("blocks", "trainable"), (".*", "frozen")), "'blocks' decides no leaf"),
        (((".*", "trainable"), ("head", "frozen")), "'head' decides no leaf"),
        (((".*", "Trainable"),), "marked 'Trainable'"),
        (((".*(", "trainable"),), "not a regular expression"),
        (((".*", "frozen"),), "every leaf is frozen"),
    ],
    ids=["unmatched leaf", "part of a path", "idle pattern", "bad mark", "bad expression", "all frozen"],
)
def test_a_table_that_decides_wrongly_is_refused(table, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(")) as error:
        trainable_paths(PATHS, table)
    assert str(error.value).startswith("config.partition")


def test_every_leaf_is_on_one_side_of_the_split():
    leaves = {path: number for number, path in enumerate(PATHS)}
    trainable, frozen = split(leaves, {PATHS[1]})
    assert trainable == {PATHS[1]: 1}
    assert frozen == {PATHS[0]: 0, PATHS[2]: 2, PATHS[3]: 3}
