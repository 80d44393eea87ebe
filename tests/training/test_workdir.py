"""Which run a workdir holds, and that one process at a time is at work in it."""

import errno
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from unittest import mock

import numpy as np
import pytest
from etils import epath

from flexolmo_jax.data.corpus import Corpus
from flexolmo_jax.errors import UserError
from flexolmo_jax.training import loop
from flexolmo_jax.training import workdir as workdirs
from tests.support import runs, small


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return runs.journey(tmp_path_factory.getbasetemp())


@pytest.fixture
def run(made, tmp_path):
    """A workdir with a finished run of an expert, to be changed."""
    shutil.copytree(made.expert.workdir, tmp_path / "run")
    return tmp_path / "run"


def resume(made, workdir, **changes):
    """The same run again: a finished one computes nothing."""
    return loop.train(runs.make_config("pair", **made.expert_values | changes), workdir)


def edit_record(workdir, change):
    file = workdir / "config.json"
    record = json.loads(file.read_text())
    change(record)
    file.write_text(json.dumps(record))


def copies(made, folder):
    """The paths of the run, of copies of what it reads."""
    for name, path in (("own", made.private.path), ("held_out", made.held_out.path), ("anchor", made.anchor.output)):
        shutil.copytree(path, folder / name)
    shutil.move(folder / "anchor" / "public", folder / "public")
    return {
        "start_from": f"{folder}/anchor",
        "data__train": f"{folder}/./own/",
        "data__public": f"{folder}/public",
        "evaluation__data": f"{folder}/held_out",
    }


def test_paths_may_change_where_their_content_does_not(made, run, tmp_path):
    assert resume(made, run, **copies(made, tmp_path / "copies")) == run / "contribution"


def test_a_path_may_be_relative(made, run, monkeypatch):
    monkeypatch.chdir(made.private.path.parent)
    assert resume(made, run, data__train=made.private.path.name) == run / "contribution"


def test_a_file_of_a_router_weight_is_known_by_its_content(made, tmp_path):
    files = {name: tmp_path / f"{name}.npy" for name in ("first", "same", "other")}
    for name, file in files.items():
        np.save(file, np.full(32, 1.0 + (name == "other"), np.float32))
    content = {}
    for name, file in files.items():
        config = runs.make_config("pair", **made.expert_values, init__router_weight_file=str(file))
        content[name] = loop.read_run(config).record["content of init.router_weight_file"]
    assert content["first"] == content["same"] != content["other"]


@pytest.mark.parametrize("key", ["data.train", "data.public", "evaluation.data"])
def test_other_content_is_another_run(made, run, key):
    small_words = runs.write_words(made.root / "other_words", 7)
    with pytest.raises(UserError, match=f"holds another run \\(config.json differs in: content of {re.escape(key)}\\)"):
        resume(made, run, **{key.replace(".", "__"): str(small_words.path)})


def test_another_start_and_another_eos_are_other_runs(made, run, tmp_path):
    edit_record(run, lambda record: record.update({"content of start_from": "0" * 64}))
    with pytest.raises(UserError, match=r"differs in: content of start_from\)"):
        resume(made, run)
    shutil.copytree(made.private.path, tmp_path / "corpus")
    description = json.loads((tmp_path / "corpus" / "corpus.json").read_text())
    (tmp_path / "corpus" / "corpus.json").write_text(json.dumps(description | {"eos_id": 32}))
    assert Corpus.open(tmp_path / "corpus").digest != made.private.digest


def test_a_key_that_came_after_the_run_has_its_default(made, run):
    def forget(record):
        del record["compute"]["unroll"], record["moe"]

    edit_record(run, forget)
    assert resume(made, run) == run / "contribution"
    with pytest.raises(UserError, match=r"differs in: compute.unroll\)"):
        resume(made, run, compute__unroll=2)


def test_a_key_that_this_version_does_not_know_is_another_run(made, run):
    edit_record(run, lambda record: record["optimizer"].update(nesterov=True))
    with pytest.raises(UserError, match=r"differs in: optimizer.nesterov\)"):
        resume(made, run)


