"""What is advised in one situation after the other; and that it can be followed."""

import math

import pytest

from flexolmo_jax.model.architecture import ANCHOR, PAIR, Layout
from flexolmo_jax.model.decoder import REMAT_POLICIES
from flexolmo_jax.planning.advice import advice
from flexolmo_jax.planning.memory import Memory
from flexolmo_jax.planning.roofline import Roofline
from flexolmo_jax.sharding import MESH_AXES
from tests.support import planned

GIB = 2**30
EIGHT = Layout("stacked", 8, 4)


def advise(
    state=1.0,
    temporaries=1.0,
    bound="arithmetic",
    mesh=None,
    slices=1,
    layout=PAIR,
    batch=64,
    frozen=0.0,
    optimizer=0.0,
    kept=(0.0, 0.0, 0.0, 0.0, 0.0),
    **compute,
):
    """Advice where 10 GiB are available; amounts in GiB, `kept` from "none" on."""
    accumulate = compute.pop("accumulate", 1)
    config = planned.config(values={"data.batch_size": batch, "data.grad_accum_steps": accumulate})
    config.compute.update({"remat": "dots", "frozen_dtype": "bfloat16"} | compute)
    mesh = dict.fromkeys(MESH_AXES, 1) | (mesh or {"fsdp": 8})
    parts = [round(GIB * size) for size in (state - frozen - optimizer, frozen, optimizer, 0, temporaries)]
    memory = Memory(*parts, peak=sum(parts), available=10 * GIB)
    seconds = [3.0 if name == bound else 1.0 for name in ("arithmetic", "HBM", "interconnect")]
    line = Roofline(1.0, 1.0, 0.0, 1.0, 1.0, *seconds) if memory.fits else None
    kept = {policy: round(GIB * size) for policy, size in zip(REMAT_POLICIES, kept, strict=True)}
    return config, mesh, advice(config, mesh, slices, layout, memory, kept, line)


@pytest.mark.parametrize(
    ("situation", "sentence"),
    [
        # A device has 8 rows of the part, 9 GiB to fill, and 1 of weights. In two parts there is 1 GiB of gradients,
        # and half of the other 14.
        (dict(temporaries=15), "16.00 of 10.00 GiB; try --config.data.grad_accum_steps=2"),
        (dict(temporaries=9), "10.00 of 10.00 GiB"),
        # Without attention's and the feed-forward's 6 GiB there are 1 + 1 + 5.
        (
            dict(temporaries=12, kept=(9, 6, 6, 0, 0)),
            "13.00 of 10.00 GiB; try --config.data.grad_accum_steps=2 or --config.compute.remat=kernels",
        ),
        # An eighth of 59 GiB is too much beside 1 + 1; of those that kernels do not keep, 11, the half fits.
        (
            dict(temporaries=60, kept=(48, 48, 48, 0, 0)),
            "61.00 of 10.00 GiB; try --config.data.grad_accum_steps=2 --config.compute.remat=kernels",
        ),
        # One row already: keep less.
        (
            dict(temporaries=12, accumulate=8, remat="feed_forward", kept=(9, 9, 9, 2, 1)),
            "13.00 of 10.00 GiB; try --config.compute.remat=kernels",
        ),
        # Nothing to keep less of: split what computes a row.
        (
            dict(temporaries=12, accumulate=8, remat="full"),
            "13.00 of 10.00 GiB; try --config.mesh.fsdp=4 --config.mesh.tensor=2",
        ),
        (
            dict(temporaries=100, remat="kernels"),
            "101.00 of 10.00 GiB; try --config.data.grad_accum_steps=8 --config.compute.remat=full "
            "--config.mesh.fsdp=4 --config.mesh.tensor=2",
        ),
        (
            dict(temporaries=12, batch=1, mesh={"tensor": 8}, remat="full"),
            "13.00 of 10.00 GiB; try more devices",
        ),
        # Copies of the parameters are split first.
        (
            dict(state=9, temporaries=3, mesh={"data": 4, "fsdp": 2}, remat="full", batch=8),
            "12.00 of 10.00 GiB; try --config.mesh.data=1 --config.mesh.fsdp=8",
        ),
        # But those of slices stay apart.
        (
            dict(state=9, temporaries=3, mesh={"data": 4, "fsdp": 2}, slices=2, remat="full", batch=8),
            "12.00 of 10.00 GiB; try --config.mesh.data=2 --config.mesh.fsdp=4",
        ),
        (
            dict(state=9, temporaries=3, mesh={"data": 2, "fsdp": 4}, slices=2),
            "12.00 of 10.00 GiB; try 16 devices",
        ),
        (dict(state=30, temporaries=3), "33.00 of 10.00 GiB; try 64 devices"),
        (
            dict(state=30, temporaries=3, frozen=20, frozen_dtype="float32"),
            "33.00 of 10.00 GiB; try --config.compute.frozen_dtype=bfloat16 or 64 devices",
        ),
    ],
)
def test_what_does_not_fit_is_told_how_it_might(situation, sentence):
    said = advise(**situation)[-1]
    assert said[0] == ("fits: " if len(said) > 1 else "does not fit: ") + sentence


