"""Launchers that really run here: several processes on this machine, owners apart, and Slurm with one node."""

import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import time

import pytest

import flexolmo_jax
from flexolmo_jax.checkpoint.model_directory import check_model, open_model, read_model
from tests.support import processes, runs

LAUNCH = runs.ROOT / "launch"
# A layer and two steps: what is to be seen is that they are taken together.
SHORT = {"model__num_layers": 1, "steps": 2, "publish__selector": "", "publish__public_documents": 8}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return runs.journey(tmp_path_factory.getbasetemp())


@pytest.fixture
def environment(made, tmp_path):
    """A `flexolmo` of this checkout, and a device for each of its processes."""
    program = tmp_path / "bin" / "flexolmo"
    program.parent.mkdir()
    program.write_text(f'#!/usr/bin/env bash\nexec {sys.executable} -m flexolmo_jax "$@"\n')
    program.chmod(0o755)
    path = os.pathsep.join((str(program.parent), os.environ["PATH"]))
    one_device = {"JAX_NUM_CPU_DEVICES": "1", "JAX_PLATFORMS": "cpu", "PYTHONPATH": runs.PYTHONPATH}
    return {**os.environ, **made.environment, **one_device, "PATH": path}


def launch(script, *arguments, environment):
    command = ["bash", str(LAUNCH / script), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=300, env=environment, cwd=runs.ROOT
    )


def check_anchor(workdir):
    """A whole anchor, of a run whose steps were reported once."""
    assert sorted(runs.losses(workdir)) == [1, 2]
    manifest = read_model(workdir / "model", strict=True)
    check_model(manifest, *open_model(workdir / "model", manifest))


def test_two_local_processes_train_one_model(made, environment, tmp_path):
    flags = runs.as_flags("anchor", **SHORT, data__train=str(made.public.path), mesh__data=1, mesh__fsdp=2)
    workdir = tmp_path / "anchor"
    arguments = ["--processes=2", "train", *flags, f"--workdir={workdir}"]
    result = launch("local.sh", *arguments, environment=environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == f"{workdir}/model"
    check_anchor(workdir)


@pytest.mark.slow
def test_owners_train_apart_and_are_merged(made, environment, tmp_path):
    config, *flags = runs.as_flags("expert", steps=2)
    owners = [f"--owner=news={made.private.path}", f"--owner=code={made.held_out.path}"]
    places = [f"--anchor={made.anchor.output}", f"--out={tmp_path}"]
    result = launch("owners.sh", *places, *owners, config, *flags, environment=environment)
    assert result.returncode == 0, result.stderr
    assert flexolmo_jax.load(tmp_path / "model").roster == ["anchor", "code", "news"]


CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/none
CredType=cred/none
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
NodeName={host} NodeAddr=127.0.0.1 CPUs=8 State=UNKNOWN
PartitionName=all Nodes={host} Default=YES State=UP
"""
# `flexolmo` that ends as its first flag says.
ENDS = """#!/usr/bin/env bash
trap 'echo saved; exit 143' TERM
echo "task $SLURM_PROCID of $SLURM_NTASKS: $*"
case $2$SLURM_PROCID in
  --mixed0) exit 2 ;;
  --mixed*) sleep 1; exit 75 ;;
  --waits*) while true; do sleep 0.1; done ;;
  --status=*) status=${2#--status=}; exit "$status" ;;
esac
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """Runs the daemons of a cluster of this machine alone; yields its folder."""
    if not all(map(shutil.which, ("sbatch", "slurmctld", "slurmd"))) or os.geteuid():
        pytest.skip("needs Slurm (on Debian and Ubuntu: apt install slurm-wlm), and to be root")
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("state", "spool"):
        (folder / name).mkdir()
    host = socket.gethostname().split(".")[0]
    ports = [processes.free_address().split(":")[1] for _ in range(2)]
    (folder / "slurm.conf").write_text(CONFIGURATION.format(host=host, ports=ports, folder=folder))
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    commands = (["slurmctld", "-D"], ["slurmd", "-D", "-N", host])
    daemons = [
        subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for command in commands
    ]
    try:
        wait(lambda: "idle" in subprocess.run(["sinfo"], env=environment, capture_output=True, text=True).stdout)
        yield folder
    finally:
        subprocess.run(["scancel", "--user=root"], env=environment, capture_output=True)
        time.sleep(2)
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(30)


def wait(condition, seconds=120):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.2)


