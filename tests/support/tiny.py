"""Tiny models with random leaves, for tests that need no particular weights."""

import jax
import numpy as np

from flexolmo_jax.model.architecture import ANCHOR, PAIR, SOLO, Architecture, Layout

ARCHITECTURE = Architecture(
    vocab_size=64, num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, d_ff=24, rope_theta=1e4, norm_eps=1e-6
)
STACKED = Layout("stacked", 4, 2)
LAYOUTS = {"anchor": ANCHOR, "solo": SOLO, "pair": PAIR, "stacked": STACKED}
# Halves the time to compile; for tests that compile big programs and run them on little data.
COMPILE_FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def random_leaves(model, seed=0):
    """Normal leaves {path: float32}, large enough that routing is uneven and no norm's epsilon matters."""
    rng = np.random.default_rng(seed)
    leaves = {path: rng.normal(0, 0.3, leaf.shape).astype(np.float32) for path, leaf in model.abstract().items()}
    return {path: leaf + np.float32(path.endswith("scale")) for path, leaf in leaves.items()}


def expert_leaves(leaves, name):
    """The leaves of one set, {leaf: array}."""
    prefix = f"blocks/moe/{name}/"
    return {path.removeprefix(prefix): leaf for path, leaf in leaves.items() if path.startswith(prefix)}


def with_experts(leaves, **sets):
    """The same leaves with other sets of experts: {name: {leaf: array}}."""
    shared = {path: leaf for path, leaf in leaves.items() if not path.startswith("blocks/moe/")}
    return shared | {f"blocks/moe/{name}/{leaf}": x for name, experts in sets.items() for leaf, x in experts.items()}


def stack(*experts):
    """Sets of one expert each, as the one set of a stacked model."""
    return {leaf: np.stack([expert[leaf] for expert in experts], axis=1) for leaf in experts[0]}


def random_batch(lengths, width, seed=0, vocab_size=ARCHITECTURE.vocab_size):
    """A batch with one sequence for each list of document lengths; what they leave of the width is padding."""
    rng = np.random.default_rng(seed)
    segment_ids, positions = np.zeros((2, len(lengths), width), np.int32)
    for i, documents in enumerate(lengths):
        start = 0
        for number, length in enumerate(documents, start=1):
            segment_ids[i, start : start + length] = number
            positions[i, start : start + length] = np.arange(length)
            start += length
    tokens, targets = rng.integers(0, vocab_size, (2, len(lengths), width), dtype=np.int32)
    return {"tokens": tokens, "targets": targets, "segment_ids": segment_ids, "positions": positions}


def assert_trees_close(actual, expected, tolerance):
    """Every leaf within `tolerance` of the other's, relative to its norm."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, x), y in zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        error = np.linalg.norm(x - y)
        assert error <= tolerance * np.linalg.norm(y), (jax.tree_util.keystr(path), error, np.linalg.norm(y))