@pytest.mark.parametrize(
    ("situation", "sentences"),
    [
        (dict(), ["bound by arithmetic"]),
        (dict(remat="full"), ["bound by arithmetic", "may be faster with --config.compute.remat=dots"]),
        (
            dict(remat="full", kept=(20, 9, 6, 6, 0)),  # no room for all
            ["bound by arithmetic", "may be faster with --config.compute.remat=feed_forward"],
        ),
        (dict(remat="full", kept=(20, 9, 8, 8, 0)), ["bound by arithmetic"]),
        (dict(bound="HBM"), ["bound by HBM"]),
        (dict(bound="HBM", accumulate=4), ["bound by HBM", "may be faster with --config.data.grad_accum_steps=2"]),
        (dict(bound="HBM", accumulate=4, temporaries=6), ["bound by HBM"]),  # 1 + 1 + twice 5
        (
            dict(bound="interconnect", mesh={"fsdp": 2, "tensor": 4}),
            ["bound by interconnect", "may be faster with --config.mesh.tensor=2 --config.mesh.fsdp=4"],
        ),
        # A part has one row for each device that shares the batch: there are none for more.
        (dict(bound="interconnect", mesh={"fsdp": 2, "tensor": 4}, batch=2), ["bound by interconnect"]),
        (
            dict(bound="interconnect", mesh={"data": 2, "fsdp": 12}, layout=EIGHT),
            ["bound by interconnect", "may be faster with --config.mesh.expert=4 --config.mesh.fsdp=3"],
        ),
        (dict(bound="interconnect", layout=PAIR), ["bound by interconnect"]),
        (dict(bound="interconnect", layout=ANCHOR), ["bound by interconnect"]),
        (dict(bound="interconnect", layout=EIGHT, mesh={"expert": 8}), ["bound by interconnect"]),
    ],
)
def test_what_fits_is_told_its_bound_and_what_relieves_it(situation, sentences):
    _, _, (fits, *others) = advise(**situation)
    assert fits.startswith("fits: ")
    assert fits.endswith(" of 10.00 GiB")
    assert others == sentences


@pytest.mark.parametrize("layout", [PAIR, EIGHT], ids=lambda layout: layout.kind)
@pytest.mark.parametrize("accumulate", [1, 3, 6])
@pytest.mark.parametrize(
    "mesh", [{"data": 4, "fsdp": 2}, {"fsdp": 4, "tensor": 2}, {"fsdp": 8}, {"data": 2, "tensor": 6}]
)
@pytest.mark.parametrize(("temporaries", "bound"), [(12.0, ""), (70.0, ""), (2.0, "HBM"), (2.0, "interconnect")])
def test_changes_can_be_made(layout, accumulate, mesh, temporaries, bound):
    """Flags of the configuration, after which rows still divide over devices, of which there are as many."""
    situation = dict(layout=layout, accumulate=accumulate, mesh=mesh, temporaries=temporaries, bound=bound, batch=144)
    config, mesh, sentences = advise(**situation)
    for change in sentences[-1].replace(" with ", "; try ").partition("; try ")[2].split(" or "):
        changed, sizes = config.copy_and_resolve_references(), dict(mesh)
        for flag in change.split():
            key, _, value = flag.removeprefix("--config.").partition("=")
            section, _, name = key.partition(".")
            changed[section][name] = type(changed[section][name])(value)
            if section == "mesh":
                sizes[name] = int(value)
        assert math.prod(sizes.values()) == math.prod(mesh.values()), change
        assert changed.data.batch_size % changed.data.grad_accum_steps == 0, change
        rows = changed.data.batch_size // changed.data.grad_accum_steps
        assert rows % (sizes["data"] * sizes["fsdp"] * sizes["expert"]) == 0, change
        assert layout.kind != "stacked" or layout.num_experts % sizes["expert"] == 0, change
