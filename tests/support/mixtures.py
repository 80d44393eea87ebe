"""Experts with random kernels and routing, and their sum in plain loops."""

import jax
import jax.numpy as jnp
import numpy as np

BATCH, LENGTH, D_MODEL, D_FF, EXPERTS = 2, 7, 8, 12, 4


def random_mixture(seed=0, experts=EXPERTS):
    """(x, experts' kernels, weights), float64."""
    rng = np.random.default_rng(seed)
    kernels = {
        "gate": rng.normal(size=(experts, D_MODEL, D_FF)),
        "up": rng.normal(size=(experts, D_MODEL, D_FF)),
        "down": rng.normal(size=(experts, D_FF, D_MODEL)),
    }
    scores = np.exp(rng.normal(size=(BATCH, LENGTH, experts)))
    return rng.normal(size=(BATCH, LENGTH, D_MODEL)), kernels, scores / scores.sum(-1, keepdims=True)


def to_float32(tree):
    return jax.tree.map(np.float32, tree)


def plain_sum(x, kernels, weights, top_k):
    """The k heaviest experts of every token, one after another."""
    y = np.zeros_like(x)
    for at in np.ndindex(x.shape[:2]):
        for e in np.argsort(-weights[at])[:top_k]:
            gate, up = x[at] @ kernels["gate"][e], x[at] @ kernels["up"][e]
            y[at] += weights[at][e] * (gate / (1 + np.exp(-gate)) * up) @ kernels["down"][e]
    return y


def masked_sum(x, kernels, weights, top_k):
    """Every expert for every token; those that are not among a token's top k weigh nothing."""
    threshold = jax.lax.stop_gradient(jnp.sort(weights, axis=-1)[..., -top_k, None])
    hidden = jax.nn.silu(jnp.einsum("bsd,edf->bsef", x, kernels["gate"])) * jnp.einsum(
        "bsd,edf->bsef", x, kernels["up"]
    )
    return jnp.einsum("bsef,efd,bse->bsd", hidden, kernels["down"], jnp.where(weights >= threshold, weights, 0))
