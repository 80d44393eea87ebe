"""What determines the shapes and the numerics of a model."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from flexolmo_jax.checkpoint.manifests import BY_ROUTER
from flexolmo_jax.errors import UserError
from flexolmo_jax.model.experts import EXPERT_KINDS
from flexolmo_jax.model.routers import ROUTERS


@dataclasses.dataclass(frozen=True)
class Architecture:
    """An OLMo-2 decoder (docs/method.md, "Numerics of the architecture"). Sizes count elements.

    Attributes:
      tied_embeddings: the head is the embedding, transposed, and has no leaf of its own.
      norm_topk_prob: the weights of a token's top-k experts are divided by their sum.
      expert: the kind of expert, a key of `experts.EXPERT_KINDS`.
      router: a key of `routers.ROUTERS`.
    """

    vocab_size: int
    num_layers: int
    d_model: int
    num_heads: int
    num_kv_heads: int
    d_ff: int
    rope_theta: float
    norm_eps: float
    tied_embeddings: bool = False
    norm_topk_prob: bool = False
    expert: str = "swiglu"
    router: str = "linear"

    def __post_init__(self):
        """Raises UserError where a value is unknown or sizes do not fit together."""
        for field, known in (("expert", EXPERT_KINDS), ("router", ROUTERS)):
            value = getattr(self, field)
            if value not in known:
                raise UserError(f"architecture: {field} is {value!r}; it must be one of {', '.join(known)}")
        for field in dataclasses.fields(self):
            if field.type in (int, float) and not getattr(self, field.name) > 0:
                raise UserError(f"architecture: {field.name} is {getattr(self, field.name)}; it must be positive")
        if self.d_model % self.num_heads or self.num_heads % self.num_kv_heads:
            raise UserError(
                f"architecture: num_heads {self.num_heads} must divide d_model {self.d_model} "
                f"and be a multiple of num_kv_heads {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise UserError(f"architecture: head size {self.head_dim} is odd; rotary embedding needs an even one")

    @property
    def head_dim(self) -> int:
        return self.d_model // self.num_heads

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str) -> "Architecture":
        """Reads the result of `dataclasses.asdict`, in which defaults may be missing; `source` names the file."""
        names = {field.name for field in dataclasses.fields(cls)}
        required = {field.name for field in dataclasses.fields(cls) if field.default is dataclasses.MISSING}
        if not required <= set(values) <= names:
            mismatched = sorted(set(values) - names | required - set(values))
            raise UserError(
                f"{source}: architecture has missing or unknown keys {mismatched}; expected {sorted(names)}"
            )
        return cls(**values)


@dataclasses.dataclass(frozen=True)
class Layout:
    """The layout of the experts' leaves in the parameters, and how stacked experts are chosen.

    `anchor`: one set of leaves, `blocks/moe/anchor/*`. `solo`: one set, `expert`. `pair`: both of these.
    `stacked`: one set, `blocks/moe/experts/*`, with an expert axis after the layer axis, anchor first.

    Attributes:
      kind: "anchor", "solo", "pair" or "stacked".
      num_experts: number of experts, the anchor included.
      top_k: number of experts that compute a token when stacked; the other layouts compute all.
      selection: one of `selectors.SELECTIONS`.
    """

    kind: str
    num_experts: int
    top_k: int
    selection: str = BY_ROUTER

    @property
    def sets(self) -> tuple[str, ...]:
        """The names of the sets of leaves, in the order of the router's logits."""
        expert = {"solo": ("expert",), "pair": ("anchor", "expert")}
        return {"anchor": ("anchor",), **expert, "stacked": ("experts",)}[self.kind]

    @classmethod
    def of_roster(cls, num_experts: int, top_k: int, selection: str = BY_ROUTER) -> "Layout":
        """The layout of a model directory with that many experts."""
        if num_experts == 1:
            return ANCHOR
        return cls("stacked", num_experts, min(top_k, num_experts), selection)


ANCHOR = Layout("anchor", 1, 1)
SOLO = Layout("solo", 1, 1)
PAIR = Layout("pair", 2, 2)
EXPERT_LAYOUTS = {layout.kind: layout for layout in (SOLO, PAIR)}