@pytest.mark.parametrize(
    ("section", "key", "new"),
    [("data", "accumulate", "data.grad_accum_steps"), ("init", "row_file", "init.router_weight_file")],
)
def test_a_workdir_of_a_version_with_other_keys_is_refused_with_their_names(made, run, section, key, new):
    edit_record(run, lambda record: record[section].update({key: record[section].pop(new.split(".")[1])}))
    line = f"workdir={run}: made by another version, whose {section}.{key} is now {new}; finish it with that version"
    with pytest.raises(UserError, match=re.escape(line)):
        resume(made, run)


def test_a_workdir_of_a_version_with_another_section_is_refused_with_its_name(made, run):
    edit_record(run, lambda record: record.update(mixture=record.pop("moe")))
    with pytest.raises(UserError, match="made by another version, whose mixture is now moe"):
        resume(made, run)


def test_the_card_of_an_output_changes_only_with_the_output(made, run):
    with pytest.raises(UserError, match=r"config\.card: .*contribution has another card; remove") as caught:
        resume(made, run, card__license="CC-BY-4.0")
    assert "\n" not in str(caught.value)
    shutil.rmtree(run / "contribution")
    before = runs.read_params(made.expert.output)
    taken = []
    with mock.patch.object(loop.Reporter, "step", lambda self, step, metrics: taken.append(step)):
        assert resume(made, run, card__license="CC-BY-4.0") == run / "contribution"
    assert taken == []
    assert json.loads((run / "contribution" / "contribution.json").read_text())["card"]["license"] == "CC-BY-4.0"
    for leaf, array in runs.read_params(run / "contribution").items():
        np.testing.assert_array_equal(array, before[leaf])
    assert resume(made, run, card__license="CC-BY-4.0") == run / "contribution"


@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_a_damaged_record_is_named(made, run, text):
    (run / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json: damaged"):
        resume(made, run)


HOLD = """
import sys, time
from etils import epath
from flexolmo_jax.training.workdir import locked
with locked(epath.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(300)
"""


def test_a_second_run_is_refused_at_once_and_a_killed_one_blocks_nobody(made, tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    with subprocess.Popen([sys.executable, "-c", HOLD, workdir], cwd=runs.ROOT, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        # What a first run has begun is not touched, nor seen as this run's.
        (workdir / "checkpoints" / "3.orbax-checkpoint-tmp").mkdir(parents=True)
        arguments = [*runs.as_flags("pair", **made.expert_values), f"--workdir={workdir}"]
        monkeypatch.chdir(runs.ROOT)
        result = small.flexolmo("train", *arguments)
        who = f"host {socket.gethostname()}, process {holder.pid}"
        small.assert_refused(result, "train", f"--workdir={workdir}: another run is at work in it", who)
        assert (workdir / "checkpoints" / "3.orbax-checkpoint-tmp").exists()
        holder.send_signal(signal.SIGKILL)
    assert str(holder.pid) in (workdir / workdirs.LOCK_FILE).read_text(), "a stale file stays"
    with workdirs.locked(epath.Path(workdir)):
        assert str(os.getpid()) in (workdir / workdirs.LOCK_FILE).read_text()


def test_of_many_that_start_at_once_one_gets_the_workdir(tmp_path):
    count, outcomes = 8, []
    at_once, all_tried = threading.Barrier(count), threading.Barrier(count)

    def start():
        at_once.wait()
        try:
            with workdirs.locked(epath.Path(tmp_path / "run")):
                outcomes.append("held")
                all_tried.wait()
        except UserError:
            outcomes.append("refused")
            all_tried.wait()

    threads = [threading.Thread(target=start) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["held", *["refused"] * (count - 1)]


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named_and_stops_nobody(tmp_path, capsys, number):
    with mock.patch("fcntl.flock", side_effect=OSError(number, os.strerror(number))):
        for _ in range(2):
            with workdirs.locked(epath.Path(tmp_path / "run")):
                pass
    assert capsys.readouterr().err.count("its file system has no locks") == 2


def test_an_error_and_a_refusal_leave_the_lock_free(tmp_path):
    workdir = epath.Path(tmp_path / "run")
    with pytest.raises(RuntimeError), workdirs.locked(workdir):
        raise RuntimeError
    with workdirs.locked(workdir), pytest.raises(UserError), workdirs.locked(workdir):
        pass
    with workdirs.locked(workdir):
        pass


def test_the_lock_is_no_part_of_the_output(made):
    assert not [path for path in pathlib.Path(made.expert.output).rglob("*") if path.name == workdirs.LOCK_FILE]
