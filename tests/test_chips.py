"""The table of chips against published numbers of whole pods and chips, and names of slices."""

from types import SimpleNamespace

import pytest

from flexolmo_jax.chips import CHIPS, group_bandwidth, parse_topology, wraps
from flexolmo_jax.errors import UserError

# Of Google Cloud's pages: chips of a pod and its peak PFLOP/s; both directions of all links of a chip, in GB/s.
# Of NVIDIA's the same of a node.
PUBLISHED = {
    "v4": (4096, 1126.4, None),
    "v5e": (256, 50.4, 400),
    "v5p": (8960, 4112.6, 1200),
    "v6e": (256, 234.9, 800),
    "tpu7x": (9216, 21260, 1200),
    "h100": (8, 15.83 / 2, 900),  # half of what is published for sparse matrices
    "h200": (8, 15.83 / 2, 900),
}


@pytest.mark.parametrize("name", CHIPS)
def test_chips_add_up_to_published_pods(name):
    chips, pflops, links = PUBLISHED[name]
    chip = CHIPS[name]
    assert chip.peak_flops * chip.devices_per_chip * chips == pytest.approx(pflops * 1e15, rel=0.01)
    if chip.is_gpu:
        assert 2 * chip.link_bandwidth == links * 1e9
    elif links:  # the book puts a link at 9 tenths of it
        directions = 2 * 2 * chip.torus_dimensions
        assert chip.link_bandwidth * chip.devices_per_chip * directions == pytest.approx(0.9 * links * 1e9)


def test_a_topology_names_a_chip_and_a_shape():
    assert parse_topology("v5e:2x4") == (CHIPS["v5e"], (2, 4))
    assert parse_topology("tpu7x:2x2x1") == (CHIPS["tpu7x"], (2, 2, 1))
    assert parse_topology("h200:8") == (CHIPS["h200"], (8,))


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("v5e", "not a chip and the shape of its slice"),
        ("v5e-8", "not a chip and the shape of its slice"),
        ("v5e:2x", "not a chip and the shape of its slice"),
        ("v5p:4x4x8_twisted", "not a chip and the shape of its slice"),
        ("v9:2x2", "no chip v9 is known; use one of v4, v5e, v5p"),
        ("v5p:2x4", "a slice of v5p has 3 sizes above 0, as in v5p:2x2x4"),
        ("v6e:2x4x4", "a slice of v6e has 2 sizes above 0, as in v6e:4x4"),
        ("v6e:0x4", "2 sizes above 0"),
        ("v6e:8", "2 sizes above 0"),
        ("h200", "not a chip and the shape of its slice"),
        ("h200:0", "a node has 1 to 8 GPUs, as in h200:8"),
        ("h200:16", "a node has 1 to 8 GPUs, as in h200:8"),
        ("h100:2x4", "a node has 1 to 8 GPUs, as in h100:8"),
    ],
)
def test_other_topologies_are_refused_in_one_line(name, why):
    with pytest.raises(UserError) as error:
        parse_topology(name)
    assert str(error.value).startswith(f"topology={name}: ")
    assert why in str(error.value)
    assert "\n" not in str(error.value)


def test_only_full_dimensions_wrap_around():
    assert wraps(CHIPS["v5e"], (8, 16)) == (False, True)
    assert wraps(CHIPS["v6e"], (4, 8)) == (False, False)
    assert wraps(CHIPS["v5p"], (2, 4, 4)) == (False, False, False)
    assert wraps(CHIPS["v5p"], (4, 4, 8)) == (True, True, True)


def devices(*coords):
    return [SimpleNamespace(coords=place) for place in coords]


@pytest.mark.parametrize(
    ("name", "coords", "links"),
    [
        ("v5e:2x4", [(0, 0, 0), (0, 1, 0), (0, 2, 0), (0, 3, 0)], 1),  # a line
        ("v5e:2x4", [(x, y, 0) for x in range(2) for y in range(4)], 2),
        ("v5e:8x16", [(3, y, 0) for y in range(16)], 2),  # a ring
        ("v5e:8x16", [(3, y, 0) for y in range(8)], 1),  # half of it
        ("v5p:4x4x8", [(x, y, 0) for x in range(4) for y in range(4)], 4),
        ("v5p:4x4x8", [(x, 0, z) for x in range(4) for z in range(4)], 3),
        ("tpu7x:2x2x1", [(0, 0, 0), (0, 0, 0)], 1),  # the two halves of a chip
        ("h200:8", [(0,), (3,)], 1),
    ],
)
def test_bandwidth_counts_links_within_the_group(name, coords, links):
    chip, torus = parse_topology(name)
    assert group_bandwidth(chip, torus, devices(*coords)) == links * chip.link_bandwidth
