"""The method "stack": experts side by side, and what chooses between them (FlexOlmo, arXiv 2507.07024, section 3)."""

import numpy as np

from flexolmo_jax.checkpoint import manifests
from flexolmo_jax.checkpoint.params import Slice
from flexolmo_jax.combine.methods import Inputs, Method, Outputs
from flexolmo_jax.model.selectors import LOG_SCALE


def stack(inputs: Inputs) -> Outputs:
    """Stacks the feed-forwards and router weights of the members, without training."""
    records = [member.expert for member in inputs.members]
    selection = inputs.selection if len(records) > 1 else manifests.BY_ROUTER
    manifest = inputs.manifest.but(method=manifests.STACK, experts=records, top_k=inputs.top_k, selection=selection)
    shared = inputs.shared | selector_leaves(selection)
    return Outputs(manifest, shared, {member.expert.name: member.leaves for member in inputs.members})


def selector_leaves(selection: str) -> dict[str, Slice]:
    """The leaves of a selector as a merge makes them, {path: slice}; none where the router chooses."""
    if selection == manifests.BY_ROUTER:
        return {}
    return {LOG_SCALE: Slice(np.zeros((), np.float32), None, f"the leaf {LOG_SCALE}")}


STACK = Method(manifests.STACK, stack, keeps_experts=True)
