"""The method "stack": experts side by side, and a router over them (FlexOlmo, arXiv 2507.07024, section 3)."""

from flexolmo_jax.checkpoint import manifests
from flexolmo_jax.combine.methods import Inputs, Method, Outputs


def stack(inputs: Inputs) -> Outputs:
    """Stacks the feed-forwards and router weights of the members, without training."""
    records = [member.expert for member in inputs.members]
    manifest = inputs.manifest.but(method=manifests.STACK, experts=records, top_k=inputs.top_k)
    return Outputs(manifest, inputs.shared, {member.expert.name: member.leaves for member in inputs.members})


STACK = Method(manifests.STACK, stack, keeps_experts=True)
