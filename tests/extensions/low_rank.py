"""A kind of expert whose matrices are factored into two narrow ones, which stay narrow in merged models."""

from flexolmo_jax.model.experts import ExpertKind, swiglu
from flexolmo_jax.model.leaves import Leaf

RANK = 4


class LowRank(ExpertKind):
    """SwiGLU in which every matrix [in, out] is one [in, RANK] times one [RANK, out]."""

    def leaves(self, architecture):
        """`NAME_in` and `NAME_out` for gate, up and down."""
        d_model, d_ff = architecture.d_model, architecture.d_ff
        hidden = ("gate_out", "up_out")
        return {
            "gate_in": Leaf((d_model, RANK), ("expert_embed", None)),
            "gate_out": Leaf((RANK, d_ff), (None, "mlp"), inputs=("gate_in",)),
            "up_in": Leaf((d_model, RANK), ("expert_embed", None)),
            "up_out": Leaf((RANK, d_ff), (None, "mlp"), inputs=("up_in",)),
            "down_in": Leaf((d_ff, RANK), ("mlp", None), inputs=hidden),
            "down_out": Leaf((RANK, d_model), (None, "expert_embed"), inputs=("down_in",)),
        }

    def apply(self, matmul, x):
        """See the class."""
        gate, up = (matmul(matmul(x, f"{name}_in"), f"{name}_out") for name in ("gate", "up"))
        return matmul(matmul(swiglu(gate, up), "down_in"), "down_out")
