"""The launch scripts print help, refuse a Python they cannot use, and run valid commands.

Launchers start a `flexolmo` that is made up, through a made-up `gcloud` where they need one; tests/test_launch_runs.py
starts the real one.
"""

import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import string
import subprocess
import sys
import time

import pytest
import yaml

from flexolmo_jax.benchmark import run
from flexolmo_jax.model.architecture import PAIR, Layout
from flexolmo_jax.training.run import build_model
from tests import conftest
from tests.support import small

LAUNCH = pathlib.Path(__file__).parent.parent / "launch"


@pytest.mark.parametrize(
    "script",
    [
        *("benchmark_gpu.sh", "benchmark_merge.sh", "check_terms.sh", "check_vllm.sh", "quickstart.sh", "test.sh"),
        *("local.sh", "queued_resource.sh", "xpk.sh", "gke.sh", "owners.sh"),
    ],
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
    for script in [*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch"]:
        subprocess.run(["bash", "-n", str(script)], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", *(LAUNCH / name for name in LAUNCHERS)], check=True)


@pytest.mark.skipif(not shutil.which("hadolint"), reason="needs hadolint")
def test_dockerfiles_keep_to_good_practice():
    done = subprocess.run(["hadolint", *(LAUNCH / "docker").glob("*.Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


LAUNCHERS = ("local.sh", "slurm.sbatch", "gke.sh", "queued_resource.sh", "xpk.sh", "owners.sh")
JOBS = {
    "anchor": ["train", "--config=configs/anchor.py:7b", "--workdir=/data/anchor", "--config.data.train=/data/public"],
    "expert": [
        *(
            "train",
            "--config=configs/expert.py:7b",
            "--workdir=/data/runs/news",
            "--config.start_from=/data/anchor/model",
        ),
        *(
            "--config.expert=news",
            "--config.data.train=/data/news",
            '--config.card.description=Today\'s news, $5 a "day"',
        ),
    ],
    "router": [
        *("train", "--config=configs/router.py:7b", "--workdir=/data/tuned", "--config.start_from=/data/model"),
        "--config.data.train=/data/public",
    ],
    "merge": [
        "merge",
        "--anchor=/data/anchor/model",
        "--contribution=/data/runs/news/contribution",
        "--out=/data/model",
    ],
}
SCHEMA = LAUNCH.parent.parent / "shared" / "schemas" / "jobset-v1alpha2.schema.json"


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Writes made-up programs, {name: text}, which are found before all others."""
    folder = tmp_path / "programs"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("FOLDER", str(tmp_path))

    def write(**texts):
        for name, text in texts.items():
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)

    return write


# Writes its arguments as a line of JSON.
RECORD = f"""#!{sys.executable}
import json, os, sys
with open(os.environ["FOLDER"] + "/" + os.path.basename(sys.argv[0]), "a") as file:
    print(json.dumps(sys.argv[1:]), file=file)
"""
# `flexolmo train` as process N of the run: does what $BEHAVIOUR names.
PROCESS = """#!/usr/bin/env bash
process=${*: -1} process=${process#--process_id=}
case $BEHAVIOUR$process in
  fails1) exit 2 ;;
  fails*) trap 'exit 75' TERM ;;
  ignored0) exit 75 ;;
  ignored*) trap '' TERM ;;
  stops*) trap 'echo saved; exit 143' TERM ;;
esac
echo "ready $process"
[ $BEHAVIOUR = ends ] || while true; do sleep 0.05; done
"""


def launch(script, *arguments, **options):
    command = ["bash", str(LAUNCH / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, **options)


def recorded(tmp_path, program="flexolmo"):
    return [json.loads(line) for line in (tmp_path / program).read_text().splitlines()]


def test_local_processes_know_each_other_and_their_output_is_told_apart(programs, monkeypatch):
    programs(flexolmo=PROCESS)
    monkeypatch.setenv("BEHAVIOUR", "ends")
    result = launch("local.sh", "--processes=3", *JOBS["anchor"])
    assert (result.returncode, result.stdout) == (0, "ready 0\n")
    assert sorted(result.stderr.splitlines()) == ["[1] ready 1", "[2] ready 2"]


@pytest.mark.parametrize("job", JOBS)
def test_local_passes_arguments_on(job, programs, tmp_path):
    programs(flexolmo=RECORD)
    assert launch("local.sh", "--processes=2", *JOBS[job]).returncode == 0
    commands = recorded(tmp_path)
    if job == "merge":
        assert commands == [JOBS[job]]
        return
    assert [command[:-3] for command in commands] == [JOBS[job]] * 2
    assert len({command[-3] for command in commands}) == 1
    assert re.fullmatch(r"--coordinator=localhost:\d+", commands[0][-3])
    assert {tuple(command[-2:]) for command in commands} == {
        ("--num_processes=2", "--process_id=0"),
        ("--num_processes=2", "--process_id=1"),
    }


def test_a_local_process_that_fails_ends_all(programs, monkeypatch):
    programs(flexolmo=PROCESS)
    monkeypatch.setenv("BEHAVIOUR", "fails")
    result = launch("local.sh", "--processes=3", "train")
    assert result.returncode == 2
    assert "process 1 of 3 ended first, with exit status 2" in result.stderr


def test_a_local_process_that_ignores_sigterm_is_killed(programs, monkeypatch):
    programs(flexolmo=PROCESS)
    monkeypatch.setenv("BEHAVIOUR", "ignored")
    assert launch("local.sh", "--processes=2", "--grace=1", "train").returncode == 75


def test_sigterm_goes_to_all_local_processes(programs, monkeypatch):
    programs(flexolmo=PROCESS)
    monkeypatch.setenv("BEHAVIOUR", "stops")
    script = subprocess.Popen(
        ["bash", str(LAUNCH / "local.sh"), "--processes=2", "train"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines = [script.stdout.readline() for _ in range(2)]
    assert sorted(lines) == ["[1] ready 1\n", "ready 0\n"]
    script.send_signal(signal.SIGTERM)
    rest, _ = script.communicate(timeout=30)
    assert script.returncode == 143
    assert {"saved", "[1] saved"} <= set(rest.splitlines())


def slice_flags(script):
    """Flags of a launcher that describe a slice."""
    return {
        "xpk.sh": ["--cluster=tpus", "--name=news", "--image=example.org/flexolmo-tpu:1", "--tpu_type=v5litepod-16"],
        "queued_resource.sh": [
            *("--name=news", "--zone=us-west4-a", "--accelerator_type=v5litepod-16", "--nfs=10.0.0.2:/share"),
            "--image=us-docker.pkg.dev/project/flexolmo-tpu:1",
        ],
        "gke.sh": [
            *("--kind=tpu", "--name=news", "--image=example.org/flexolmo-tpu:1", "--claim=shared"),
            *("--accelerator=tpu-v5-lite-podslice", "--topology=4x4", "--hosts=4"),
        ],
    }[script]


@pytest.mark.parametrize("script", ["xpk.sh", "queued_resource.sh"])
def test_dry_runs_print_the_commands(script):
    golden = LAUNCH.parent / "tests" / "data_files" / "launch" / f"{script}.txt"
    printed = [launch(script, "--dry_run", *slice_flags(script), *JOBS[job]) for job in ("expert", "merge")]
    assert [result.returncode for result in printed] == [0, 0]
    assert "".join(result.stdout for result in printed) == golden.read_text()


@pytest.mark.parametrize("script", ["xpk.sh", "queued_resource.sh", "gke.sh"])
def test_a_slice_is_described_whole(script):
    for flag in slice_flags(script):
        name = flag.split("=")[0]
        if name in ("--nfs", "--hosts"):
            continue
        result = launch(
            script, "--dry_run", *(other for other in slice_flags(script) if other != flag), *JOBS["anchor"]
        )
        assert (result.returncode, result.stdout) == (2, "")
        assert f"give {name}" in result.stderr
    assert "--typo" in launch(script, "--typo=1", "train").stderr
    assert "give a command" in launch(script, *slice_flags(script)).stderr


@pytest.mark.parametrize("job", JOBS)
def test_xpk_runs_the_command_on_each_host(job, programs, tmp_path):
    programs(flexolmo=RECORD)
    submit = shlex.split(launch("xpk.sh", "--dry_run", *slice_flags("xpk.sh"), *JOBS[job]).stdout)
    (command,) = [word.removeprefix("--command=") for word in submit if word.startswith("--command=")]
    for worker in "01":
        subprocess.run(["bash", "-c", command], env={**os.environ, "TPU_WORKER_ID": worker}, check=True)
    assert recorded(tmp_path) == ([JOBS[job]] if job == "merge" else [[*JOBS[job], "--distributed"]] * 2)


# Tells of a slice that is preempted once, and runs what is to be run there.
GCLOUD = f"""#!{sys.executable}
import os, pathlib, subprocess, sys
folder, words = pathlib.Path(os.environ["FOLDER"]), sys.argv[3:5]
with open(folder / "gcloud", "a") as file:
    print(*words, file=file)
state = folder / "state"
match words:
    case "queued-resources", "create":
        state.write_text("PROVISIONING")
    case "queued-resources", "delete":
        state.unlink()
    case "queued-resources", "describe":
        if not state.exists():
            sys.exit(1)
        print(state.read_text())
        if state.read_text() == "PROVISIONING":
            state.write_text("ACTIVE")
    case "tpu-vm", "ssh":
        first = not (folder / "flexolmo").exists()
        command = next(word for word in sys.argv if word.startswith("--command="))
        subprocess.run(["bash", "-c", command.removeprefix("--command=")])
        if first and "PREEMPTED" in os.environ:
            state.write_text("SUSPENDED")
            sys.exit(255)
        sys.exit(int(os.environ.get("STATUS", 0)))
"""
SUDO = """#!/usr/bin/env bash
while [[ $# -gt 0 && $1 != */flexolmo-tpu:1 ]]; do shift; done
[ $# = 0 ] || exec flexolmo "${@:2}"
"""


def run_queued(job, programs, **environment):
    programs(flexolmo=RECORD, gcloud=GCLOUD, sudo=SUDO)
    return launch(
        "queued_resource.sh", "--poll=0", *slice_flags("queued_resource.sh"), *JOBS[job], env=os.environ | environment
    )


@pytest.mark.parametrize("job", JOBS)
def test_a_slice_is_requested_used_and_deleted(job, programs, tmp_path):
    assert run_queued(job, programs).returncode == 0
    assert recorded(tmp_path) == [JOBS[job] if job == "merge" else [*JOBS[job], "--distributed"]]
    assert (tmp_path / "gcloud").read_text().splitlines() == [
        *("queued-resources describe", "queued-resources create"),
        *["queued-resources describe"] * 2,
        *("tpu-vm ssh", "queued-resources delete"),
    ]


def test_a_preempted_slice_is_requested_again(programs, tmp_path):
    result = run_queued("expert", programs, PREEMPTED="yes")
    assert result.returncode == 0
    assert "exit status 255, restart 1" in result.stderr
    assert len(recorded(tmp_path)) == 2
    calls = (tmp_path / "gcloud").read_text().splitlines()
    assert [call.split()[-1] for call in calls if "describe" not in call] == ["create", "ssh", "delete"] * 2


def test_bad_input_is_not_tried_again_on_a_slice(programs, tmp_path):
    assert run_queued("expert", programs, STATUS="2").returncode == 2
    assert len(recorded(tmp_path)) == 1
    assert not (tmp_path / "state").exists()


def test_a_slice_that_fails_again_and_again_is_given_up(programs, tmp_path):
    programs(flexolmo=RECORD, gcloud=GCLOUD, sudo=SUDO)
    flags = [*slice_flags("queued_resource.sh"), "--restarts=2", "--poll=0"]
    result = launch("queued_resource.sh", *flags, "train", env=os.environ | {"STATUS": "75"})
    assert result.returncode == 75
    assert len(recorded(tmp_path)) == 3


def fill(template, **values):
    """A JobSet as `envsubst` makes it."""
    names = dict(NAME="news", IMAGE="example.org/flexolmo:1", CLAIM="shared", ACCELERATOR="kind", TOPOLOGY="4x4")
    numbers = dict(HOSTS="4", CHIPS="4", SLICES="2", RESTARTS="100", ARGUMENTS="--workdir=/data/a")
    text = string.Template(template.read_text()).safe_substitute(names | numbers | values)
    assert "${" not in text
    return text


@pytest.mark.parametrize("kind", ["tpu", "gpu", "cpu"])
def test_jobsets_have_their_schema(kind, tmp_path):
    path = tmp_path / "jobset.yaml"
    path.write_text(fill(LAUNCH / "gke" / f"{kind}.yaml"))
    yaml.safe_load(path.read_text())
    if not SCHEMA.exists() or not shutil.which("check-jsonschema"):
        pytest.skip("no schema, or no check-jsonschema")
    result = subprocess.run(
        ["check-jsonschema", "--schemafile", SCHEMA, path], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("kind", ["tpu", "gpu", "cpu"])
def test_jobsets_restart_but_for_bad_input(kind):
    jobset = yaml.safe_load(fill(LAUNCH / "gke" / f"{kind}.yaml"))
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    # A pod that fails fails its job at once: by its policy after 2, by the backoff limit otherwise.
    assert (job["backoffLimit"], pod["restartPolicy"]) == (0, "Never")
    (rule,) = job["podFailurePolicy"]["rules"]
    assert (rule["action"], rule["onExitCodes"]["operator"], rule["onExitCodes"]["values"]) == ("FailJob", "In", [2])
    assert rule["onExitCodes"]["containerName"] == pod["containers"][0]["name"]
    (rule,) = jobset["spec"]["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] == 100
    if kind == "cpu":
        return
    assert job["completions"] == job["parallelism"] == 4
    assert pod["terminationGracePeriodSeconds"] >= 60
    annotations = jobset["metadata"]["annotations"]
    assert annotations == {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}


@pytest.mark.skipif(not shutil.which("envsubst"), reason="no envsubst (gettext)")
@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("kind", ["tpu", "gpu"])
def test_gke_runs_the_command_in_each_pod(job, kind, programs, tmp_path):
    programs(flexolmo=RECORD)
    flags = [flag.replace("--kind=tpu", f"--kind={kind}") for flag in slice_flags("gke.sh")]
    printed = launch("gke.sh", "--dry_run", *flags, *JOBS[job])
    assert printed.returncode == 0, printed.stderr
    jobset = yaml.safe_load(printed.stdout)
    pod = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    container = pod["containers"][0]
    text = container["args"][0].replace("$(JOB_COMPLETION_INDEX)", "3")
    subprocess.run([*container["command"], text], check=True)
    (command,) = recorded(tmp_path)
    if job == "merge":
        assert command == JOBS[job]
        assert "limits" not in container["resources"]
        return
    added = ["--distributed"]
    if kind == "gpu":
        added = ["--coordinator=news-workers-0-0.news:8482", "--num_processes=4", "--process_id=3"]
    assert command == ["train", *added, *JOBS[job][1:]]
    device = {"tpu": "google.com/tpu", "gpu": "nvidia.com/gpu"}[kind]
    assert container["resources"]["limits"] == {device: 4}


# Ships what train and merge ship; an owner called $FAILS has bad input.
SHIPS = f"""#!{sys.executable}
import os, pathlib, sys
flags = dict(word.split("=", 1) for word in sys.argv[2:])
if sys.argv[1] == "train":
    if flags["--config.expert"] == os.environ.get("FAILS"):
        sys.exit(2)
    contribution = pathlib.Path(flags["--workdir"], "contribution")
    contribution.mkdir(parents=True)
    (contribution / "arguments").write_text("\\n".join(sys.argv[2:]))
else:
    paths = [word.split("=", 1)[1] for word in sys.argv if word.startswith("--contribution=")]
    assert all(pathlib.Path(path).exists() for path in paths)
    pathlib.Path(flags["--out"]).write_text("\\n".join([flags["--anchor"], *paths]))
"""


def run_owners(tmp_path, *flags, **environment):
    owners = ["--owner=news=corpora/news", "--owner=code=corpora/code"]
    out = tmp_path / "out"
    result = launch("owners.sh", "--anchor=anchor", f"--out={out}", *owners, *flags, env=os.environ | environment)
    return out, result


def test_owners_train_apart_and_are_merged(programs, tmp_path):
    programs(flexolmo=SHIPS)
    out, result = run_owners(tmp_path, "--config.steps=3")
    assert result.returncode == 0, result.stderr
    assert (out / "model").read_text().splitlines() == [
        "anchor",
        *(f"{out}/{n}/contribution" for n in ("news", "code")),
    ]
    assert (out / "code" / "contribution" / "arguments").read_text().splitlines() == [
        *("--config=configs/expert.py:tiny", f"--workdir={out}/code", "--config.start_from=anchor"),
        *("--config.expert=code", "--config.data.train=corpora/code", "--config.steps=3"),
    ]


def test_an_owner_who_fails_stops_the_merge_alone(programs, tmp_path):
    programs(flexolmo=SHIPS)
    out, result = run_owners(tmp_path, FAILS="news")
    assert result.returncode == 2
    assert "launcher of news" in result.stderr
    assert (out / "code" / "contribution").exists()
    assert not (out / "model").exists()
    assert run_owners(tmp_path)[1].returncode == 0  # the same command resumes


def test_jobs_that_outlive_their_launcher_are_waited_for(programs, tmp_path):
    programs(
        flexolmo=SHIPS, submit='#!/usr/bin/env bash\n(sleep 0.5; flexolmo "${@:2}") >/dev/null 2>&1 &\necho "$1"\n'
    )
    out, result = run_owners(tmp_path, "--launcher=submit\n  job-{}", "--merge_launcher=flexolmo", "--poll=0.1")
    assert result.returncode == 0, result.stderr
    assert sorted(result.stdout.split()) == ["job-code", "job-news"]
    assert (out / "model").exists()


def test_contributions_that_do_not_come_are_named(programs, tmp_path):
    programs(flexolmo=SHIPS)
    started = time.monotonic()
    out, result = run_owners(tmp_path, "--launcher=true", "--timeout=1", "--poll=0.1")
    assert result.returncode == 75
    assert time.monotonic() - started < 30
    assert f"{out}/news/contribution" in result.stderr


def test_sigterm_goes_to_the_runs_of_all_owners(programs, monkeypatch, tmp_path):
    programs(flexolmo=PROCESS)
    monkeypatch.setenv("BEHAVIOUR", "stops")
    arguments = ["--anchor=anchor", f"--out={tmp_path}", "--owner=news=corpora/news", "--owner=code=corpora/code"]
    script = subprocess.Popen(
        ["bash", str(LAUNCH / "owners.sh"), *arguments, f"--launcher=bash {LAUNCH}/local.sh --processes=2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines = [script.stdout.readline() for _ in range(4)]
    assert sorted(lines) == ["[1] ready 1\n", "[1] ready 1\n", "ready 0\n", "ready 0\n"]
    script.send_signal(signal.SIGTERM)
    rest, _ = script.communicate(timeout=30)
    assert script.returncode == 143
    assert rest.splitlines().count("saved") == rest.splitlines().count("[1] saved") == 2


@pytest.mark.parametrize("kind", ["tpu", "cuda"])
def test_images_have_pinned_packages_and_a_plain_user(kind):
    lines = (LAUNCH / "docker" / f"{kind}.Dockerfile").read_text().splitlines()
    assert re.fullmatch(r"FROM python:3\.12\.\d+-slim-\w+", next(line for line in lines if line.startswith("FROM")))
    assert [line for line in lines if "USER" in line][-2:] == ["ARG USER=1000", "USER ${USER}"]
    copied = [word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]]
    assert all((LAUNCH.parent / path).exists() for path in copied)
    pins = (LAUNCH / "docker" / f"{kind}.txt").read_text().splitlines()[1:]
    assert all(re.fullmatch(r"[\w-]+==[\w.]+", pin) for pin in pins)
    planned = (LAUNCH.parent / "requirements-plan.txt").read_text().splitlines()
    prefix = {"tpu": "libtpu", "cuda": ("jax-cuda13", "nvidia-")}[kind]
    assert [pin for pin in planned if pin.startswith(prefix) and pin not in pins] == []
