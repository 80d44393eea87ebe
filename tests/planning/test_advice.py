"""Advice in one situation after the other; and that it can be followed."""

import math

import pytest

from flexolmo_jax.planning.advice import advice
from flexolmo_jax.planning.compilation import Memory
from flexolmo_jax.sharding import MESH_AXES
from tests.support import planned

GIB = 2**30


def advise(
    state=1.0,
    temporaries=1.0,
    bound="arithmetic",
    mesh=None,
    batch=64,
    frozen=0.0,
    accumulate=1,
    **compute,
):
    """Advice with 10 GiB available; amounts in GiB."""
    config = planned.config(values={"data.batch_size": batch, "data.grad_accum_steps": accumulate})
    config.compute.update({"remat": "dots", "frozen_dtype": "bfloat16"} | compute)
    mesh = dict.fromkeys(MESH_AXES, 1) | (mesh or {"fsdp": 8})
    sizes = [round(GIB * size) for size in (state - frozen, frozen, 0, 0, temporaries)]
    memory = Memory(*sizes, peak=sum(sizes), available=10 * GIB)
    return config, mesh, advice(config, mesh, memory, bound)


@pytest.mark.parametrize(
    ("situation", "sentence"),
    [
        # A device has 8 sequences, 9 GiB to fill, and 1 of weights. Of two micro-batches there is 1 GiB of gradients,
        # and half of the other 14.
        (
            dict(temporaries=15),
            "16.00 of 10.00 GiB; try config.data.grad_accum_steps=2 or config.compute.remat=feed_forward",
        ),
        (dict(temporaries=30, remat="full"), "31.00 of 10.00 GiB; try config.data.grad_accum_steps=8"),
        # An eighth of 79 GiB is too much.
        (
            dict(temporaries=80),
            "81.00 of 10.00 GiB; try config.data.grad_accum_steps=8 config.compute.remat=feed_forward",
        ),
        # One sequence already.
        (
            dict(temporaries=12, accumulate=8, remat="feed_forward"),
            "13.00 of 10.00 GiB; try config.compute.remat=kernels",
        ),
        # Nothing else to recompute.
        (dict(temporaries=12, accumulate=8, remat="full"), "13.00 of 10.00 GiB; try more devices"),
        # Replicas of the parameters are split first.
        (
            dict(state=9, temporaries=3, mesh={"data": 4, "fsdp": 2}, remat="full", batch=8),
            "12.00 of 10.00 GiB; try config.mesh.data=1 config.mesh.fsdp=8",
        ),
        (dict(state=9, temporaries=3), "12.00 of 10.00 GiB; try 16 devices"),
        (dict(state=30, temporaries=3), "33.00 of 10.00 GiB; try 64 devices"),
        (
            dict(state=30, temporaries=3, frozen=20, frozen_dtype="float32"),
            "33.00 of 10.00 GiB; try config.compute.frozen_dtype=bfloat16 or 64 devices",
        ),
    ],
)
def test_a_step_that_does_not_fit_comes_with_changes_to_try(situation, sentence):
    _, _, sentences = advise(**situation)
    assert sentences == ["does not fit: " + sentence]


@pytest.mark.parametrize("bound", ["arithmetic", "HBM", "interconnect"])
def test_a_step_that_fits_comes_with_its_bound(bound):
    assert advise(bound=bound)[-1] == ["fits: 2.00 of 10.00 GiB", f"bound by {bound}"]


@pytest.mark.parametrize("accumulate", [1, 6])
@pytest.mark.parametrize("mesh", [{"data": 4, "fsdp": 2}, {"fsdp": 4, "tensor": 2}, {"fsdp": 8}])
@pytest.mark.parametrize(("temporaries", "bound"), [(12.0, ""), (70.0, ""), (2.0, "HBM"), (2.0, "interconnect")])
def test_changes_can_be_made(accumulate, mesh, temporaries, bound):
    """Keys of the configuration, after which sequences still divide over devices, of which there are as many."""
    situation = dict(accumulate=accumulate, mesh=mesh, temporaries=temporaries, bound=bound, batch=144)
    config, mesh, sentences = advise(**situation)
    for change in sentences[-1].replace(" with ", "; try ").partition("; try ")[2].split(" or "):
        changed, sizes = config.copy_and_resolve_references(), dict(mesh)
        for assignment in change.split():
            key, _, value = assignment.removeprefix("config.").partition("=")
            section, _, name = key.partition(".")
            changed[section][name] = type(changed[section][name])(value)
            if section == "mesh":
                sizes[name] = int(value)
        assert math.prod(sizes.values()) == math.prod(mesh.values()), change
        assert changed.data.batch_size % changed.data.grad_accum_steps == 0, change
        sequences = changed.data.batch_size // changed.data.grad_accum_steps
        assert sequences % (sizes["data"] * sizes["fsdp"] * sizes["expert"]) == 0, change
