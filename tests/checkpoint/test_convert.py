"""Directories of format 1, written by the code before format 2, become what format 2 would have written."""

import json
import pathlib
import shutil

import numpy as np
import pytest

from flexolmo_jax.checkpoint.convert import convert
from flexolmo_jax.checkpoint.model_directory import read_contribution, read_model
from flexolmo_jax.combine.contribution import Alias
from flexolmo_jax.combine.merge import merge
from flexolmo_jax.combine.opt_out import ROUTER_RETURNED, opt_out
from flexolmo_jax.errors import UserError
from tests.support import small
from tests.support.small import assert_refused, flexolmo

FORMAT1 = pathlib.Path(__file__).parents[1] / "data_files" / "format1"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Everything converted: an anchor, the contributions code and news, their merge (news as press), and it tuned."""
    home = tmp_path_factory.mktemp("converted")
    for name in ("anchor", "merged", "tuned"):
        assert convert(FORMAT1 / name, home / name)[0].startswith(f"{home / name}: anchor")
    for name in ("code", "news"):
        assert convert(FORMAT1 / name, home / name, FORMAT1 / "anchor") == [f"{home / name}: {name}"]
    merge(home / "anchor", [home / "code", Alias("press", home / "news")], home / "again", top_k=2)
    return home


def test_converting_and_merging_equals_converting_the_merge(home):
    assert small.files(home / "again") == small.files(home / "merged")


def test_converted_directories_hold_what_format_2_says(home):
    for name in ("anchor", "code", "news", "merged", "tuned"):
        result = flexolmo("inspect", home / name)
        assert (result.status, result.err) == (0, "")
    assert read_contribution(home / "news").card["description"] == "data of news"
    assert read_model(home / "merged").experts[2].owner_name == "news"


def test_weights_stay_as_they_were(home):
    """Against the bytes on disk, where each leaf of format 1 is one file."""
    leaf = np.fromfile(FORMAT1 / "news" / "params" / "row" / "c.0.0", np.float32)
    np.testing.assert_array_equal(small.read_params(home / "news")["router/weight"].ravel(), leaf)
    norm = np.fromfile(FORMAT1 / "anchor" / "params" / "blocks.mixture_norm.scale" / "c.0.0", np.float32)
    np.testing.assert_array_equal(small.read_params(home / "anchor")["blocks/moe_norm/scale"].ravel(), norm)


def test_a_tuned_model_opts_out_as_the_merge_does(home, tmp_path):
    assert opt_out(home / "tuned", ["press"], tmp_path / "out")["guarantee"] == ROUTER_RETURNED
    opt_out(home / "again", ["press"], tmp_path / "never")
    for path in ("out", "never"):
        (tmp_path / path / "certificate.json").unlink()
    assert small.files(tmp_path / "out") == small.files(tmp_path / "never")


def test_of_a_model_that_was_trained_beyond_its_router_owners_manifests_are_gone(tmp_path):
    shutil.copytree(FORMAT1 / "tuned", tmp_path / "source")
    document = json.loads((tmp_path / "source" / "model.json").read_text())
    document["tuned"]["leaves"].append("blocks/mixture/experts/gate")
    (tmp_path / "source" / "model.json").write_text(json.dumps(document))
    result = flexolmo("convert", f"--source={tmp_path}/source", f"--out={tmp_path}/out")
    assert (result.status, result.err) == (0, "")
    assert "without the owners' manifests of code, press" in result.out
    assert [expert.contribution for expert in read_model(tmp_path / "out").experts] == [None] * 3


def test_a_certificate_names_the_new_digests_of_those_that_remain(home, tmp_path):
    shutil.copytree(FORMAT1 / "merged", tmp_path / "source")
    lines = [{"name": name, "digest": "0"} for name in ("anchor", "code", "press")]
    certificate = {"removed": [{"name": "legal", "digest": "1"}], "remaining": lines, "guarantee": "exact"}
    (tmp_path / "source" / "certificate.json").write_text(json.dumps(certificate))
    convert(tmp_path / "source", tmp_path / "out")
    found, manifest = json.loads((tmp_path / "out" / "certificate.json").read_text()), read_model(tmp_path / "out")
    assert found["remaining"] == [{"name": e.name, "digest": e.digest} for e in manifest.experts]
    assert found["removed"] == [{"name": "legal", "digest": "1", "format": 1}]
    assert found["guarantee"] == "exact"
    assert found["anchor_digest"] == read_model(home / "anchor").anchor_digest


@pytest.mark.parametrize("command", ["inspect", "opt-out", "merge"])
def test_format_1_is_named_with_what_converts_it(tmp_path, command):
    arguments = {
        "inspect": [FORMAT1 / "news"],
        "opt-out": [f"--model={FORMAT1}/merged", "--expert=code", f"--out={tmp_path}/out"],
        "merge": [f"--anchor={FORMAT1}/anchor", f"--contribution={FORMAT1}/news", f"--out={tmp_path}/out"],
    }
    result = flexolmo(command, *arguments[command])
    assert_refused(result, command, "format 1; convert it: flexolmo convert --source=", " --out=DIR")


def changed(path, file, change):
    data = bytearray((path / file).read_bytes())
    (path / file).write_bytes(change(data))


def flip(data):
    data[0] ^= 1
    return data


@pytest.mark.parametrize(
    ("name", "file", "change", "word"),
    [
        ("anchor", "params/head/c.0.0", flip, "leaf head: altered"),
        ("merged", "params/blocks.mixture.experts.row/c.0.1.0", flip, "altered"),
        ("tuned", "merged_router/blocks.mixture.experts.row/c.0.0.0", flip, "altered"),
        ("merged", "model.json", lambda data: data.replace(b'"data of news"', b'"data of newt"', 1), "card of press"),
        ("merged", "model.json", lambda data: data[:-9], "model.json: damaged"),
        ("merged", "model.json", lambda data: data.replace(b'"top_k"', b'"top"'), "model.json: damaged"),
        ("anchor", "notes.txt", lambda data: b"x", "holds notes.txt"),
        ("news", "params/row/c.0.0", flip, "altered"),
    ],
)
def test_what_is_not_as_its_digests_say_is_refused(tmp_path, name, file, change, word):
    shutil.copytree(FORMAT1 / name, tmp_path / "source")
    (tmp_path / "source" / file).touch()
    changed(tmp_path / "source", file, change)
    anchor = [f"--anchor={FORMAT1}/anchor"] if name == "news" else []
    result = flexolmo("convert", f"--source={tmp_path}/source", f"--out={tmp_path}/out", *anchor)
    assert_refused(result, "convert", tmp_path / "source", word)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_casts_cannot_be_converted(tmp_path):
    """What the owners published is not in the directory."""
    shutil.copytree(FORMAT1 / "merged", tmp_path / "source")
    document = json.loads((tmp_path / "source" / "model.json").read_text())
    for record in document["experts"]:
        record["casts"] = {"up": {"dtypes": ["bfloat16", "float32"], "digest": record["leaves"]["up"]}}
        record["leaves"]["up"] = "0"
    (tmp_path / "source" / "model.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match="leaves that were cast"):
        convert(tmp_path / "source", tmp_path / "out")


def test_a_contribution_needs_its_own_anchor(home, tmp_path):
    arguments = [f"--source={FORMAT1}/news", f"--out={tmp_path}/out"]
    assert_refused(flexolmo("convert", *arguments), "convert", f"--source={FORMAT1}/news", "anchor")
    assert_refused(flexolmo("convert", *arguments, f"--anchor={home}/anchor"), "convert", "only format 1 is converted")
    shutil.copytree(FORMAT1 / "news", tmp_path / "news")
    file = tmp_path / "news" / "contribution.json"
    file.write_text(file.read_text().replace('"anchor_digest": "', '"anchor_digest": "0'))
    arguments = [f"--source={tmp_path}/news", f"--anchor={FORMAT1}/anchor", f"--out={tmp_path}/out"]
    assert_refused(flexolmo("convert", *arguments), "convert", "another anchor")


def test_format_2_is_not_converted(home, tmp_path):
    result = flexolmo("convert", f"--source={home}/anchor", f"--out={tmp_path}/out")
    assert_refused(result, "convert", "format 2; only format 1 is converted")
