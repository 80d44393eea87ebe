"""Stacked experts over eight devices against every expert for every token on one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.base import SHARDING_RULES
from flexolmo_jax import sharding
from flexolmo_jax.model.dispatch import stacked_experts
from flexolmo_jax.model.experts import EXPERT_KINDS
from flexolmo_jax.model.kernels import grouped_matmul
from flexolmo_jax.model.moe import top_k_weights
from tests.support import tiny
from tests.support.mixtures import masked_sum
from tests.support.pallas_interpreter import hopper_stand_ins
from tests.support.tiny import COMPILE_FAST, assert_trees_close

LAYERS, BATCH, LENGTH, D_MODEL, D_FF, EXPERTS, TOP_K = 2, 8, 6, 16, 24, 8, 4
ARCHITECTURE = dataclasses.replace(tiny.ARCHITECTURE, d_model=D_MODEL, d_ff=D_FF)
LEAVES = EXPERT_KINDS[ARCHITECTURE.expert].leaves(ARCHITECTURE)
MESHES = [
    {"expert": 4, "tensor": 2},
    {"fsdp": 2, "expert": 2, "tensor": 2},
    {"fsdp": 8},
    {"expert": 8},
    {"data": 2, "tensor": 4},
]
ROUTINGS = {"even": 0.0, "to one expert": 50.0}


def make_mesh(sizes):
    return sharding.make_mesh({**dict.fromkeys(sharding.MESH_AXES, 1), **sizes})


def random_arguments(routing, batch=BATCH, dtype=np.float32):
    """(leaves, x, cotangent): leaves with the layer axis in front, and a router weight for each expert."""
    rng = np.random.default_rng(0)
    leaves = {name: rng.normal(0, 0.5, (LAYERS, EXPERTS, *leaf.shape)).astype(dtype) for name, leaf in LEAVES.items()}
    leaves["router/weight"] = np.float32(rng.normal(0, 0.5, (LAYERS, EXPERTS, D_MODEL)))
    # The first element of x is 1, and lets a router weight prefer its expert for all tokens.
    leaves["router/weight"][:, EXPERTS // 2, 0] += ROUTINGS[routing]
    x, cotangent = rng.normal(size=(2, batch, LENGTH, D_MODEL)).astype(dtype)
    x[..., 0] = 1
    return leaves, x, cotangent


def shards(mesh, leaves, x, cotangent):
    """The same arguments, laid out on the mesh."""
    axes = {
        **{name: ("layers", "experts", *leaf.axes) for name, leaf in LEAVES.items()},
        "router/weight": ("layers", None, None),
    }
    leaves = jax.device_put(leaves, sharding.leaf_shardings(leaves, axes, mesh, SHARDING_RULES))
    with jax.set_mesh(mesh):
        tokens = jax.NamedSharding(mesh, sharding.even_spec(x.shape, ("batch", "length", None), SHARDING_RULES))
    return leaves, *jax.device_put((x, cotangent), tokens)


def objective(experts_sum, leaves, x, cotangent):
    """(scalar, outputs) of layers of a router and its experts, each rematerialized."""

    @jax.checkpoint
    def layer(x, leaves):
        leaves = dict(leaves)
        weights = jax.nn.softmax(jnp.einsum("bsd,ed->bse", x.astype(jnp.float32), leaves.pop("router/weight")))
        y = experts_sum(x, leaves, weights)
        first = x[..., :1]  # stays 1
        return jnp.concatenate([first, jnp.tanh(x + y)[..., 1:]], axis=-1), None

    x, _ = jax.lax.scan(layer, x, leaves)
    return jnp.sum((x * cotangent).astype(jnp.float32)), x


def spread(dispatch):
    def experts_sum(x, kernels, weights):
        return stacked_experts(
            ARCHITECTURE, x, kernels, *top_k_weights(weights, TOP_K, False), dispatch, SHARDING_RULES
        )

    return experts_sum


def one_after_another(x, kernels, weights):
    return masked_sum(x, kernels, weights, TOP_K).astype(x.dtype)


def compiled(experts_sum, arguments):
    gradients = jax.value_and_grad(
        lambda leaves, x, cotangent: objective(experts_sum, leaves, x, cotangent), (0, 1), True
    )
    return jax.jit(gradients, compiler_options=COMPILE_FAST).lower(*arguments).compile()


@functools.cache
def expected_program():
    """The compiled gradient of every expert for every token on one device."""
    return compiled(one_after_another, random_arguments("even"))


@functools.cache
def program(mesh):
    """The compiled gradient on a mesh, whatever the routing."""
    with jax.set_mesh(mesh):
        return compiled(spread("blocks"), shards(mesh, *random_arguments("even")))


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_devices_share_experts_and_tokens_without_changing_any(sizes, routing):
    """Outputs, and gradients of all leaves and inputs; without drops, all tokens may choose one expert."""
    mesh, arguments = make_mesh(sizes), random_arguments(routing)
    expected = jax.device_get(expected_program()(*arguments))
    with jax.set_mesh(mesh):
        arguments = shards(mesh, *arguments)
        actual = program(mesh)(*arguments)
    assert_trees_close(actual, expected, 1e-5)
    for leaf, gradient in actual[1][0].items():
        assert gradient.sharding.is_equivalent_to(arguments[0][leaf].sharding, gradient.ndim), leaf


@pytest.mark.parametrize("dispatch", ["loop", "ragged", "all", "mosaic"])
def test_every_dispatch_can_be_shared(monkeypatch, dispatch):
    monkeypatch.setattr(grouped_matmul, "mosaic_fits", lambda *_: True)
    arguments = random_arguments("even")
    expected = jax.device_get(expected_program()(*arguments))
    mesh = make_mesh({"fsdp": 2, "expert": 2, "tensor": 2})
    with jax.set_mesh(mesh):
        arguments = shards(mesh, *arguments)
        with hopper_stand_ins():
            actual = compiled(spread(dispatch), arguments)(*arguments)
    assert_trees_close(actual, expected, 1e-5)


def test_sequences_that_do_not_divide_over_the_devices_are_computed_too():
    count = 3
    leaves, x, cotangent = random_arguments("even", batch=count)
    # The other sequences of the program have a cotangent of 0.
    padding = np.zeros((BATCH - count, LENGTH, D_MODEL), np.float32)
    padded = leaves, np.concatenate([x, padding]), np.concatenate([cotangent, padding])
    (loss, out), (d_leaves, d_x) = jax.device_get(expected_program()(*padded))
    mesh = make_mesh({"expert": 4, "tensor": 2})
    with jax.set_mesh(mesh):
        arguments = shards(mesh, leaves, x, cotangent)
        actual = compiled(spread("blocks"), arguments)(*arguments)
    assert_trees_close(actual, ((loss, out[:count]), (d_leaves, d_x[:count])), 1e-5)


def test_bfloat16_is_summed_as_well_as_on_one_device():
    exact = random_arguments("even")
    expected = jax.device_get(expected_program()(*exact))
    low = random_arguments("even", dtype=jnp.bfloat16)
    mesh = make_mesh({"fsdp": 2, "expert": 2, "tensor": 2})
    with jax.set_mesh(mesh):
        arguments = shards(mesh, *low)
        (_, out), (leaves, x) = compiled(spread("blocks"), arguments)(*arguments)
    assert out.dtype == x.dtype == leaves["gate"].dtype == jnp.bfloat16
    assert leaves["router/weight"].dtype == jnp.float32
    assert_trees_close(out, expected[0][1], 0.03)


def test_no_device_ever_holds_what_others_compute():
    """A device's program has the shards of its experts, and no more routed tokens than it may get."""
    text = program(make_mesh({"expert": 4, "tensor": 2})).as_text()
    # EXPERTS / 4 experts of D_FF / 2 hidden units; a gathered token has at most that many of its TOP_K experts.
    assert f"f32[{EXPERTS // 4},{D_MODEL},{D_FF // 2}]" in text
    assert f"f32[{EXPERTS},{D_MODEL}," not in text
    assert f"{D_MODEL},{D_FF}]" not in text
    assert f"f32[{BATCH * LENGTH * (EXPERTS // 4)},{D_FF // 2}]" in text
    assert f"f32[{BATCH * LENGTH * TOP_K},{D_FF // 2}]" not in text
