"""One optimizer step: accumulation, what stays frozen, and what it costs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from flexolmo_jax.model import decoder
from flexolmo_jax.model.architecture import PAIR
from flexolmo_jax.model.decoder import Compute, Decoder
from flexolmo_jax.model.loss import make_loss_step
from flexolmo_jax.training.optimizer import make_optimizer, make_schedule
from flexolmo_jax.training.state import split, trainable_paths
from flexolmo_jax.training.step import LossWeights, TrainState, make_train_step, objective
from tests.support.tiny import ARCHITECTURE, COMPILE_FAST, STACKED, assert_trees_close, random_batch, random_leaves

EXPERT_ONLY = (("blocks/moe/expert/.*", "trainable"), (".*", "frozen"))
EVERYTHING = ((".*", "trainable"),)
MODEL = Decoder(ARCHITECTURE, PAIR)
WEIGHTS = LossWeights(z_loss=1e-2, router_z_loss=1e-1, load_balancing=0.0)
# Sequences of very different length, so that micro-batches hold very different numbers of tokens.
BATCH = random_batch([[16], [3], [2, 9], [1], [5, 5], [1]], 16)


def make_step(grad_accum_steps=1, model=MODEL):
    """The step of a pair, with decay of every leaf and clipping, and its optimizer."""
    config = base.get_config().optimizer
    config.update(learning_rate=1e-2, weight_decay=0.1, no_decay=())
    schedule = make_schedule(config, 10)
    optimizer = make_optimizer(config, schedule)
    return make_train_step(model, optimizer, schedule, WEIGHTS, grad_accum_steps), optimizer


@functools.cache
def compiled_step(grad_accum_steps=1):
    """The same, compiled."""
    step, optimizer = make_step(grad_accum_steps)
    return jax.jit(step, compiler_options=COMPILE_FAST), optimizer


def begin(grad_accum_steps=1):
    """(step, state, frozen) of a pair with random leaves."""
    step, optimizer = compiled_step(grad_accum_steps)
    leaves = jax.tree.map(jnp.asarray, random_leaves(MODEL))
    trainable, frozen = split(leaves, trainable_paths(leaves, EXPERT_ONLY))
    return step, TrainState(jnp.zeros((), jnp.int32), trainable, optimizer.init(trainable)), frozen


@pytest.fixture(scope="module")
def whole():
    """State and metrics after one step on the whole batch."""
    step, state, frozen = begin()
    return step(state, frozen, BATCH)


@pytest.mark.parametrize("grad_accum_steps", [2, 3])
def test_a_step_of_micro_batches_is_that_of_the_whole_batch(whole, grad_accum_steps):
    """The first moment of the first step is the gradient, up to a factor."""
    step, state, frozen = begin(grad_accum_steps)
    state, metrics = step(state, frozen, BATCH)
    moments = [x for x in jax.tree.leaves(whole[0].optimizer) if x.ndim]
    assert_trees_close([x for x in jax.tree.leaves(state.optimizer) if x.ndim], moments, 1e-5)
    metrics, expected = ({k: v for k, v in m.items() if k != "load_balancing"} for m in (metrics, whole[1]))
    assert_trees_close(metrics, expected, 1e-5)


def test_metrics_are_means_over_tokens_and_the_norm_before_clipping(whole):
    _, state, frozen = begin()
    tokens = np.sum(BATCH["segment_ids"] > 0)

    def mean_loss(trainable):
        loss, sums = objective(MODEL, {**frozen, **trainable}, BATCH, WEIGHTS)
        return loss / tokens, sums

    compute = jax.jit(jax.value_and_grad(mean_loss, has_aux=True), compiler_options=COMPILE_FAST)
    (loss, sums), gradient = compute(state.trainable)
    norm = np.sqrt(sum(np.sum(np.float64(g) ** 2) for g in gradient.values()))
    expected = {name: value / tokens for name, value in sums.items()}
    expected |= {"tokens": tokens, "loss": loss, "gradient_norm": norm, "learning_rate": 1e-2}
    moved = (whole[0].trainable[path] - before for path, before in state.trainable.items())
    expected["update_norm"] = np.sqrt(sum(np.sum(np.float64(change) ** 2) for change in moved))
    assert_trees_close(whole[1], expected, 1e-5)
    assert norm > 1  # so that clipping, at 1, would show
    factor = (1 - base.get_config().optimizer.beta1) / norm
    moment = next(part.mu for part in jax.tree.leaves(whole[0].optimizer, is_leaf=has_moments) if has_moments(part))
    assert_trees_close(moment, {path: factor * g for path, g in gradient.items()}, 1e-4)


def has_moments(part):
    return hasattr(part, "mu")


def test_frozen_leaves_stay_bit_for_bit_and_have_no_optimizer_state():
    step, state, frozen = begin()
    before = jax.tree.map(np.array, (state.trainable, frozen))
    losses = []
    for _ in range(4):
        state, metrics = step(state, frozen, BATCH)
        losses.append(float(metrics["loss"]))
    assert int(state.step) == 4
    assert losses == sorted(losses, reverse=True)
    jax.tree.map(np.testing.assert_array_equal, frozen, before[1])
    assert {path.split("/")[2] for path in state.trainable} == {"expert"}
    assert len(frozen) + len(state.trainable) == len(MODEL.abstract())
    for path, leaf in state.trainable.items():
        assert (np.asarray(leaf) != before[0][path]).all(), path
    shapes = sorted(x.shape for x in jax.tree.leaves(state.optimizer) if x.ndim)
    assert shapes == sorted(2 * [leaf.shape for leaf in state.trainable.values()])


def test_a_batch_of_padding_is_finite():
    step, state, frozen = begin()
    empty = {name: np.zeros_like(array) for name, array in BATCH.items()}
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(step(state, frozen, empty)))


def test_held_out_sums_are_those_of_the_objective_and_a_mask_switches_experts_off():
    model = Decoder(ARCHITECTURE, STACKED)
    leaves = random_leaves(model)
    step = jax.jit(make_loss_step(model), compiler_options=COMPILE_FAST)
    sums = step(leaves, BATCH, np.ones(4, bool))
    _, expected = jax.jit(functools.partial(objective, model), compiler_options=COMPILE_FAST)(leaves, BATCH, WEIGHTS)
    expected["routing_E"] = expected["routing_LxE"].mean(axis=0)
    assert_trees_close(sums, {name: expected[name] for name in sums}, 1e-5)
    masked = step(leaves, BATCH, np.array([True, True, False, True]))
    assert float(masked["routing_E"][2]) == 0
    assert float(masked["routing_E"].sum()) == pytest.approx(float(sums["tokens"]), rel=1e-5)
    assert abs(float(masked["cross_entropy"] - sums["cross_entropy"])) > 0.1


# Sizes at which all but matmuls is small. They are compiled, never run.
BIG = dataclasses.replace(
    ARCHITECTURE, vocab_size=4096, num_layers=2, d_model=1024, num_heads=8, num_kv_heads=8, d_ff=4096
)
BATCH_SIZE, WIDTH = 8, 512


def matmul_flops(arch, batch_size, width, everything):
    """Floating point operations of the matmuls of one step of a pair, without rematerialisation.

    A matmul costs as much again for the gradient of its input and as much again for that of its weight.
    Nothing before the first trainable leaf needs the gradient of an activation: training the expert
    alone, none of layer 0 does but the expert's hidden units.
    """
    tokens = batch_size * width
    head = 2 * tokens * arch.d_model * arch.vocab_size
    projections = 4 * 2 * tokens * arch.d_model**2
    scores = 2 * 2 * batch_size * width**2 * arch.d_model  # scores, and the weighted sum of values
    matrix = 2 * tokens * arch.d_model * arch.d_ff  # of gate, up or down
    expert = anchor = 3 * matrix
    forward = head + arch.num_layers * (projections + scores + anchor + expert)
    if everything:
        # Scores have two inputs and no weight. The inputs of layer 0 lead to the embedding.
        return 3 * forward
    activations = head + (arch.num_layers - 1) * (projections + 2 * scores + anchor + expert) + matrix
    return forward + activations + arch.num_layers * expert


def compiled_from_shapes(model, partition, batch_size, width, grad_accum_steps=1):
    """The compiled step, and the shapes of what it trains."""
    step, optimizer = make_step(grad_accum_steps, model)
    trainable, frozen = split(model.abstract(), trainable_paths(model.abstract(), partition))
    state = TrainState(jax.ShapeDtypeStruct((), jnp.int32), trainable, jax.eval_shape(optimizer.init, trainable))
    batch = {name: jax.ShapeDtypeStruct((batch_size, width), jnp.int32) for name in BATCH}
    jitted = jax.jit(step, donate_argnums=0, compiler_options=COMPILE_FAST)
    return jitted.lower(state, frozen, batch).compile(), trainable


def compiled_flops(monkeypatch, partition):
    """What XLA counts in the compiled step, without loops, of which it counts the body once, and with all scores."""
    monkeypatch.setattr("flexolmo_jax.model.loss.chunk_length", lambda platform: WIDTH)
    model = Decoder(BIG, PAIR, Compute(unroll=BIG.num_layers, attention="reference"))
    return compiled_from_shapes(model, partition, BATCH_SIZE, WIDTH)[0].cost_analysis()["flops"]


def test_an_expert_step_computes_no_gradient_of_a_frozen_weight(monkeypatch):
    expected = matmul_flops(BIG, BATCH_SIZE, WIDTH, everything=False)
    assert compiled_flops(monkeypatch, EXPERT_ONLY) == pytest.approx(expected, rel=0.05)


def test_micro_batches_add_to_one_gradient():
    """Of many layers and few tokens, a step's temporary memory is the sum and a layer's gradient, no second sum."""
    architecture = dataclasses.replace(BIG, num_layers=24)
    for layout, partition in ((PAIR, EXPERT_ONLY), (STACKED, EVERYTHING)):
        model = Decoder(architecture, layout, Compute(remat="full"))
        compiled, trained = compiled_from_shapes(model, partition, batch_size=2, width=16, grad_accum_steps=2)
        gradient = sum(4 * leaf.size for leaf in trained.values())
        assert gradient < compiled.memory_analysis().temp_size_in_bytes < 1.5 * gradient, layout


@pytest.mark.parametrize(
    ("partition", "platform", "ends"),
    [(EXPERT_ONLY, "cpu", True), (EXPERT_ONLY, "tpu", False), (EVERYTHING, "cpu", False)],
)
def test_the_backward_pass_of_blocks_ends_in_the_first_where_the_embedding_is_frozen(
    monkeypatch, partition, platform, ends
):
    told = []

    original = decoder.scan_blocks

    def scan_blocks(*inputs, input_gradient, **options):
        told.append(input_gradient)
        return original(*inputs, input_gradient=input_gradient, **options)

    monkeypatch.setattr(decoder, "scan_blocks", scan_blocks)
    compute = Compute(platform=platform, attention="reference", dispatch="loop")
    step, optimizer = make_step(model=MODEL.clone(compute=compute))
    trainable, frozen = split(MODEL.abstract(), trainable_paths(MODEL.abstract(), partition))
    state = TrainState(jax.ShapeDtypeStruct((), jnp.int32), trainable, jax.eval_shape(optimizer.init, trainable))
    jax.eval_shape(step, state, frozen, BATCH)
    assert told == [not ends]


def test_the_count_of_a_step_shows_gradients_of_all_weights(monkeypatch):
    """So the test above would fail, were frozen leaves differentiated too."""
    expected = matmul_flops(BIG, BATCH_SIZE, WIDTH, everything=True)
    assert compiled_flops(monkeypatch, EVERYTHING) == pytest.approx(expected, rel=0.05)
    assert expected > 1.2 * matmul_flops(BIG, BATCH_SIZE, WIDTH, everything=False)
