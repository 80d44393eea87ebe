"""What a coordinator may be handed: each fault is named in one line, and nothing is written."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from tests.support import small
from tests.support.small import assert_refused, flexolmo


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Two anchors, a wider anchor, contributions to the first, their merge, and a corpus."""
    home = tmp_path_factory.mktemp("refusals")
    small.corpus(home / "corpus")
    small.anchor(home / "anchor")
    small.anchor(home / "other", seed=5)
    small.anchor(home / "wide", architecture=dataclasses.replace(small.ARCHITECTURE, d_ff=32))
    small.contribution(home / "news", home / "anchor", seed=1)
    small.contribution(home / "code", home / "anchor", seed=2)
    result = flexolmo("merge", f"--anchor={home}/anchor", f"--contribution={home}/code", f"--out={home}/merged")
    assert (result.status, result.err) == (0, "")
    assert result.out.endswith("merged: anchor, code\n")
    return home


def merge(tmp_path, anchor, *contributions):
    """Runs `flexolmo merge` to `tmp_path/out`, and checks that nothing is left where it ends badly."""
    before = sorted(tmp_path.rglob("*"))
    inputs = [f"--contribution={path}" for path in contributions]
    result = flexolmo("merge", f"--anchor={anchor}", *inputs, f"--out={tmp_path}/out")
    if result.status:
        assert sorted(tmp_path.rglob("*")) == before
    return result


def leaves_with(**changes):
    """Makes contributions of the anchor whose leaves are changed: {leaf: new value of the old one, or None}."""

    def make(home, path):
        leaves = small.expert_leaves(home / "anchor", seed=3)
        for leaf, change in changes.items():
            leaves[leaf] = change(leaves.get(leaf))
        leaves = {leaf: values for leaf, values in leaves.items() if values is not None}
        small.contribution(path, home / "anchor", name="bad", leaves=leaves)

    return make


def file_with(name, change):
    """Makes contributions of which one file has other bytes; None for none."""

    def make(home, path):
        small.contribution(path, home / "anchor", name="bad", seed=3)
        file = path / name
        data = change(file.read_bytes() if file.exists() else b"")
        if data is None:
            (path / name).unlink()
        else:
            (path / name).write_bytes(data)

    return make


def manifest_with(**changes):
    """Makes contributions of which the manifest has other values, and the digest of these."""

    def make(home, path):
        small.contribution(path, home / "anchor", name="bad", seed=3)
        small.reseal(path / "contribution.json", lambda document: document | changes)

    return make


def manifest_altered(old, new):
    """Makes contributions of which the manifest was altered by hand."""
    return file_with("contribution.json", lambda data: data.replace(old, new))


def larger_chunks(data):
    document = json.loads(data)
    document["chunk_grid"]["configuration"]["chunk_shape"][-1] += 1
    return json.dumps(document).encode()


def flip(data):
    return data[:100] + bytes([data[100] ^ 1]) + data[101:]


def not_a_number(data):
    return data[:100] + np.float32(np.nan).tobytes() + data[104:]


