"""Merging: streams, does not depend on order, and changes no byte of any expert."""

import itertools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

import flexolmo_jax
from flexolmo_jax.checkpoint import copying, digests
from flexolmo_jax.checkpoint.manifests import ExpertRecord
from flexolmo_jax.checkpoint.model_directory import read_contribution, read_model
from flexolmo_jax.combine.merge import merge
from flexolmo_jax.model.architecture import Architecture
from tests.support import small

ROOT = pathlib.Path(__file__).parents[2]
NAMES = ["code", "legal", "news"]
TOKENS = np.random.default_rng(0).integers(0, 256, (2, 12))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """An anchor, three contributions, three copies of the anchor, and the merge of the contributions."""
    home = tmp_path_factory.mktemp("merge")
    small.anchor(home / "anchor")
    for seed, name in enumerate(NAMES, 1):
        small.contribution(home / name, home / "anchor", seed=seed)
        small.contribution(home / f"copy-{name}", home / "anchor")
    merge(home / "anchor", [home / name for name in NAMES], home / "merged", top_k=2)
    return home


@pytest.mark.parametrize("order", list(itertools.permutations(NAMES)), ids="-".join)
def test_any_order_gives_the_same_bytes(home, tmp_path, order):
    merge(home / "anchor", [home / name for name in order], tmp_path / "merged", top_k=2)
    assert small.files(tmp_path / "merged") == small.files(home / "merged")


def test_holds_the_anchor_and_a_plain_stack_of_experts(home):
    anchor, merged = small.read_params(home / "anchor"), small.read_params(home / "merged")
    experts = [small.read_params(home / name) for name in NAMES]
    expected = {path: leaf for path, leaf in anchor.items() if "moe/" not in path}
    for leaf in experts[0]:
        parts = [anchor[f"blocks/moe/anchor/{leaf}"], *(expert[leaf] for expert in experts)]
        expected[f"blocks/moe/experts/{leaf}"] = np.stack(parts, axis=1)
    assert merged.keys() == expected.keys()
    for path, leaf in expected.items():
        assert merged[path].dtype == leaf.dtype
        np.testing.assert_array_equal(merged[path], leaf)
    assert (home / "merged" / "tokenizer.json").read_bytes() == (home / "anchor" / "tokenizer.json").read_bytes()


def test_several_chunks_a_leaf_give_the_same_content(home, tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "CHUNK_BYTES", 100)
    small.anchor(tmp_path / "anchor")
    for seed, name in enumerate(NAMES, 1):
        small.contribution(tmp_path / name, tmp_path / "anchor", seed=seed)
    merge(tmp_path / "anchor", [tmp_path / name for name in NAMES], tmp_path / "merged", top_k=2)
    chunks = len(small.files(tmp_path / "merged")) / len(small.files(home / "merged"))
    assert chunks > 5
    merged = small.read_params(home / "merged")
    for path, leaf in small.read_params(tmp_path / "merged").items():
        np.testing.assert_array_equal(leaf, merged[path])


def test_an_expert_has_the_same_digest_in_its_contribution_and_every_merge(home, tmp_path):
    merge(home / "anchor", [home / "news"], tmp_path / "pair", top_k=2)
    models = [read_model(path) for path in (home / "merged", tmp_path / "pair", home / "anchor")]
    contribution = read_contribution(home / "news")
    assert [models[i].experts[-1] for i in (0, 1)] == [ExpertRecord.of(contribution)] * 2
    assert len({model.experts[0].digest for model in models}) == 1
    assert {model.anchor_digest for model in models} == {contribution.anchor_digest}


@pytest.mark.parametrize(("top_k", "tolerance"), [(4, 1e-5), (1, 1e-2)])
def test_untouched_copies_compute_what_the_anchor_computes(home, tmp_path, top_k, tolerance):
    """With all of them, exactly; with fewer, up to the epsilon of the norm that removes the scale."""
    merge(home / "anchor", [home / f"copy-{name}" for name in NAMES], tmp_path / "merged", top_k)
    expected = np.asarray(flexolmo_jax.load(home / "anchor").logits(TOKENS))
    found = np.asarray(flexolmo_jax.load(tmp_path / "merged").logits(TOKENS))
    assert expected.std() > 0.5
    np.testing.assert_allclose(found, expected, atol=tolerance)
    # The experts that differ from the anchor do change the logits.
    if top_k == 4:
        other = np.asarray(flexolmo_jax.load(home / "merged").logits(TOKENS))
        assert np.abs(other - expected).max() > 0.1


