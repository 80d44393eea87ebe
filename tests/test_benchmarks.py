"""The benchmark of generation, on a model of a few thousand parameters."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).parent.parent / "benchmarks" / "generation.py"


def test_it_compares_what_writes_the_same_tokens(tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    sizes = dict(d_model=32, d_ff=48, layers=2, heads=2, vocab=300, prompt=9, new=12, runs=1)
    arguments = [f"--{name}={size}" for name, size in sizes.items()]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments, "--batch", "1", "3", "--json", str(tmp_path / "figures.json")],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    one, three = json.loads((tmp_path / "figures.json").read_text())["results"]
    assert (one["batch"], three["batch"]) == (1, 3)
    for figures in (one, three):
        assert figures["same_tokens"]
        assert figures["ratio"] > 0
        assert f"{figures['ratio']:.2f} times the best of transformers" in done.stdout

    # A token's 2 of 4 experts, and the 3.5 of 4 that three tokens reach: of 8 matrices of 32 x 48 in each of 2 layers.
    def read(figures):
        return figures["step_gigabytes_per_second"] * figures["step_ms"]

    assert read(three) - read(one) == pytest.approx(1.5 * 3 * 2 * 32 * 48 * 4 / 1e6, rel=0.01)