GATE = "params/gate/c.0.0.0"
REFUSED = {
    "made on another anchor": (
        lambda home, path: small.contribution(path, home / "other", seed=3),
        ["--contribution=", "another anchor", "give the anchor"],
    ),
    "other architecture": (
        lambda home, path: small.contribution(path, home / "wide", seed=3),
        ["--contribution=", "another architecture", "d_ff"],
    ),
    "missing leaf": (leaves_with(down=lambda _: None), ["--contribution=", "lacks the leaf down"]),
    "extra leaf": (leaves_with(extra=lambda _: np.ones(3, np.float32)), ["--contribution=", "unknown leaf extra"]),
    "misshapen leaf": (leaves_with(up=lambda up: up[..., :-1]), ["leaf up", "[2, 16, 23]", "[2, 16, 24]"]),
    "float64": (
        leaves_with(up=lambda up: up.astype(np.float64)),
        ["leaf up", "float64", "float32"],
    ),
    "whole numbers": (leaves_with(up=lambda up: up.astype(np.int32)), ["leaf up", "int32", "bfloat16"]),
    "not finite": (file_with(GATE, not_a_number), ["--contribution=", "leaf gate", "not finite"]),
    "one byte flipped": (file_with(GATE, flip), ["--contribution=", "leaf gate", "altered", "copy it again"]),
    "truncated file": (file_with(GATE, lambda data: data[:-1]), ["--contribution=", "leaf gate", "truncated"]),
    "a file besides": (file_with("params/notes", lambda data: b"hello"), ["bad: holds params/notes", "no part of it"]),
    "missing file": (file_with(GATE, lambda data: None), ["--contribution=", "leaf gate", "missing"]),
    "missing index": (file_with("params/_METADATA", lambda data: None), ["bad/params", "no parameters here"]),
    "damaged index": (file_with("params/_METADATA", lambda data: data[:-9]), ["bad/params/_METADATA", "damaged"]),
    "index nested too deeply": (file_with("params/_METADATA", lambda data: b"[" * 10**5), ["_METADATA", "damaged"]),
    "leaf nested too deeply": (file_with("params/up/zarr.json", lambda data: b"[" * 10**5), ["bad/params", "leaf up"]),
    "chunks larger than the leaf": (file_with("params/up/zarr.json", larger_chunks), ["leaf up", "[2, 16, 25]"]),
    "damaged leaf": (file_with("params/up/zarr.json", lambda data: data[:-9]), ["bad/params", "leaf up"]),
    "damaged manifest": (file_with("contribution.json", lambda data: data[:-9]), ["contribution.json", "damaged"]),
    "no digest": (manifest_with(leaves={}), ["--contribution=", "names no digest"]),
    "newer format": (manifest_with(format=3), ["contribution.json", "format 3", "reads format 2"]),
    "another licence": (
        manifest_altered(b'"license": "none"', b'"license": "public domain"'),
        ["bad/contribution.json", "altered", "copy the directory again"],
    ),
    "another name": (manifest_altered(b'"name": "bad"', b'"name": "good"'), ["bad/contribution.json", "altered"]),
    "another anchor by hand": (manifest_altered(b'"anchor_digest": "', b'"anchor_digest": "0'), ["altered"]),
    "control characters": (manifest_with(anchor_digest="\x1b[2J\u202e"), ["another anchor (\ufffd[2J\ufffd"]),
    "format 1": (manifest_with(format=1), ["format 1; convert it: flexolmo convert --source=", "bad --out=DIR"]),
    "called the anchor": (manifest_with(name="anchor"), ["contribution.json", "'anchor'", "lower-case"]),
    "a corpus": (
        lambda home, path: shutil.copytree(home / "corpus", path),
        ["--contribution=", "is a corpus directory", "give a contribution directory"],
    ),
    "a model": (lambda home, path: shutil.copytree(home / "anchor", path), ["is a model directory"]),
    "an empty directory": (lambda home, path: path.mkdir(), ["has no contribution.json"]),
    "a file": (lambda home, path: path.write_text(""), ["bad", "give a contribution directory"]),
    "nothing": (lambda home, path: None, ["no such directory", "give a contribution directory"]),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_a_bad_contribution_is_refused(home, tmp_path, fault):
    make, words = REFUSED[fault]
    make(home, tmp_path / "bad")
    assert_refused(merge(tmp_path, home / "anchor", home / "news", tmp_path / "bad"), "merge", "bad", *words)


def test_two_contributions_of_one_name_are_refused(home, tmp_path):
    small.contribution(tmp_path / "bad", home / "anchor", name="news", seed=3)
    result = merge(tmp_path, home / "anchor", home / "news", tmp_path / "bad")
    words = [f"--contribution={tmp_path}/bad", "'news'", home / "news", f"NAME={tmp_path}/bad"]
    assert_refused(result, "merge", *words)


def test_a_merged_model_is_no_anchor(home, tmp_path):
    result = merge(tmp_path, home / "merged", home / "news")
    assert_refused(result, "merge", f"--anchor={home}/merged", "a merged model", "anchor, code")


@pytest.mark.parametrize("kind", ["news", "corpus", "nosuch"])
def test_only_a_model_is_an_anchor(home, tmp_path, kind):
    result = merge(tmp_path, home / kind, home / "news")
    assert_refused(result, "merge", f"--anchor={home}/{kind}", "give a model directory")


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("params/head/c.0.0", flip, ["leaf head", "altered"]),
        ("params/blocks.moe.anchor.up/c.0.0.0", flip, ["leaf blocks/moe/anchor/up", "altered"]),
        ("params/head/c.0.0", lambda data: data[:-1], ["leaf head", "truncated"]),
        (
            "params/_METADATA",
            lambda data: data.replace(b'"head"', b'"tail"'),
            ["holds params/head", "no part of"],
        ),
        ("model.json", lambda data: data[:-9], ["model.json", "damaged"]),
        ("model.json", lambda data: data.replace(b'"embedding"', b'"embeddings"'), ["model.json", "altered"]),
    ],
)
def test_a_damaged_anchor_is_refused(home, tmp_path, name, change, words):
    shutil.copytree(home / "anchor", tmp_path / "bad")
    (tmp_path / "bad" / name).write_bytes(change((tmp_path / "bad" / name).read_bytes()))
    assert_refused(merge(tmp_path, tmp_path / "bad", home / "news"), "merge", "bad", *words)


