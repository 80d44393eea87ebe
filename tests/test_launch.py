"""The launch scripts print help, refuse a Python they cannot use, and run valid commands."""

import pathlib
import shlex
import subprocess

import pytest

from flexolmo_jax.benchmark import run
from flexolmo_jax.model.architecture import PAIR, Layout
from flexolmo_jax.training.run import build_model
from tests import conftest
from tests.support import small

LAUNCH = pathlib.Path(__file__).parent.parent / "launch"


@pytest.mark.parametrize(
    "script", ["benchmark_gpu.sh", "benchmark_merge.sh", "check_terms.sh", "check_vllm.sh", "quickstart.sh", "test.sh"]
)
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


# ml_collections loads configuration files with a deprecated method of Python.
@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_the_gpu_script_runs_valid_commands(tmp_path, monkeypatch):
    script = ["bash", str(LAUNCH / "benchmark_gpu.sh"), "--dry-run", "out"]
    printed = subprocess.run(script, capture_output=True, text=True, cwd=tmp_path, check=True).stdout
    commands = [shlex.split(line) for line in printed.splitlines()]
    assert not list(tmp_path.iterdir())
    on_gpu = ["env", "JAX_PLATFORMS=cuda,cpu", "python", "-m", "pytest"]
    tests = [command[len(on_gpu) :] for command in commands if command[: len(on_gpu)] == on_gpu]
    assert all((LAUNCH.parent / path).exists() for paths in tests for path in paths)

    models = []

    def benchmark(config, steps, *_, **__):
        models.extend(build_model(run.prepared(config, step))[0] for step in steps)
        return []

    monkeypatch.chdir(LAUNCH.parent)
    monkeypatch.setattr(run, "benchmark", benchmark)
    runs = [command[3:] for command in commands if command[:3] == ["python", "-m", "flexolmo_jax"]]
    for arguments in runs:
        assert small.flexolmo(*arguments).status == 0, arguments
    assert commands[len(tests)] == ["python", "benchmarks/kernels.py"]
    assert len(tests) + 1 + len(runs) == len(commands)
    sizes = [(model.layout, model.architecture.d_model, model.compute.dtype) for model in models]
    assert sizes == [
        (PAIR, 128, "float32"),
        (PAIR, 4096, "bfloat16"),
        (Layout("stacked", 4, 2), 2048, "bfloat16"),
    ]
    assert len(list((tmp_path / "out").glob("*.json"))) == len(runs)


def test_an_unknown_option_of_the_gpu_script_is_refused(tmp_path):
    script = ["bash", str(LAUNCH / "benchmark_gpu.sh"), "--dryrun"]
    result = subprocess.run(script, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (result.returncode, result.stdout) == (2, "")
    assert "--dryrun" in result.stderr


def test_modules_of_the_fast_tests_exist():
    for path in conftest.FAST:
        assert (LAUNCH.parent / path).exists(), path


def test_every_script_is_valid_shell():
    for script in LAUNCH.glob("*.sh"):
        subprocess.run(["bash", "-n", str(script)], check=True)
