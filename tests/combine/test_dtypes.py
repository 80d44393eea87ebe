"""Dtypes of leaves: kept by a merge, rounded once where they differ, recorded, and exact under opting out."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest

import flexolmo_jax
from flexolmo_jax.checkpoint.manifests import MOE
from flexolmo_jax.checkpoint.model_directory import read_model
from flexolmo_jax.combine.merge import merge
from flexolmo_jax.combine.opt_out import EXACT, ROUTER_RETURNED, opt_out
from tests.support import small
from tests.support.small import assert_refused, flexolmo

DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
CASTS = [None, "float16"]
OWNERS = {"code": "bfloat16", "legal": "float16", "news": "float32"}
ANCHOR, EXPERTS = MOE + "anchor/", MOE + "experts/"
TOKENS = np.random.default_rng(0).integers(0, 256, (2, 12))


@pytest.fixture(scope="module", params=DTYPES)
def home(request, tmp_path_factory):
    """An anchor of one dtype, and a contribution of each; `home.name` is the anchor's."""
    home = tmp_path_factory.mktemp("dtypes") / request.param
    home.mkdir()
    small.corpus(home / "corpus")
    small.anchor(home / "anchor", leaves=small.random_leaves(0, dtype=DTYPES[request.param]))
    for seed, (name, dtype) in enumerate(OWNERS.items(), 1):
        leaves = {leaf: x.astype(DTYPES[dtype]) for leaf, x in small.expert_leaves(home / "anchor", seed).items()}
        small.contribution(home / name, home / "anchor", leaves=leaves)
    return home


def merged(home, out, *names, dtype=None):
    merge(home / "anchor", [home / name for name in names], out, top_k=2, dtype=dtype)
    return out


def without_certificate(path):
    return {file: digest for file, digest in small.files(path).items() if file != "certificate.json"}


def expected(home, names, dtype):
    """{path: array} of a merge: what was published, rounded once."""
    anchor, owners = small.read_params(home / "anchor"), [small.read_params(home / name) for name in names]
    leaves = {path: x.astype(dtype) for path, x in anchor.items() if not path.startswith(ANCHOR)}
    for leaf in owners[0]:
        arrays = [anchor[ANCHOR + leaf], *(owner[leaf] for owner in owners)]
        leaves[EXPERTS + leaf] = np.stack([part.astype(np.float32).astype(dtype) for part in arrays], axis=1)
    return leaves


