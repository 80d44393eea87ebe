"""The cache of compiled programs: where it is, for whom, and what happens if it cannot be used."""

import json
import os
import pathlib
import subprocess
import sys

import filelock
import pytest

from flexolmo_jax.cli import compilation_cache
from flexolmo_jax.cli.compilation_cache import keep_compiled, machine_name
from tests.support import small
from tests.support.runs import write_words


@pytest.fixture(autouse=True)
def no_hook(monkeypatch):
    monkeypatch.setattr(compilation_cache, "_remove_unreadable", lambda path: None)


COUNTING = """
import collections, json, os, sys
from flexolmo_jax.cli import compilation_cache, main
compilation_cache.keep_compiled(None)
import jax
counts = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: counts.update([event.split("/")[-1]]))
main(sys.argv[1:])
print(json.dumps([counts["compile_requests_use_cache"], counts["cache_hits"]]), file=sys.stderr)
"""


@pytest.mark.slow
def test_a_second_process_compiles_nothing(tmp_path):
    small.anchor(tmp_path / "anchor")
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    for name in ("COMPILATION_CACHE_DIR", "PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        environment.pop(f"JAX_{name}")
    write_words(tmp_path / "corpus", seed=0)
    command = ["evaluate", f"--model={tmp_path}/anchor", f"--data={tmp_path}/corpus"]
    outs, counts = [], []
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", COUNTING, *command], capture_output=True, text=True, env=environment
        )
        outs.append(done.stdout)
        counts.append(json.loads(done.stderr))
        if len(counts) == 2:  # damage: as found, the programs are compiled anew and kept
            (program,) = (tmp_path / "cache").rglob("jit__loss*-cache")
            program.write_bytes(program.read_bytes()[:100])
    (asked, hits), (asked_again, hits_again), _ = counts
    assert asked == asked_again > hits
    assert hits_again == asked_again
    assert len(set(outs)) == 1
    # The third run removed what it could not read, and wrote it again.
    assert program.stat().st_size > 100


def test_the_default_is_a_folder_for_each_processor_in_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    environment = {}
    assert keep_compiled(None, environment) is None
    path = pathlib.Path(environment["JAX_COMPILATION_CACHE_DIR"])
    assert path.is_relative_to(tmp_path / "flexolmo-jax")
    assert path.name == machine_name()
    assert path.stat().st_mode & 0o077 == 0
    assert int(environment["JAX_COMPILATION_CACHE_MAX_SIZE"]) == compilation_cache.MAX_BYTES
    monkeypatch.setattr(compilation_cache, "_cpuinfo", lambda: "flags : other\n")
    assert machine_name() != path.name


def test_a_given_directory_and_an_empty_one(tmp_path):
    environment = {}
    assert keep_compiled(str(tmp_path / "mine"), environment) is None
    assert environment["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path / "mine" / machine_name())
    environment = {}
    assert keep_compiled("", environment) is None
    assert environment == {"JAX_ENABLE_COMPILATION_CACHE": "false"}


def test_settings_of_the_environment_stay():
    environment = {"JAX_COMPILATION_CACHE_DIR": "elsewhere"}
    assert keep_compiled(None, environment) is None
    assert environment == {"JAX_COMPILATION_CACHE_DIR": "elsewhere"}


def test_an_incomplete_program_is_removed(tmp_path):
    path = tmp_path / machine_name()
    path.mkdir()
    for name in ("whole-cache", "whole-atime", "half-cache"):
        (path / name).write_bytes(b"12345678")
    keep_compiled(str(tmp_path), {})
    assert {"whole-cache", "whole-atime"} <= {file.name for file in path.iterdir()}
    assert not (path / "half-cache").exists()


def test_without_a_size_limit_all_programs_are_complete(tmp_path):
    path = tmp_path / machine_name()
    path.mkdir()
    (path / "whole-cache").write_bytes(b"12345678")
    keep_compiled(str(tmp_path), {"JAX_COMPILATION_CACHE_MAX_SIZE": "-1"})
    assert (path / "whole-cache").exists()


def locked(tmp_path, monkeypatch):
    monkeypatch.setattr(compilation_cache, "_LOCK_SECONDS", 0.01)
    (tmp_path / "c" / machine_name()).mkdir(parents=True)
    lock = filelock.FileLock(tmp_path / "c" / machine_name() / ".lockfile")
    lock.acquire()
    return lock


def file_of_that_name(tmp_path, monkeypatch):
    (tmp_path / "c").write_text("")


def read_only(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)


@pytest.mark.parametrize("spoil", [locked, file_of_that_name, read_only])
def test_a_directory_that_cannot_be_used_is_not_used(tmp_path, monkeypatch, spoil):
    kept = spoil(tmp_path, monkeypatch)
    environment = {}
    assert str(tmp_path / "c") in keep_compiled(str(tmp_path / "c"), environment)
    assert environment == {}
    monkeypatch.setattr(compilation_cache.platformdirs, "user_cache_path", lambda _: tmp_path / "c")
    if kept is None:
        assert keep_compiled(None, environment) is None  # the default, so nothing is reported
        assert environment == {}


def test_a_command_continues_without_a_cache_and_reports_it_in_one_line(tmp_path):
    small.corpus(tmp_path / "corpus")
    (tmp_path / "file").write_text("")
    command = [
        sys.executable,
        "-m",
        "flexolmo_jax",
        "inspect",
        tmp_path / "corpus",
        f"--compilation_cache={tmp_path}/file",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stderr.startswith(f"flexolmo inspect: --compilation_cache={tmp_path}/file: ")
    assert done.stderr.count("\n") == 1
