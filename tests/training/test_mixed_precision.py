"""What is bfloat16 and what is float32 in the steps of a run with frozen leaves held in bfloat16."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

from configs import base
from flexolmo_jax.model.architecture import PAIR, Layout
from flexolmo_jax.model.decoder import Compute, Decoder
from flexolmo_jax.training.optimizer import make_optimizer, make_schedule
from flexolmo_jax.training.state import split, trainable_paths
from flexolmo_jax.training.step import LossWeights, TrainState, make_train_step, objective
from tests.support.tiny import ARCHITECTURE, random_batch

BATCH = random_batch([[16], [3, 9]], 16)
STEPS = {"pair": PAIR, "router": Layout("stacked", 4, 2)}
MOVES = {"broadcast_in_dim", "copy", "dynamic_slice", "gather", "mul", "reshape", "slice", "squeeze", "transpose"}


@pytest.fixture(params=STEPS)
def step_and_arguments(request):
    """A train step in bfloat16 and abstract arguments: trainable leaves float32, frozen ones bfloat16."""
    model = Decoder(ARCHITECTURE, STEPS[request.param], Compute("bfloat16", "dots"))
    leaves = model.abstract()
    trainable, frozen = split(leaves, trainable_paths(leaves, base.PARTITIONS[request.param]))
    frozen = {path: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16) for path, leaf in frozen.items()}
    optimizer = make_optimizer(base.get_config().optimizer, schedule := make_schedule(base.get_config().optimizer, 10))
    state = TrainState(jax.ShapeDtypeStruct((), jnp.int32), trainable, jax.eval_shape(optimizer.init, trainable))
    step = make_train_step(model, optimizer, schedule, LossWeights(1e-5, 1e-3, 0.0), grad_accum_steps=1)
    return model, step, (state, frozen, BATCH)


def test_trainable_leaves_their_gradients_and_moments_are_float32(step_and_arguments):
    model, step, (state, frozen, batch) = step_and_arguments

    def loss(trainable):
        return objective(model, {**frozen_zeros, **trainable}, batch, LossWeights(0, 0, 0))[0]

    frozen_zeros = {path: jnp.zeros(leaf.shape, leaf.dtype) for path, leaf in frozen.items()}
    gradient = jax.eval_shape(jax.grad(loss), state.trainable)
    after, metrics = jax.eval_shape(step, state, frozen, batch)
    floats = [x for x in jax.tree.leaves((gradient, after, metrics)) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert len(floats) > 4 * len(gradient)
    assert {x.dtype for x in floats} == {jnp.dtype(jnp.float32)}


def test_no_float32_copy_of_a_frozen_kernel_is_made(step_and_arguments):
    """Scales of norms, router weights and biases are computed with in float32; nothing as large as a kernel is."""
    _, step, (state, frozen, batch) = step_and_arguments
    program = jax.make_jaxpr(step)(state, frozen, batch).jaxpr
    before = len(jax.tree.leaves(state))
    names = dict(zip(program.invars[before:], sorted(frozen), strict=False))
    kernels = {var: name for var, name in names.items() if np.prod(frozen[name].shape) >= ARCHITECTURE.d_model**2}
    assert {name.rpartition("/")[2] for name in kernels.values()} >= {"embedding", "head", "query", "out", "down"}
    widened, seen = set(), set()
    follow(program, kernels, widened, seen)
    assert seen == set(kernels.values())
    assert not widened


def follow(program: core.Jaxpr, names: dict, widened: set, seen: set) -> list:
    """Follows named arrays through what only moves their elements.

    Adds to `widened` those that are made float32, and to `seen` those that are multiplied as they are. Returns the
    name of each output, or None.
    """
    names = dict(names)

    def name(atom):
        return None if isinstance(atom, core.Literal) else names.get(atom)

    for equation in program.eqns:
        inputs, primitive = [name(atom) for atom in equation.invars], equation.primitive.name
        inner = [
            p for p in jax.tree.leaves(list(equation.params.values())) if hasattr(p, "eqns") or hasattr(p, "jaxpr")
        ]
        if not any(inputs):
            continue
        if inner:
            outputs = []
            for sub in inner:
                sub = getattr(sub, "jaxpr", sub)
                # Primitives with more operands than their program has, such as `cond`, have these in front.
                offset = len(inputs) - len(sub.invars)
                names_inside = dict(zip(sub.invars, inputs[max(offset, 0) :], strict=False))
                outputs = follow(sub, {var: n for var, n in names_inside.items() if n}, widened, seen) or outputs
            names.update({var: n for var, n in zip(equation.outvars, outputs, strict=False) if n})
        elif primitive == "convert_element_type" and equation.params["new_dtype"] == jnp.float32:
            widened.update(n for n in inputs if n)
        elif primitive in ("dot_general", "gather", "ragged_dot_general"):
            seen.update(n for n in inputs if n)
        elif primitive in MOVES | {"convert_element_type", "sharding_constraint", "optimization_barrier", "name"}:
            names.update({var: n for var, n in zip(equation.outvars, inputs, strict=False) if n})
    return [name(atom) for atom in program.outvars]
