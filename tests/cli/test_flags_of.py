"""Tests of flags_of: errors of the library name the flags that the user gave."""

import pytest

from flexolmo_jax.cli.flags_of import translate
from flexolmo_jax.errors import ArgumentError, NotFoundError, UserError

VALUES = {"model": "runs/a", "data": ["corpora/x", "corpora/y"], "length": 3, "out": None}


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ArgumentError("top_k", 0, "must be at least 1"), "--top_k=0: must be at least 1"),
        (ArgumentError("names", "law", "not on the roster"), "--expert=law: not on the roster"),
        (ArgumentError("config.steps", 0, "must be at least 1"), "--config.steps=0: must be at least 1"),
        (NotFoundError("runs/a: no such directory"), "--model=runs/a: no such directory"),
        (UserError("corpora/y: is a model directory"), "--data=corpora/y: is a model directory"),
        (UserError("corpora/y/tokens.npy: damaged"), "corpora/y/tokens.npy: damaged"),
        (UserError("step 3: loss; lower config.steps"), "step 3: loss; lower --config.steps"),
        (UserError("runs/a/config.json: damaged"), "runs/a/config.json: damaged"),
        (UserError("w: config.json differs in config.seed"), "w: config.json differs in --config.seed"),
        (UserError("give --config.seed"), "give --config.seed"),
    ],
)
def test_translates(error, line):
    assert translate(error, VALUES, {"names": "expert"}) == line


def test_errors_are_what_a_notebook_expects():
    assert isinstance(ArgumentError("top_k", 0, "must be at least 1"), ValueError)
    assert isinstance(NotFoundError("a: no such file"), FileNotFoundError)
    assert str(NotFoundError("a: no such file")) == "a: no such file"
