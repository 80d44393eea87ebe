"""Import and export hold a few tensors, however large the model is: peak memory of processes of their own."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest

from flexolmo_jax.interop import names
from flexolmo_jax.interop.safetensors_io import write_tensors
from flexolmo_jax.model.architecture import Architecture

RUN = """
import re, sys
sys.modules["torch"] = None  # no comparison of logits, which needs a whole model
from flexolmo_jax import cli
from flexolmo_jax.checkpoint import tree
from flexolmo_jax.interop import safetensors_io
# A block is less than a matrix, so that both are filled whatever the size of the model.
tree.BLOCK_BYTES = safetensors_io.PIECE_BYTES = 2**19
cli.main(sys.argv[1:])
# Not ru_maxrss, which a process inherits from the one that started it.
print("peak", 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]))
"""


def peak(*arguments):
    """Runs the command line in a process of its own; returns its peak memory in bytes."""
    result = subprocess.run([sys.executable, "-c", RUN, *arguments], capture_output=True, text=True, timeout=300)
    assert (result.returncode, result.stderr) == (0, "")
    assert "logits were not compared" in result.stdout
    return int(re.search(r"peak (\d+)", result.stdout)[1])


def source(path, layers, experts):
    """Writes a random FlexOlmo; returns its size in bytes."""
    arch = Architecture(
        vocab_size=512, num_layers=layers, d_model=256, num_heads=4, num_kv_heads=2, d_ff=1024, rope_theta=1e4,
        norm_eps=1e-6,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    table = names.tensors(arch, experts)
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


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_does_not_grow_with_the_model(tmp_path):
    sizes, peaks = {}, {}
    for layers, experts in ((2, 2), (6, 8)):
        home = tmp_path / f"{layers}x{experts}"
        home.mkdir()
        sizes[layers] = source(home / "source", layers, experts)
        peaks["import-hf", layers] = peak("import-hf", f"--source={home}/source", f"--out={home}/model")
        peaks["export-hf", layers] = peak("export-hf", f"--model={home}/model", f"--out={home}/out")
    growth = sizes[6] - sizes[2]
    for verb in ("import-hf", "export-hf"):
        assert peaks[verb, 6] - peaks[verb, 2] < 0.1 * growth