KILLED = """
import sys, time
from tests.support import small
from flexolmo_jax.checkpoint import copying
from flexolmo_jax.combine.merge import merge

chunks, read_chunk_file = [], copying.read_chunk_file

def slow_read(*args):
    chunks.append(args)
    if len(chunks) == 15:
        print("in the middle", flush=True)
        time.sleep(600)
    return read_chunk_file(*args)

copying.read_chunk_file = slow_read
merge(sys.argv[1], sys.argv[3:], sys.argv[2], top_k=2)
"""


def python(code, *arguments, **options):
    """A process of its own, that finds the project and the test modules."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, **options)


def test_a_killed_merge_leaves_nothing_under_its_name_and_the_next_succeeds(home, tmp_path):
    out = tmp_path / "out" / "merged"
    inputs = [home / name for name in NAMES]
    with python(KILLED, home / "anchor", out, *inputs) as process:
        assert process.stdout.readline() == "in the middle\n"
        process.send_signal(signal.SIGKILL)
    assert [path.name for path in out.parent.iterdir()] == [".merged.incomplete"]
    merge(home / "anchor", inputs, out, top_k=2)
    assert [path.name for path in out.parent.iterdir()] == ["merged"]
    assert small.files(out) == small.files(home / "merged")


PEAK = """
import re, sys
from flexolmo_jax.combine.merge import merge

def peak():  # not ru_maxrss, which a process inherits from the one that started it
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])

before = peak()
merge(sys.argv[1], sys.argv[3:], sys.argv[2], top_k=2)
print(peak() - before)
"""


def test_peak_memory_does_not_grow_with_the_number_of_experts(tmp_path):
    wide = Architecture(
        vocab_size=8, num_layers=2, d_model=512, num_heads=2, num_kv_heads=1, d_ff=6144, rope_theta=1e4, norm_eps=1e-6
    )
    leaves = {path: np.ones(shape, np.float32) for path, shape in small.shapes(wide).items()}
    small.anchor(tmp_path / "anchor", architecture=wide, leaves=leaves)
    leaf_bytes = leaves["blocks/moe/anchor/gate"].nbytes
    assert leaf_bytes > 1.4 * digests.CHUNK_BYTES
    small.contribution(tmp_path / "x0", tmp_path / "anchor")
    document = json.loads((tmp_path / "x0" / "contribution.json").read_text())
    for i in range(1, 8):  # the same weights under other names: no need to write them again
        shutil.copytree(tmp_path / "x0", tmp_path / f"x{i}", copy_function=os.link)
        (tmp_path / f"x{i}" / "contribution.json").unlink()
        (tmp_path / f"x{i}" / "contribution.json").write_text(json.dumps(document | {"name": f"x{i}"}))
        small.reseal(tmp_path / f"x{i}" / "contribution.json")
    peaks = {}
    for count in (2, 8):
        inputs = [tmp_path / f"x{i}" for i in range(count)]
        with python(PEAK, tmp_path / "anchor", tmp_path / "merged", *inputs) as process:
            peaks[count] = int(process.communicate()[0])
        assert process.returncode == 0
        subprocess.run(["rm", "-r", tmp_path / "merged"], check=True)
    # The six experts more are 18 leaves more, and a stacked leaf alone is six leaves larger.
    assert peaks[8] - peaks[2] < digests.CHUNK_BYTES < leaf_bytes / 1.4
    # The threads hold buffers; a chunk for each would be more than this with two threads, besides what reads it.
    assert peaks[8] < copying.COPY_THREADS * leaf_bytes / 2 + digests.CHUNK_BYTES
