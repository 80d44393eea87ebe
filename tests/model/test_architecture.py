"""What fits together and what does not."""

import dataclasses

import pytest

from flexolmo_jax.errors import UserError
from flexolmo_jax.model.architecture import ANCHOR, Architecture, Layout
from tests.support.tiny import ARCHITECTURE


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_ff": 0}, "d_ff is 0"),
        ({"num_layers": -1}, "num_layers is -1"),
        ({"num_heads": 5}, "must divide d_model"),
        ({"num_kv_heads": 3}, "multiple of num_kv_heads"),
        ({"num_heads": 32, "num_kv_heads": 32}, "head size 1 is odd"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(ARCHITECTURE, **changes)


def test_an_architecture_is_read_back_and_odd_keys_are_named():
    fields = dataclasses.asdict(ARCHITECTURE)
    assert Architecture.from_dict(fields, "here") == ARCHITECTURE
    with pytest.raises(UserError, match=r"here: .*\['depth'\]"):
        Architecture.from_dict({**fields, "depth": 2}, "here")
    del fields["d_ff"]
    with pytest.raises(UserError, match=r"\['d_ff'\]"):
        Architecture.from_dict(fields, "here")


def test_a_roster_of_one_is_the_anchor_and_top_k_is_at_most_the_roster():
    assert Layout.of_roster(1, 4) == ANCHOR
    assert Layout.of_roster(3, 4) == Layout("stacked", 3, 3)
    assert Layout.of_roster(8, 4) == Layout("stacked", 8, 4)
