"""The benchmarks, on models of a few thousand parameters."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

BENCHMARKS = pathlib.Path(__file__).parent.parent / "benchmarks"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_merging_is_compared_with_copying_as_many_bytes(tmp_path):
    sizes = dict(d_model=32, d_ff=4096, layers=2, heads=2, vocab=300, experts=3, runs=1, pause=0)
    arguments = [f"--{name}={size}" for name, size in sizes.items()]
    files = [f"--directory={tmp_path}", f"--json={tmp_path}/results.json"]
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "merge.py"), *arguments, *files], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    merge, opt_out = json.loads((tmp_path / "results.json").read_text())["results"]
    assert (merge["command"], opt_out["command"]) == ("merge", "opt-out")
    expert = 2 * (3 * 32 * 4096 + 32 + 1) * 4 / 1e9
    assert merge["gigabytes"] - opt_out["gigabytes"] == pytest.approx(expert, rel=0.01)
    for result in (merge, opt_out):
        assert result["copied_gigabytes"] == pytest.approx(result["gigabytes"], rel=0.01)
        assert 0 < result["seconds"] < result["command_seconds"]
        assert result["ratio"] == pytest.approx(result["seconds"] / (result["copy_seconds"] + result["read_seconds"]))
        assert f"{result['command']} of 3" in done.stdout


def test_kernels_are_measured_beside_a_plain_matmul():
    sizes = dict(tokens=256, experts=3, d_model=64, d_ff=96, batch=1, length=128, heads=2, head_dim=16, runs=1)
    arguments = [f"--{name}={size}" for name, size in sizes.items()]
    command = [sys.executable, str(BENCHMARKS / "kernels.py"), *arguments]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"COLUMNS": "120", "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    for name in ("matmul", "grouped: ragged", "grouped: blocks", "blockwise, documents: 1", "blockwise, documents: 8"):
        assert name in done.stdout


def test_tokenizing_is_compared_with_the_batch_encoder(tmp_path):
    sizes = dict(megabytes=0.05, files=2, processes=1, runs=1)
    arguments = [*(f"--{name}={size}" for name, size in sizes.items()), f"--json={tmp_path}/results.json"]
    command = [sys.executable, str(BENCHMARKS / "tokenizing.py"), *arguments, f"--directory={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert 50_000 <= results["bytes"] < 60_000
    seconds = results["seconds"]
    assert seconds["work"] == pytest.approx(seconds["command"] - seconds["start"])
    assert "throughput of the work to that of tokenizers" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_batches_of_both_packings_are_measured():
    sizes = dict(tokens=4096, mean=20, length=64, batch_size=4, batches=2)
    command = [sys.executable, str(BENCHMARKS / "data.py"), *(f"--{name}={size}" for name, size in sizes.items())]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"COLUMNS": "120"})
    assert done.returncode == 0, done.stderr
    cut = {line.split("|")[1].strip(): line.split("|")[3] for line in done.stdout.splitlines() if "%" in line}
    assert float(cut["best_fit"].strip(" %")) < float(cut["concatenate"].strip(" %")) / 3
