"""The interface of a method: what makes one model of an anchor and members (`combine.merge.METHODS`)."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from flexolmo_jax.checkpoint.casts import Experts
from flexolmo_jax.checkpoint.manifests import ModelManifest
from flexolmo_jax.checkpoint.params import Slice
from flexolmo_jax.combine.contribution import Member


class Inputs(NamedTuple):
    """What a method combines.

    Attributes:
      manifest: of the anchor.
      shared: {path: slice} of the leaves that all experts share.
      members: the anchor's own expert first, then the contributions by name; they have leaves of the same names,
        shapes and dtypes, and each leaf is checked when it is read whole.
      top_k: how many experts are to compute each token.
      selection: what is to choose them (`model.selectors.SELECTIONS`).
    """

    manifest: ModelManifest
    shared: dict[str, Slice]
    members: Sequence[Member]
    top_k: int
    selection: str


class Outputs(NamedTuple):
    """What a method makes.

    Attributes:
      manifest: of the model; a leaf of `experts` that it has no digest for gets one when it is written.
      shared: {path: slice}.
      experts: {expert: {leaf: slice}} in the order of the manifest's roster.
    """

    manifest: ModelManifest
    shared: dict[str, Slice]
    experts: Experts


class Method(NamedTuple):
    """A way to combine experts.

    Attributes:
      name: recorded in the manifest.
      combine: makes the outputs of the inputs, without reading a leaf whole.
      keeps_experts: whether every member's leaves are in the model as they were. Then they are checked as they are
        written, and a member can leave the model exactly. Otherwise they are read and checked before, and to leave
        takes combining the others again.
    """

    name: str
    combine: Callable[[Inputs], Outputs]
    keeps_experts: bool
