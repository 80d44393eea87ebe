"""Routers: the leaves that route tokens to an expert, and the logits computed from them.

Formula (FlexOlmo, arXiv 2507.07024, section 3; docs/method.md, "Formulas"): l_i = r_i . x - |b_i| for expert i. In a
model with a selector, its evidence is added, or takes the place of r_i . x (`selectors.SELECTIONS`).
The paper writes min(b_i, 0) for the bias, whose gradient vanishes for b_i > 0. -|b_i| equals it for every
b_i <= 0 and keeps its gradient on both sides; at exactly 0, where the anchor's bias stays, it has none.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from zlib import crc32

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import linen as nn

from flexolmo_jax.errors import ArgumentError
from flexolmo_jax.model.leaves import Leaf

if TYPE_CHECKING:
    from flexolmo_jax.model.architecture import Architecture

ROUTER_STDDEV = 0.002


class Router(abc.ABC):
    """Scores experts for a token, each by leaves of its own. To add one, subclass this and enter it in `ROUTERS`."""

    @abc.abstractmethod
    def leaves(self, architecture: Architecture) -> dict[str, Leaf]:
        """One expert's leaves of the router: vectors and scalars. Their paths end in `router/NAME`."""

    @abc.abstractmethod
    def logits(self, x_BxSxD: jax.Array, leaves: Mapping[str, jax.Array]) -> jax.Array:
        """Router logits, float32 [batch, length, experts].

        Args:
          x_BxSxD: float32, the residual stream after attention.
          leaves: {name: float32 [experts, *shape]}.
        """

    def bias(self, leaves: Mapping[str, jax.Array]) -> jax.Array:
        """The part of the logits that depends on no token, float32 [experts] or a scalar: by default 0.

        A selector's evidence is added to it where the router's weights play no part.
        """
        return jnp.zeros(())

    def new_expert(self, architecture: Architecture, options: Any, key: jax.Array) -> dict[str, np.ndarray]:
        """Leaves of an expert that an owner is about to train, {name: float32 [layers, *shape]}.

        By default each leaf has its own initializer.

        Args:
          architecture: of the anchor.
          options: the section `init` of the configuration.
          key: a key that differs between owners, who never talk: no two experts may start from the same leaves.
        """
        return {
            name: np.asarray(
                leaf.init(jax.random.fold_in(key, crc32(name.encode())), _layered(architecture, leaf), jnp.float32)
            )
            for name, leaf in self.leaves(architecture).items()
        }

    def untrained_expert(self, architecture: Architecture, options: Any) -> dict[str, np.ndarray]:
        """Leaves of an expert whose router leaves are not trained, where they are not to be the anchor's.

        Arguments and shapes are those of `new_expert`. By default there are none.
        """
        return {}


class LinearRouter(Router):
    """The logit of an expert is weight . x - |bias|."""

    def leaves(self, architecture: Architecture) -> dict[str, Leaf]:
        """`weight` [d_model] and the scalar `bias`."""
        return {
            "weight": Leaf(
                (architecture.d_model,),
                (None,),
                nn.initializers.truncated_normal(ROUTER_STDDEV),
                hugging_face="gate",
            ),
            "bias": Leaf((), (), nn.initializers.zeros),
        }

    def logits(self, x_BxSxD: jax.Array, leaves: Mapping[str, jax.Array]) -> jax.Array:
        """See the class; exact float32 on any device, since accelerators multiply in fewer bits by default."""
        logits = jnp.einsum("BSD,ED->BSE", x_BxSxD, leaves["weight"], precision=jax.lax.Precision.HIGHEST)
        return logits + self.bias(leaves)

    def bias(self, leaves: Mapping[str, jax.Array]) -> jax.Array:
        """-|bias|, with gradient 0 at 0, which jnp.abs does not have."""
        return -leaves["bias"] * jnp.sign(leaves["bias"])

    def new_expert(self, architecture: Architecture, options: Any, key: jax.Array) -> dict[str, np.ndarray]:
        """Weight and bias of a new expert.

        The weight is read from the file `options.router_weight_file`, or drawn from a truncated normal distribution
        of standard deviation `options.router_weight_stddev`. The bias is `options.router_bias` in every layer.

        Raises:
          ArgumentError: the file does not hold finite numbers of shape [d_model] or [layers, d_model].
        """
        shape = _layered(architecture, self.leaves(architecture)["weight"])
        if options.router_weight_file:
            weight = _read_weight(options.router_weight_file, shape)
        else:
            normal = jax.random.truncated_normal(key, -2, 2, shape)
            weight = np.asarray(options.router_weight_stddev * normal)
        return {"weight": weight, **self.untrained_expert(architecture, options)}

    def untrained_expert(self, architecture: Architecture, options: Any) -> dict[str, np.ndarray]:
        """The bias `options.router_bias` in every layer: with the anchor's weight, the anchor is preferred to it."""
        shape = _layered(architecture, self.leaves(architecture)["bias"])
        return {"bias": np.full(shape, options.router_bias, np.float32)}


def _layered(architecture: Architecture, leaf: Leaf) -> tuple[int, ...]:
    return (architecture.num_layers, *leaf.shape)


def _read_weight(path: str, shape: tuple[int, ...]) -> np.ndarray:
    """Reads a .npy file of that shape, or of one without the axis of layers."""
    argument, file = "config.init.router_weight_file", epath.Path(path)
    if not file.exists():
        raise ArgumentError(argument, file, f"no such file; give a .npy of shape [{shape[1]}] or {list(shape)}")
    with file.open("rb") as stream:
        try:
            weight = np.load(stream, allow_pickle=False)
        except ValueError:
            raise ArgumentError(argument, file, "not a .npy file; write one with numpy.save") from None
    if weight.shape not in (shape, shape[1:]) or not np.isfinite(weight).all():
        problem = f"shape {list(weight.shape)}; must be finite, of shape [{shape[1]}] or {list(shape)}"
        raise ArgumentError(argument, file, problem)
    return np.broadcast_to(weight, shape).astype(np.float32)


ROUTERS: dict[str, Router] = {"linear": LinearRouter()}
