"""Kinds of experts: the leaves of an expert, and what it computes from a token.

A kind is written once, in terms of a matmul by a named leaf. `moe` and `dispatch` supply the matmul: a plain one for
an expert that sees all tokens, a batched one for all experts at once, and a grouped one for tokens sorted by expert.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax

from flexolmo_jax.model.leaves import Leaf

if TYPE_CHECKING:
    from flexolmo_jax.model.architecture import Architecture

Matmul = Callable[[jax.Array, str], jax.Array]
"""(x [..., in], name of a leaf [in, out]) -> x @ leaf [..., out]."""


class ExpertKind(abc.ABC):
    """A feed-forward network from d_model to d_model. To add one, subclass this and enter it in `EXPERT_KINDS`.

    Under a mesh a device has a shard of the leaves' "mlp" axis, and outputs are summed over devices: from where a
    matmul contracts that axis, everything must be linear.

    Attributes:
      has_cpu_loop: whether `kernels.expert_loop`, written by hand for CPUs, computes this kind; if not, `dispatch`
        takes grouped matmuls in its place.
    """

    has_cpu_loop = False

    @abc.abstractmethod
    def leaves(self, architecture: Architecture) -> dict[str, Leaf]:
        """The leaves of one expert, all of them matrices, each after its `inputs`."""

    @abc.abstractmethod
    def apply(self, matmul: Matmul, x: jax.Array) -> jax.Array:
        """The output [..., d_model] of the expert for x [..., d_model]; all uses of leaves go through `matmul`."""


class SwiGLU(ExpertKind):
    """down(silu(gate(x)) * up(x)) (arXiv 2002.05202, section 2)."""

    has_cpu_loop = True

    def leaves(self, architecture: Architecture) -> dict[str, Leaf]:
        """`gate` and `up` [d_model, d_ff], `down` [d_ff, d_model]."""
        d_model, d_ff = architecture.d_model, architecture.d_ff
        return {
            "gate": Leaf((d_model, d_ff), ("expert_embed", "mlp"), hugging_face="gate_proj"),
            "up": Leaf((d_model, d_ff), ("expert_embed", "mlp"), hugging_face="up_proj"),
            "down": Leaf((d_ff, d_model), ("mlp", "expert_embed"), inputs=("gate", "up"), hugging_face="down_proj"),
        }

    def apply(self, matmul: Matmul, x: jax.Array) -> jax.Array:
        """See the class."""
        gate, up = matmul(x, "gate"), matmul(x, "up")
        return matmul(swiglu(gate, up), "down")


def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """The hidden units silu(gate) * up."""
    return jax.nn.silu(gate) * up


EXPERT_KINDS: dict[str, ExpertKind] = {"swiglu": SwiGLU()}