def test_an_anchor_that_was_trained_on_after_a_merge_is_refused(home, tmp_path):
    shutil.copytree(home / "anchor", tmp_path / "bad")
    manifest = json.loads((tmp_path / "bad" / "model.json").read_text())
    manifest["tuned"] = {"leaves": ["head"], "merged_router": {"anchor": {}}}
    (tmp_path / "bad" / "model.json").write_text(json.dumps(manifest))
    small.reseal(tmp_path / "bad" / "model.json")
    assert_refused(merge(tmp_path, tmp_path / "bad", home / "news"), "merge", "bad", "as it was published")


def test_an_existing_out_is_kept(home, tmp_path):
    (tmp_path / "out").mkdir()
    assert_refused(merge(tmp_path, home / "anchor", home / "news"), "merge", f"--out={tmp_path}/out", "exists already")


def test_an_out_below_a_file_is_refused(home, tmp_path):
    (tmp_path / "file").write_text("")
    arguments = [f"--anchor={home}/anchor", f"--contribution={home}/news", f"--out={tmp_path}/file/out"]
    assert_refused(flexolmo("merge", *arguments), "merge", f"{tmp_path}/file")


@pytest.mark.parametrize(
    ("expert", "words"),
    [("nosuch", ["not on the roster", "contributed experts: code"]), ("anchor", ["every model keeps", "code"])],
)
def test_opt_out_of_no_expert_or_the_anchor_is_refused(home, tmp_path, expert, words):
    result = flexolmo("opt-out", f"--model={home}/merged", f"--expert={expert}", f"--out={tmp_path}/out")
    assert_refused(result, "opt-out", f"--expert={expert}", *words)
    assert not list(tmp_path.iterdir())


def test_opt_out_of_a_damaged_model_is_refused(home, tmp_path):
    shutil.copytree(home / "merged", tmp_path / "bad")
    chunk = tmp_path / "bad/params/blocks.moe.experts.gate/c.0.0.0.0"
    chunk.write_bytes(flip(chunk.read_bytes()))
    result = flexolmo("opt-out", f"--model={tmp_path}/bad", "--expert=code", f"--out={tmp_path}/out")
    assert_refused(result, "opt-out", f"--model={tmp_path}/bad", "experts/gate of expert anchor", "altered")
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


def test_opt_out_into_an_existing_directory_is_refused(home, tmp_path):
    result = flexolmo("opt-out", f"--model={home}/merged", "--expert=code", f"--out={tmp_path}")
    assert_refused(result, "opt-out", f"--out={tmp_path}", "exists already")
