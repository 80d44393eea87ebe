"""The table that says what is trained."""

import pytest

from flexolmo_jax.errors import UserError
from flexolmo_jax.training.partition import split, trainable_paths

PATHS = ("blocks/moe/anchor/gate", "blocks/moe/expert/gate", "blocks/moe/expert/router/weight", "head")


def test_the_first_pattern_that_matches_a_whole_path_decides():
    table = (("blocks/.*/expert/router/weight", "frozen"), ("blocks/.*/expert/.*", "trainable"), (".*", "frozen"))
    assert trainable_paths(PATHS, table) == {"blocks/moe/expert/gate"}
    assert trainable_paths(PATHS, ((".*gate", "frozen"), (".*", "trainable"))) == set(PATHS[2:])


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ((("blocks/.*", "trainable"),), "no pattern matches the leaf head"),
        ((("blocks", "trainable"), (".*", "frozen")), "'blocks' decides no leaf"),
        (((".*", "trainable"), ("head", "frozen")), "'head' decides no leaf"),
        (((".*", "Trainable"),), "marked 'Trainable'"),
        (((".*(", "trainable"),), "not a regular expression"),
        (((".*", "frozen"),), "every leaf is frozen"),
    ],
    ids=["unmatched leaf", "part of a path", "idle pattern", "bad mark", "bad expression", "all frozen"],
)
def test_a_table_that_decides_wrongly_is_refused(table, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(")) as error:
        trainable_paths(PATHS, table)
    assert str(error.value).startswith("--config.partition")


def test_every_leaf_is_on_one_side_of_the_split():
    leaves = {path: number for number, path in enumerate(PATHS)}
    trainable, frozen = split(leaves, {PATHS[1]})
    assert trainable == {PATHS[1]: 1}
    assert frozen == {PATHS[0]: 0, PATHS[2]: 2, PATHS[3]: 3}
