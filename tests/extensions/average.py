"""A method of combining: the mean of all experts, in one dense model."""

import numpy as np

from flexolmo_jax.checkpoint.manifests import ANCHOR_NAME, ExpertRecord
from flexolmo_jax.checkpoint.params import Slice
from flexolmo_jax.combine.methods import Inputs, Method, Outputs


class Mean:
    """The mean of leaves of one shape, read a range at a time."""

    def __init__(self, parts):
        self.shape, self.dtype, self._parts = parts[0].shape, parts[0].dtype, parts

    def __getitem__(self, index):
        return np.mean([part.read(index).astype(np.float32) for part in self._parts], axis=0).astype(self.dtype)


def average(inputs: Inputs) -> Outputs:
    """Averages every leaf of the members; the model has one expert, which is none of theirs."""
    records = [member.expert for member in inputs.members]
    leaves = {
        leaf: Slice(Mean([member.leaves[leaf] for member in inputs.members]), None, f"the mean of {leaf}")
        for leaf in inputs.members[0].leaves
    }
    expert = ExpertRecord(name=ANCHOR_NAME, leaves={}, card={"description": "a mean of experts"})
    manifest = inputs.manifest.but(method=AVERAGE.name, experts=[expert], combined=records, top_k=1)
    return Outputs(manifest, inputs.shared, {ANCHOR_NAME: leaves})


AVERAGE = Method("average", average, keeps_experts=False)
