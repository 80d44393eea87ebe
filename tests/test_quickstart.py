"""The quickstart, as the README gives it, in a small setting."""

import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
DOMAINS = {"public", "code", "headers", "legal"}


def run(*arguments):
    # Inside the environment that the scripts make, the script itself is run; elsewhere, what it runs.
    script = ["bash", str(ROOT / "launch" / "quickstart.sh")]
    python = [sys.executable, str(ROOT / "examples" / "quickstart.py")]
    command = script if pathlib.Path(sys.prefix) == ROOT / ".venv" else python
    return subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("quickstart") / "run"
    return out, run(str(out), "--size=small")


def test_it_ends_well_and_prints_the_table(finished):
    _, result = finished
    assert result.returncode == 0, result.stderr
    for row in ("anchor", "pair:code", "merged", "merged-without:legal"):
        assert f"| {row} " in result.stdout
    assert "identical" in result.stdout


def test_results_have_every_model_on_every_domain(finished):
    out, _ = finished
    results = json.loads((out / "results.json").read_text())
    owners = DOMAINS - {"public"}
    models = {"anchor", "merged"} | {f"{kind}:{owner}" for kind in ("pair", "merged-without") for owner in owners}
    assert set(results["bits_per_byte"]) == models
    for row in results["bits_per_byte"].values():
        assert set(row) == DOMAINS
        assert all(0 < value < 20 for value in row.values())
    for shares in results["routing"].values():
        assert set(shares) == {"anchor"} | owners
        assert sum(shares.values()) == pytest.approx(1, abs=1e-4)
    assert results["opt_out"]["identical"] is True


def test_the_output_folder_holds_everything(finished):
    out, _ = finished
    assert "<svg" in (out / "report.html").read_text()
    for owner in DOMAINS - {"public"}:
        assert (out / owner / "contribution" / "contribution.json").exists()
        assert (out / owner / "metrics.jsonl").exists()
    for model in ("merged", "pair-code", "without-code"):
        assert (out / "models" / model / "model.json").exists()


def test_a_second_run_into_the_same_folder_is_refused(finished):
    out, _ = finished
    again = run(str(out), "--size=small")
    assert again.returncode != 0
    assert str(out) in again.stderr