def test_experts_take_the_anchors_dtype_rounded_once(home, tmp_path):
    found = small.read_params(merged(home, tmp_path / "out", *OWNERS))
    small.assert_same_leaves(found, expected(home, OWNERS, DTYPES[home.name]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_dtype_for_all_leaves_rounded_once(home, tmp_path, dtype):
    found = small.read_params(merged(home, tmp_path / "out", *OWNERS, dtype=dtype))
    small.assert_same_leaves(found, expected(home, OWNERS, DTYPES[dtype]))


@pytest.mark.parametrize("dtype", CASTS)
def test_any_order_gives_the_same_bytes(home, tmp_path, dtype):
    orders = (OWNERS, reversed(OWNERS))
    first, second = (merged(home, tmp_path / str(i), *names, dtype=dtype) for i, names in enumerate(orders))
    assert small.files(first) == small.files(second)


@pytest.mark.parametrize("dtype", CASTS)
def test_opting_out_equals_the_merge_that_never_had_them(home, tmp_path, dtype):
    model, never = (
        merged(home, tmp_path / "model", *OWNERS, dtype=dtype),
        merged(home, tmp_path / "never", "code", "news", dtype=dtype),
    )
    assert opt_out(model, ["legal"], tmp_path / "out")["guarantee"] == EXACT
    assert without_certificate(tmp_path / "out") == small.files(never)
    assert flexolmo("inspect", tmp_path / "out").status == 0
    # In a request, and for good: the same logits.
    removed = np.asarray(flexolmo_jax.load(tmp_path / "out").logits(TOKENS))
    masked = np.asarray(flexolmo_jax.load(model).logits(TOKENS, without=["legal"]))
    np.testing.assert_allclose(masked, removed, atol=1e-5)
    if dtype in (None, home.name):
        opt_out(model, list(OWNERS), tmp_path / "alone")
        assert without_certificate(tmp_path / "alone") == small.files(home / "anchor")


@pytest.mark.parametrize("dtype", CASTS)
def test_a_tuned_router_keeps_its_dtype_and_is_returned_to_the_merge(home, tmp_path, dtype):
    model = merged(home, tmp_path / "model", *OWNERS, dtype=dtype)
    tuned = small.tuned(tmp_path / "tuned", model, home / "corpus")
    before, after = small.read_params(model), small.read_params(tuned)
    assert {path: x.dtype for path, x in before.items()} == {path: x.dtype for path, x in after.items()}
    assert {path for path in before if before[path].tobytes() != after[path].tobytes()} == set(small.ROUTER)
    assert flexolmo("inspect", tuned).status == 0
    assert opt_out(tuned, ["legal"], tmp_path / "out")["guarantee"] == ROUTER_RETURNED
    never = small.files(merged(home, tmp_path / "never", "code", "news", dtype=dtype))
    assert without_certificate(tmp_path / "out") == never
    # What is kept as tuned can still be returned.
    opt_out(tuned, ["legal"], tmp_path / "kept", keep_tuned_router=True)
    again = small.tuned(tmp_path / "again", tmp_path / "kept", home / "corpus", seed=10)
    opt_out(again, ["code"], tmp_path / "last")
    assert without_certificate(tmp_path / "last") == small.files(merged(home, tmp_path / "news", "news", dtype=dtype))


@pytest.mark.parametrize("dtype", CASTS)
def test_owners_digests_and_manifests_stay_as_they_were(home, tmp_path, dtype):
    model = read_model(merged(home, tmp_path / "out", *OWNERS, dtype=dtype))
    assert model.anchor_digest == read_model(home / "anchor").anchor_digest
    document = json.loads((tmp_path / "out" / "model.json").read_text())
    for record, (name, published) in zip(document["experts"][1:], OWNERS.items(), strict=True):
        owner = json.loads((home / name / "contribution.json").read_text())
        assert record["contribution"] == owner
        assert (record["digest"], record["leaves"], record["card"]) == tuple(
            owner[key] for key in ("digest", "leaves", "card")
        )
        stored = dtype or home.name
        casts = record.get("casts", {})
        assert [cast["dtypes"] for cast in casts.values()] == (
            [] if stored == published else [[published, stored]] * len(owner["leaves"])
        )
    assert bool(document.get("casts")) is (dtype not in (None, home.name))


def test_a_cast_anchor_merges_as_casting_the_merge_does(home, tmp_path):
    for dtype in DTYPES:
        merge(home / "anchor", [], tmp_path / f"anchor-{dtype}", top_k=1, dtype=dtype)
        merge(tmp_path / f"anchor-{dtype}", [home / name for name in OWNERS], tmp_path / f"a-{dtype}", top_k=2)
        expected = small.files(merged(home, tmp_path / f"b-{dtype}", *OWNERS, dtype=dtype))
        assert small.files(tmp_path / f"a-{dtype}") == expected


def test_every_rounding_is_recorded(tmp_path):
    small.anchor(tmp_path / "anchor")
    for source, out, dtype in (("anchor", "a", "bfloat16"), ("a", "b", "float16"), ("b", "c", "float32")):
        merge(tmp_path / source, [], tmp_path / out, top_k=1, dtype=dtype)
    assert flexolmo("inspect", tmp_path / "c").status == 0
    model = read_model(tmp_path / "c")
    assert {tuple(cast.dtypes) for cast in [*model.casts.values(), *model.experts[0].casts.values()]} == {
        ("float32", "bfloat16", "float16", "float32")
    }
    leaves = small.read_params(tmp_path / "anchor").items()
    rounded = {path: x.astype(ml_dtypes.bfloat16).astype(np.float16).astype(np.float32) for path, x in leaves}
    small.assert_same_leaves(small.read_params(tmp_path / "c"), rounded)


def test_ties_go_to_even(tmp_path):
    """In bfloat16, which has 8 bits of precision, 1 + 1/256 lies between 1 and 1 + 1/128, 1 + 3/256 below 1 + 1/64."""
    leaves = small.random_leaves(0)
    leaves["head"][:] = 1 + 1 / 256
    leaves["head"][0, 0], leaves["head"][0, 1] = 1 + 3 / 256, 1 + 1 / 256 + 2**-20
    small.anchor(tmp_path / "anchor", leaves=leaves)
    merge(tmp_path / "anchor", [], tmp_path / "out", top_k=1, dtype="bfloat16")
    head = small.read_params(tmp_path / "out")["head"].astype(np.float32)
    assert (head[0, 0], head[0, 1], head[1, 1]) == (1 + 1 / 64, 1 + 1 / 128, 1)


@pytest.mark.parametrize(("dtype", "value"), [("float16", 65520), ("float16", -1e5), ("bfloat16", 3.4e38)])
@pytest.mark.parametrize("place", ["anchor", "news"])
def test_what_is_too_large_for_a_dtype_is_refused_by_name(tmp_path, dtype, value, place):
    leaves = small.random_leaves(0)
    small.anchor(tmp_path / "anchor", leaves=leaves)
    expert = small.expert_leaves(tmp_path / "anchor", 1)
    (leaves[ANCHOR + "up"] if place == "anchor" else expert["up"])[1, 2, 3] = value
    shutil.rmtree(tmp_path / "anchor")
    small.anchor(tmp_path / "anchor", leaves=leaves)
    small.contribution(tmp_path / "news", tmp_path / "anchor", leaves=expert)
    arguments = [f"--anchor={tmp_path}/anchor", f"--contribution={tmp_path}/news", f"--out={tmp_path}/out"]
    result = flexolmo("merge", *arguments, f"--dtype={dtype}")
    leaf = "leaf blocks/moe/anchor/up" if place == "anchor" else "leaf up"
    assert_refused(result, "merge", f"{tmp_path}/{place}: {leaf}", "beyond", dtype)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["anchor", "news"]
    assert flexolmo("merge", *arguments).status == 0


def test_the_largest_numbers_are_no_overflow(tmp_path):
    leaves = small.random_leaves(0)
    leaves["head"][0, :2] = [65504, 65519]  # the latter is rounded down
    small.anchor(tmp_path / "anchor", leaves=leaves)
    merge(tmp_path / "anchor", [], tmp_path / "out", top_k=1, dtype="float16")
    assert small.read_params(tmp_path / "out")["head"][0, :2].tolist() == [65504, 65504]


@pytest.mark.parametrize("place", ["merge", "inspect"])
def test_an_altered_byte_is_found_before_and_after_the_cast(tmp_path, place):
    small.anchor(tmp_path / "anchor", leaves=small.random_leaves(0, dtype=ml_dtypes.bfloat16))
    leaves = {leaf: x.astype(np.float32) for leaf, x in small.expert_leaves(tmp_path / "anchor", 1).items()}
    small.contribution(tmp_path / "news", tmp_path / "anchor", leaves=leaves)
    merge(tmp_path / "anchor", [tmp_path / "news"], tmp_path / "model", top_k=2)
    chunk = {"merge": "news/params/gate/c.0.0.0", "inspect": "model/params/blocks.moe.experts.gate/c.0.1.0.0"}
    data = bytearray((tmp_path / chunk[place]).read_bytes())
    data[0] ^= 1  # of a float32 a bit that is rounded away
    (tmp_path / chunk[place]).write_bytes(data)
    arguments = {
        "merge": [f"--anchor={tmp_path}/anchor", f"--contribution={tmp_path}/news", f"--out={tmp_path}/out"],
        "inspect": [tmp_path / "model"],
    }
    assert_refused(flexolmo(place, *arguments[place]), place, "gate", "altered")
    assert not (tmp_path / "out").exists()


def test_a_model_says_which_dtype_it_has_and_what_was_cast(home, tmp_path):
    result = flexolmo("inspect", merged(home, tmp_path / "out", "news", dtype="float16"))
    assert "dtype float16" in " ".join(result.out.split())
    assert "news: 5 leaves from float32 to float16" in result.out
    assert ("shared" in result.out.split("cast")[1]) is (home.name != "float16")


def test_an_unknown_dtype_is_refused(home, tmp_path):
    arguments = [f"--anchor={home}/anchor", f"--contribution={home}/news", f"--out={tmp_path}/out"]
    assert_refused(flexolmo("merge", *arguments, "--dtype=int8"), "merge", "dtype", "float32", "bfloat16", "float16")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "change",
    [
        {"casts": 3},
        {"casts": {"up": 3}},
        {"casts": {"up": {"dtypes": ["float32"], "digest": "0"}}},
        {"casts": {"up": {"dtypes": ["float32", "int8"], "digest": "0"}}},
        {"casts": {"extra": {"dtypes": ["float32", "float16"], "digest": "0"}}},
        {"contribution": 3},
        {"contribution": {"expert": "news"}},
    ],
    ids=str,
)
def test_a_damaged_record_is_refused(tmp_path, change):
    small.anchor(tmp_path / "anchor")
    small.contribution(tmp_path / "news", tmp_path / "anchor", seed=1)
    merge(tmp_path / "anchor", [tmp_path / "news"], tmp_path / "model", top_k=2, dtype="bfloat16")
    document = json.loads((tmp_path / "model" / "model.json").read_text())
    document["experts"][1] |= change
    (tmp_path / "model" / "model.json").write_text(json.dumps(document))
    small.reseal(tmp_path / "model" / "model.json")
    assert_refused(flexolmo("inspect", tmp_path / "model"), "inspect", "model.json: damaged")