class Job:
    """A job of launch/slurm.sbatch."""

    def __init__(self, folder, environment, *arguments):
        self.environment = {**environment, "SLURM_CONF": str(folder / "slurm.conf")}
        self.log = folder / f"{time.monotonic_ns()}.log"
        flags = ["--parsable", "--ntasks-per-node=2", "--gpus-per-node=0", f"--output={self.log}"]
        self.number = self.run("sbatch", *flags, str(LAUNCH / "slurm.sbatch"), *arguments).strip()

    def run(self, *command):
        return subprocess.run(
            command, env=self.environment, capture_output=True, text=True, check=True, cwd=runs.ROOT
        ).stdout

    def fields(self):
        words = self.run("scontrol", "show", "job", self.number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def end(self):
        """Waits until it is done or queued again; returns its state, restarts and exit code."""
        wait(lambda: self.fields()["JobState"] not in ("RUNNING", "COMPLETING", "CONFIGURING"))
        wait(lambda: self.fields()["JobState"] != "PENDING" or self.fields()["Restarts"] != "0")
        wait(lambda: self.fields()["JobState"] not in ("RUNNING", "COMPLETING", "CONFIGURING"))
        return tuple(self.fields()[name] for name in ("JobState", "Restarts", "ExitCode"))

    def lines(self):
        return self.log.read_text().splitlines() if self.log.exists() else []


@pytest.fixture
def submit(slurm, environment):
    """Submits a job with a `flexolmo` that only ends."""
    pathlib.Path(environment["PATH"].split(os.pathsep)[0], "flexolmo").write_text(ENDS)
    return lambda *arguments, **more: Job(slurm, environment | more, *arguments)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flag", "end"),
    [
        ("--status=0", ("COMPLETED", "0", "0:0")),
        ("--status=2", ("FAILED", "0", "2:0")),
        ("--mixed", ("FAILED", "0", "2:0")),
        ("--status=75", ("PENDING", "1", "0:0")),
    ],
)
def test_slurm_queues_a_job_again_but_for_bad_input(flag, end, submit):
    job = submit("train", flag)
    assert job.end() == end
    assert {f"task {task} of 2: train {flag} --distributed" for task in range(2)} <= set(job.lines())


@pytest.mark.slow
def test_slurm_restarts_are_counted(submit):
    assert submit("train", "--status=75", MAX_RESTARTS="0").end() == ("FAILED", "0", "75:0")


@pytest.mark.slow
def test_slurm_runs_a_merge_as_one_task(submit):
    job = submit("merge", "--status=0")
    assert job.end()[0] == "COMPLETED"
    assert job.lines() == ["task 0 of 1: merge --status=0"]


@pytest.mark.slow
@pytest.mark.parametrize(("signal", "end"), [(["--signal=TERM"], ("PENDING", "1")), ([], ("CANCELLED", "0"))])
def test_a_preempted_job_is_queued_again_and_a_cancelled_one_is_not(signal, end, submit):
    job = submit("train", "--waits")
    wait(lambda: len(job.lines()) == 2)
    job.run("scancel", *signal, job.number)
    assert job.end()[:2] == end
    assert job.lines().count("saved") == 2


@pytest.mark.slow
def test_slurm_trains_one_model(slurm, made, environment, tmp_path):
    flags = runs.as_flags("anchor", **SHORT, data__train=str(made.public.path), mesh__data=1, mesh__fsdp=2)
    workdir = tmp_path / "anchor"
    job = Job(slurm, environment, "train", *flags, f"--workdir={workdir}")
    assert job.end() == ("COMPLETED", "0", "0:0"), job.lines()
    check_anchor(workdir)
    assert json.loads((workdir / "config.json").read_text())
