"""The launch scripts say what they do without doing it, and refuse a Python they cannot use."""

import pathlib
import subprocess

import pytest

LAUNCH = pathlib.Path(__file__).parent.parent / "launch"


@pytest.mark.parametrize("script", ["benchmark_generation.sh", "quickstart.sh", "test.sh"])
def test_help_names_the_script_and_does_nothing(script, tmp_path):
    result = subprocess.run(
        ["bash", str(LAUNCH / script), "--help"], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert f"bash launch/{script}" in result.stdout
    assert not list(tmp_path.iterdir())


def test_an_unfit_python_is_refused(tmp_path):
    script = f"source {LAUNCH}/environment.sh; find_python"
    result = subprocess.run(
        ["bash", "-c", script],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "PYTHON": "false"},
        check=False,
    )
    assert result.returncode == 2
    assert "3.11 or 3.12" in result.stderr


def test_every_script_is_valid_shell():
    for script in LAUNCH.glob("*.sh"):
        subprocess.run(["bash", "-n", str(script)], check=True)
