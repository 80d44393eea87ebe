"""The quickstart, as the README gives it, in a small setting and from another directory."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from tests.support import runs

ROOT = runs.ROOT
DOMAINS = {"public", "code", "headers", "legal"}


def run(*arguments, cwd):
    # Inside the environment that the scripts make, the script itself is run; elsewhere, what it runs.
    script = ["bash", str(ROOT / "launch" / "quickstart.sh")]
    python = [sys.executable, str(ROOT / "examples" / "quickstart.py")]
    command = script if pathlib.Path(sys.prefix) == ROOT / ".venv" else python
    # The package need not be installed. Unoptimized programs compile faster, and run only a few steps here.
    environment = {**os.environ, "PYTHONPATH": runs.PYTHONPATH, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    return subprocess.run([*command, *arguments], capture_output=True, text=True, check=False, cwd=cwd, env=environment)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    cwd = tmp_path_factory.mktemp("quickstart")
    return cwd / "run", run("run", "--size=small", cwd=cwd)


@pytest.mark.slow
def test_it_ends_well_and_prints_the_table(finished):
    _, result = finished
    assert result.returncode == 0, result.stderr
    for label in ("anchor", "solo:code", "merged", "merged-without:legal"):
        assert f"| {label} " in result.stdout
    assert "identical" in result.stdout


@pytest.mark.slow
def test_results_have_every_model_on_every_domain(finished):
    out, _ = finished
    results = json.loads((out / "results.json").read_text())
    owners = DOMAINS - {"public"}
    models = {"anchor", "merged"} | {f"{kind}:{owner}" for kind in ("solo", "merged-without") for owner in owners}
    assert set(results["bits_per_byte"]) == models
    for scores in results["bits_per_byte"].values():
        assert set(scores) == DOMAINS
        assert all(0 < value < 20 for value in scores.values())
    for shares in results["routing"].values():
        assert set(shares) == {"anchor"} | owners
        assert sum(shares.values()) == pytest.approx(1, abs=1e-4)
    assert results["opt_out"]["identical"] is True
    assert 0.1 < results["settings"]["peak memory of a process, GiB"] < 100


@pytest.mark.slow
def test_every_finding_is_printed_with_its_answer(finished):
    out, result = finished
    findings = json.loads((out / "results.json").read_text())["findings"]
    assert len(findings) == 8
    for finding, holds in findings.items():
        assert f"{'yes' if holds else 'NO '} {finding}: " in result.stdout


@pytest.mark.slow
def test_the_output_folder_holds_everything(finished):
    out, _ = finished
    assert "<svg" in (out / "report.html").read_text()
    for owner in DOMAINS - {"public"}:
        assert (out / owner / "contribution" / "contribution.json").exists()
        assert (out / owner / "metrics.jsonl").exists()
    for model in ("merged", "never-code", "without-code"):
        assert (out / "models" / model / "model.json").exists()


@pytest.mark.slow
def test_a_second_run_into_the_same_folder_is_refused(finished):
    out, _ = finished
    again = run(out.name, "--size=small", cwd=out.parent)
    assert again.returncode != 0
    assert f"{out.name} exists already" in again.stderr
