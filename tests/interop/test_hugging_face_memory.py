"""Import and export hold a few tensors, however large the model is; what needs all of it is done where it fits."""

import json
import subprocess
import sys
import types

import numpy as np
import psutil
import pytest

from flexolmo_jax.checkpoint.manifests import DEFAULT_LENGTH
from flexolmo_jax.checkpoint.model_directory import read_model
from flexolmo_jax.checkpoint.params import Slice
from flexolmo_jax.interop import config, parity
from flexolmo_jax.interop.architectures import FLEX_OLMO, OLMO2
from flexolmo_jax.interop.safetensors_io import write_tensors
from flexolmo_jax.interop.tensors import each_tensor
from flexolmo_jax.model.architecture import Architecture
from tests.support import golden, small
from tests.support.small import assert_refused, flexolmo

RUN = """
import re, sys
sys.modules["torch"] = None  # no comparison of logits, which needs a whole model
from flexolmo_jax.checkpoint import digests
from flexolmo_jax.interop import safetensors_io
from flexolmo_jax.interop.export_hf import export, open_source
from flexolmo_jax.interop.import_hf import import_model
# A chunk is less than a matrix, so that both are filled whatever the size of the model.
digests.CHUNK_BYTES = safetensors_io.CHUNK_BYTES = 2**19
for home in sys.argv[1:]:
    for command in ("import", "export"):
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the peak begins at the memory in use
        if command == "import":
            lines = import_model(f"{home}/source", f"{home}/model")[1]
        else:
            lines = export(open_source(f"{home}/model"), f"{home}/out")
        assert any("logits were not compared" in line for line in lines), lines
        # Not ru_maxrss, which a process inherits from the one that started it.
        print(command, 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]))
"""


def peaks(*homes):
    """Imports and exports in one process of their own; returns its peak memory in bytes, [(command, peak)]."""
    result = subprocess.run([sys.executable, "-c", RUN, *homes], capture_output=True, text=True, timeout=300)
    assert (result.returncode, result.stderr) == (0, "")
    return [(command, int(peak)) for command, peak in map(str.split, result.stdout.splitlines())]


def source(path, layers, experts):
    """Writes a random FlexOlmo; returns its size in bytes."""
    arch = Architecture(
        vocab_size=512, num_layers=layers, d_model=256, num_heads=4, num_kv_heads=2, d_ff=1024, rope_theta=1e4,
        norm_eps=1e-6,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    table = dict(each_tensor(FLEX_OLMO.names, arch, experts))
    path.mkdir()
    tensors = {name: (tensor.shape, np.dtype(np.float32)) for name, tensor in table.items()}
    write_tensors(path, tensors, lambda name: rng.random(table[name].shape, np.float32), shard_bytes=10**8)
    document = {
        "model_type": "flex_olmo", "vocab_size": 512, "hidden_size": 256, "intermediate_size": 1024,
        "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-6,
        "rope_theta": 1e4, "num_experts": experts, "num_experts_per_tok": 2, "eos_token_id": 0,
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(document))
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_does_not_grow_with_the_model(tmp_path):
    """First a small model, then a large one."""
    homes = tmp_path / "small", tmp_path / "large"
    for home in homes:
        home.mkdir()
    growth = source(homes[1] / "source", 6, 8) - source(homes[0] / "source", 2, 2)
    found = peaks(*homes)
    assert [command for command, _ in found] == ["import", "export"] * 2
    for (_, of_small), (_, of_large) in zip(found[:2], found[2:], strict=True):
        assert of_large - of_small < 0.1 * growth


def leave_free(monkeypatch, size):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: types.SimpleNamespace(available=size))


def refuse(*_):
    raise AssertionError("a whole model was asked for")


def test_a_model_is_in_memory_only_where_it_fits_twice_in_float32(monkeypatch):
    shared = {"a": Slice(np.zeros((3, 5), np.float16), None, "a")}
    experts = {name: {"b": Slice(np.zeros((2, 2, 5_000_000), np.float16), i, "b")} for i, name in enumerate("xy")}
    leave_free(monkeypatch, 2 * 4 * 20_000_015)
    assert parity.too_large(shared, experts) == ""
    leave_free(monkeypatch, 2 * 4 * 20_000_015 - 1)
    assert parity.too_large(shared, experts) == "needs about 0.2 GB of memory, 0.2 are free"
    leave_free(monkeypatch, 0)
    assert parity.too_large(shared, experts) == "needs about 0.2 GB of memory, 0.0 are free"


