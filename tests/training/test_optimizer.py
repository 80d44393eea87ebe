"""Schedules against closed forms, AdamW against plain numpy."""

import math

import jax
import numpy as np
import optax
import pytest

from configs import base
from flexolmo_jax.training.optimizer import make_optimizer, make_schedule, warmup_steps

STEPS, PEAK, LEFT = 100, 0.5, 0.1


def section(**values):
    config = base.get_config().optimizer
    config.update(learning_rate=PEAK, final_fraction=LEFT, **values)
    return config


def cosine(step, warmup):
    if step < warmup:
        return PEAK * step / warmup
    return PEAK * (LEFT + (1 - LEFT) * (1 + math.cos(math.pi * (step - warmup) / (STEPS - warmup))) / 2)


def wsd(step, warmup):
    """Constant until a quarter of the steps is left."""
    if step < warmup:
        return PEAK * step / warmup
    return PEAK * (1 - (1 - LEFT) * max(0, step - 75) / 25)


@pytest.mark.parametrize("warmup", [0, 10])
@pytest.mark.parametrize("formula", [cosine, wsd])
def test_schedules_follow_their_formulas(formula, warmup):
    config = section(schedule=formula.__name__, warmup_steps=warmup, decay_fraction=0.25)
    schedule = make_schedule(config, STEPS)
    for step in (0, 1, 5, 9, 10, 11, 40, 74, 75, 76, 90, 99, 100):
        assert float(schedule(step)) == pytest.approx(formula(step, warmup), rel=1e-5, abs=1e-8), step


def test_a_decay_longer_than_what_warm_up_leaves_starts_at_the_peak():
    schedule = make_schedule(section(schedule="wsd", warmup_steps=60, decay_fraction=0.9), STEPS)
    assert [float(schedule(step)) for step in (30, 60, 80, 100)] == pytest.approx([0.25, 0.5, 0.275, 0.05])


@pytest.mark.parametrize(
    ("configured", "steps", "taken"),
    [(20, 5, 2), (20, 20, 10), (20, 21, 20), (60, 100, 60), (0, 5, 0), (2000, 1, 0), (2, 3, 2), (3, 3, 1)],
)
@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_the_warm_up_of_a_run_that_ends_before_it_takes_half_of_the_steps(configured, steps, taken, schedule):
    config = section(schedule=schedule, warmup_steps=configured)
    assert warmup_steps(config, steps) == taken
    rates = [float(make_schedule(config, steps)(step)) for step in range(steps)]
    assert np.argmax(rates) == taken
    assert rates[taken] == pytest.approx(PEAK)
    assert rates[:taken] == pytest.approx([PEAK * step / taken for step in range(taken)])


def plain_adamw(leaves, gradients, config, rates, decayed):
    """AdamW with clipping, in float64."""
    first, second = ({path: np.zeros_like(x) for path, x in leaves.items()} for _ in range(2))
    for step, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        norm = math.sqrt(sum(np.sum(g**2) for g in gradient.values()))
        scale = min(1, config.clip_norm / norm) if config.clip_norm else 1
        for path, g in gradient.items():
            first[path] = config.beta1 * first[path] + (1 - config.beta1) * scale * g
            second[path] = config.beta2 * second[path] + (1 - config.beta2) * (scale * g) ** 2
            mean, square = first[path] / (1 - config.beta1**step), second[path] / (1 - config.beta2**step)
            decay = config.weight_decay * leaves[path] * (path in decayed)
            leaves = {**leaves, path: leaves[path] - rate * (mean / (np.sqrt(square) + config.epsilon) + decay)}
    return leaves


@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
def test_updates_are_those_of_adamw(clip_norm):
    """With decay of matrices alone, and gradients of which some exceed the norm they are clipped to."""
    config = section(warmup_steps=2, weight_decay=0.1, clip_norm=clip_norm)
    rng = np.random.default_rng(0)
    shapes = {"embedding": (3, 2), "head": (2, 3), "final_norm/scale": (2,), "blocks/moe/expert/router/weight": (2,)}
    leaves = {path: rng.normal(size=shape) for path, shape in shapes.items()}
    gradients = [{p: size * rng.normal(size=s) for p, s in shapes.items()} for size in (3.0, 0.01, 1.0, 30.0)]
    schedule = make_schedule(config, STEPS)
    expected = plain_adamw(leaves, gradients, config, [cosine(step, 2) for step in range(4)], {"head"})

    optimizer = make_optimizer(config, schedule)
    update = jax.jit(optimizer.update)
    actual = jax.tree.map(np.float32, leaves)
    state = optimizer.init(actual)
    for gradient in gradients:
        updates, state = update(jax.tree.map(np.float32, gradient), state, actual)
        actual = optax.apply_updates(actual, updates)
    for path in shapes:
        np.testing.assert_allclose(actual[path], expected[path], rtol=1e-5, atol=1e-6)
