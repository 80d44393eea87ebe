"""Runs that start from an anchor in a shorter dtype: they train in float32 and publish in its dtype, rounded once."""

import ml_dtypes
import numpy as np
import pytest

from flexolmo_jax.checkpoint.model_directory import read_model
from flexolmo_jax.combine.merge import merge
from flexolmo_jax.combine.opt_out import opt_out
from flexolmo_jax.errors import UserError
from flexolmo_jax.model.architecture import Architecture
from flexolmo_jax.training.publish import publish
from flexolmo_jax.training.run import read_run
from tests.support import runs, small

MOE = "blocks/moe/"
DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return runs.journey(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module", params=DTYPES)
def anchor(request, made, tmp_path_factory):
    """The journey's anchor with its weights in another dtype, as if it had been imported so."""
    path = tmp_path_factory.mktemp("anchor") / request.param
    before = read_model(made.anchor.output)
    leaves = {name: x.astype(DTYPES[request.param]) for name, x in runs.read_params(made.anchor.output).items()}
    return small.anchor(path, architecture=architecture_of(before), leaves=leaves)


def architecture_of(manifest):
    return Architecture.from_dict(manifest.architecture, "the test")


@pytest.fixture(scope="module")
def contribution(made, anchor, tmp_path_factory):
    """A contribution for it, with leaves as a run would end with them."""
    publication = expert_run(made, anchor).publication
    leaves = trained(publication, anchor, seed=5)
    return publish(tmp_path_factory.mktemp("expert") / anchor.name, leaves, publication)


def expert_run(made, anchor):
    return read_run(expert_config(made, anchor))


def expert_config(made, anchor):
    return runs.make_config("pair", **made.expert_values | {"start_from": str(anchor), "data__public_share": 0.0})


def rounded(leaves, dtype):
    return {name: np.asarray(x, np.float32).astype(dtype) for name, x in leaves.items()}


@pytest.mark.parametrize("anchor", ["bfloat16"], indirect=True)
def test_an_expert_is_trained_in_float32_and_published_in_the_anchors_dtype(made, anchor, tmp_path):
    expert = runs.train(expert_config(made, anchor), tmp_path / "run")
    trained = {p.removeprefix(f"{MOE}expert/"): x for p, x in expert.leaves.items() if f"{MOE}expert/" in p}
    assert {x.dtype.name for x in trained.values()} == {"float32"}
    dtype = DTYPES[anchor.name]
    assert any((x.astype(dtype).astype(np.float32) != x).any() for x in trained.values())
    small.assert_same_leaves(runs.read_params(expert.output), rounded(trained, dtype))


def test_it_merges_and_opts_out_to_the_anchor(anchor, contribution, tmp_path):
    merged = merge(anchor, [contribution], tmp_path / "merged", top_k=2)
    assert not merged.casts
    assert not any(e.casts for e in merged.experts)
    opt_out(tmp_path / "merged", ["news"], tmp_path / "out")
    (tmp_path / "out" / "certificate.json").unlink()
    assert small.files(tmp_path / "out") == small.files(anchor)


def trained(publication, start, seed):
    """Leaves as a run would end with them: float32 where it trained, else as they were."""
    rng = np.random.default_rng(seed)
    leaves = {path: np.asarray(x, np.float32) for path, x in runs.read_params(start).items()}
    for path in sorted(publication.trainable):
        leaves[path] = rng.standard_normal(leaves[path.replace("/expert/", "/anchor/")].shape).astype(np.float32)
    return leaves


@pytest.mark.parametrize("kind", ["anchor", "router", "joint"])
def test_every_kind_of_run_publishes_in_the_dtype_it_started_from(made, anchor, contribution, tmp_path, kind):
    """The leaves that it trained rounded once, the others byte for byte; and their digests say so."""
    start = anchor
    if kind != "anchor":
        start = tmp_path / "merged"
        merge(anchor, [contribution], start, top_k=2)
    config = runs.make_config(kind, start_from=str(start), data__train=str(made.public.path))
    publication = read_run(config).publication
    leaves = trained(publication, start, seed=3)
    output = publish(tmp_path / "model", leaves, publication)
    before, dtype = runs.read_params(start), DTYPES[anchor.name]
    expected = {
        path: rounded(leaves, dtype)[path] if path in publication.trainable else x for path, x in before.items()
    }
    small.assert_same_leaves(runs.read_params(output), expected)
    assert small.flexolmo("inspect", output).status == 0
    if kind == "router":
        opt_out(output, ["news"], tmp_path / "out")
        (tmp_path / "out" / "certificate.json").unlink()
        assert small.files(tmp_path / "out") == small.files(anchor)


def test_what_the_dtype_cannot_hold_is_not_published(made, anchor, tmp_path):
    config = runs.make_config("anchor", start_from=str(anchor), data__train=str(made.public.path))
    publication = read_run(config).publication
    leaves = trained(publication, anchor, seed=3)
    leaves["head"][1, 2] = 1e5 if anchor.name == "float16" else 3.4e38
    with pytest.raises(UserError, match=f"leaf head: holds values beyond .* {anchor.name}"):
        publish(tmp_path / "model", leaves, publication)
    assert not list(tmp_path.iterdir())


def test_a_start_that_changed_in_the_meantime_is_not_published(made, anchor, tmp_path):
    """A frozen leaf is copied from where it came, and must still be what the manifest records."""
    start = tmp_path / "start"
    small.anchor(start, architecture=architecture_of(read_model(anchor)), seed=4)
    config = runs.make_config("anchor", start_from=str(start), data__train=str(made.public.path))
    publication = read_run(config).publication
    leaves = trained(publication, start, seed=3)
    chunk = start / "params" / "blocks.moe.anchor.router.weight" / "c.0.0"
    chunk.write_bytes(bytes([chunk.read_bytes()[0] ^ 1]) + chunk.read_bytes()[1:])
    with pytest.raises(UserError, match=r"router/weight.*altered"):
        publish(tmp_path / "model", leaves, publication)
    assert [path.name for path in tmp_path.iterdir()] == ["start"]