def test_logits_of_what_does_not_fit_are_not_compared(tmp_path, monkeypatch):
    monkeypatch.setattr(parity, "transformers_installed", lambda: True)
    monkeypatch.setattr(parity, "_transformers_logits", refuse)
    monkeypatch.setattr(parity, "in_memory", refuse)
    leave_free(monkeypatch, 0)
    reason = "needs about 0.0 GB of memory, 0.0 are free"
    for command, flag in (
        ("import-hf", f"--source={golden.GOLDEN / golden.MIXTURE}"),
        ("export-hf", f"--model={tmp_path}/import-hf"),
    ):
        result = flexolmo(command, flag, f"--out={tmp_path}/{command}")
        assert (result.status, result.err) == (0, "")
        assert f"logits were not compared: {reason}\n" in result.out
    note = read_model(tmp_path / "import-hf").experts[0].card["imported"]
    assert (note["logits"], note["because"]) == ("not compared", reason)
    assert (
        f"were not compared with those of transformers: {reason}." in (tmp_path / "export-hf" / "README.md").read_text()
    )


@pytest.mark.parametrize(
    ("sequence_length", "length"), [("long", 64), (-3, 64), (0, 64), (True, 64), (None, 64), (16, 16)]
)
def test_logits_are_compared_over_no_more_tokens_than_the_model_was_trained_on(
    tmp_path, monkeypatch, sequence_length, length
):
    small.anchor(tmp_path / "anchor")
    manifest = read_model(tmp_path / "anchor")
    anchor = manifest.experts[0].but(card={config.SEQUENCE_LENGTH: sequence_length})
    manifest = manifest.but(experts=[anchor])
    monkeypatch.setattr(parity, "transformers_installed", lambda: True)
    monkeypatch.setattr(parity, "in_memory", lambda *_: None)
    for side in ("_transformers_logits", "our_logits"):
        monkeypatch.setattr(parity, side, lambda _, tokens, *kind: np.zeros((*tokens.shape, 3), np.float32))
    assert parity.compare_logits(tmp_path, manifest, {}, {}, OLMO2, {}).tokens == parity.BATCH * length
    assert manifest.context_length == (16 if length == 16 else DEFAULT_LENGTH)


@pytest.fixture(scope="module")
def biased(tmp_path_factory):
    home = tmp_path_factory.mktemp("biased")
    small.anchor(home / "anchor")
    small.contribution(home / "news", home / "anchor", seed=1)
    flexolmo("merge", f"--anchor={home}/anchor", f"--contribution={home}/news", f"--out={home}/merged")
    return home / "merged"


def test_biases_are_not_dropped_where_the_change_cannot_be_measured(biased, tmp_path, monkeypatch):
    monkeypatch.setattr(parity, "in_memory", refuse)
    leave_free(monkeypatch, 0)
    result = flexolmo("export-hf", f"--model={biased}", f"--out={tmp_path}/out", "--drop_bias")
    assert_refused(result, "export-hf", "--drop_bias", "needs about 0.0 GB of memory, 0.0 are free", "more memory")
    assert not list(tmp_path.iterdir())


def test_an_existing_out_is_seen_before_the_model_is_loaded(biased, tmp_path, monkeypatch):
    monkeypatch.setattr(parity, "in_memory", refuse)
    result = flexolmo("export-hf", f"--model={biased}", f"--out={tmp_path}", "--drop_bias")
    assert_refused(result, "export-hf", f"--out={tmp_path}", "exists already")


def test_a_shard_size_is_a_number(biased, tmp_path):
    result = flexolmo("export-hf", f"--model={biased}", f"--out={tmp_path}/out", "--drop_bias", "--shard_size=nan")
    assert_refused(result, "export-hf", "--shard_size=nan", "in GB")
    assert not list(tmp_path.iterdir())
