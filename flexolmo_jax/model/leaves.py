"""The declaration of a leaf: its shape, logical axes and initializer in one place."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import cast

import jax
import jax.numpy as jnp
from flax import linen as nn

INIT_STDDEV = 0.02
# Truncated at two standard deviations and symmetric about 0.
DEFAULT_INIT = nn.initializers.truncated_normal(INIT_STDDEV)


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A leaf of one expert in one layer: the axes of layers and of experts are not in its shape.

    Attributes:
      shape: sizes of its dimensions. A leaf of an expert is a matrix [in, out]. A leaf of a router is a vector, which
        is a matrix when stacked over experts, or a scalar.
      axes: a logical axis (`sharding.Rules`) for each dimension; None: not sharded.
      init: its initializer in fresh weights.
      inputs: names of the leaves whose outputs, combined elementwise, this leaf multiplies; (): the input of the block.
      hugging_face: name of the tensor in a Hugging Face model, such as "gate_proj"; None: it has no such tensor.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: nn.initializers.Initializer = DEFAULT_INIT
    inputs: tuple[str, ...] = ()
    hugging_face: str | None = None


def parameter(
    module: nn.Module,
    name: str,
    shape: Sequence[int],
    axes: Sequence[str | None],
    init: nn.initializers.Initializer = DEFAULT_INIT,
) -> jax.Array:
    """Declares a float32 parameter of a Flax module; arguments as in `Leaf`."""
    boxed_init = nn.with_logical_partitioning(init, tuple(axes))
    return cast(jax.Array, module.param(name, boxed_init, tuple(shape), jnp.float32))


def parameters(module: nn.Module, leaves: Mapping[str, Leaf], stack: tuple[int, ...] = ()) -> dict[str, jax.Array]:
    """Declares leaves as parameters of a Flax module; `stack` is (number of experts,), or () for one expert."""
    stack_axes = ("experts",) * len(stack)
    return {
        name: parameter(module, name, (*stack, *leaf.shape), (*stack_axes, *leaf.axes), leaf.init)
        for name, leaf in leaves.items()
    }
