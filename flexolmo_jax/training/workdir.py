"""The workdir of a run: which run it holds, and that only one process at a time is at work in it."""

import contextlib
import errno
import hashlib
import itertools
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from typing import Any

import filelock
from etils import epath
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from configs import base
from flexolmo_jax.checkpoint.digests import combined_digest
from flexolmo_jax.errors import UserError
from flexolmo_jax.training.inputs import Inputs, public_path, split_paths
from flexolmo_jax.training.optimizer import warmup_steps

CONFIG_FILE = "config.json"
LOCK_FILE = ".lock"
DAMAGED_FILE = "damaged_corpus.txt"  # why no output may ever come of this run
# What may differ when a run is resumed: where it runs, what it keeps, and what its owner says of the data.
MAY_CHANGE = ("mesh", "sharding_rules", "checkpoint", "log", "card")
# Paths: what they name is compared by its content.
PATHS = ("start_from", "data.train", "data.public", "evaluation.data", "init.router_weight_file")
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # what a file system without locks answers
_CONTENT = "content of "
_OLD_CONTENT = _CONTENT + "the corpora"  # of records that digest the corpora together with their paths


def describe(config: ConfigDict, inputs: Inputs) -> dict[str, Any]:
    """What `config.json` records: the configuration, and the content of what its paths name."""
    record = json.loads(config.to_json())
    record["optimizer"]["warmup_steps"] = warmup_steps(config.optimizer, config.steps)
    own, *public = ([corpus.digest for corpus in group] for group, _ in inputs.corpora)
    return {
        **record,
        _CONTENT + "start_from": inputs.manifest.content_digest if inputs.manifest else "",
        _CONTENT + "data.train": own,
        _CONTENT + "data.public": list(itertools.chain(*public)),
        _CONTENT + "evaluation.data": [corpus.digest for corpus in inputs.held_out.values()],
        _CONTENT + "init.router_weight_file": _file_digest(
            config.init.router_weight_file, "--config.init.router_weight_file"
        ),
    }


def _file_digest(path: str, flag: str) -> str:
    """The digest of a file's bytes; "" where none is named."""
    if path and not epath.Path(path).exists():
        raise UserError(f"{flag}={path}: no such file; check the path")
    return hashlib.sha256(epath.Path(path).read_bytes()).hexdigest() if path else ""


def finished(workdir: epath.Path, record: dict[str, Any], inputs: Inputs, output: epath.Path) -> bool:
    """Whether the workdir holds this run with its output; False for a run to begin or to resume.

    Raises:
      UserError: the workdir holds another run, one that may give no output, or an output with another card.
    """
    before, now = _read_record(workdir / CONFIG_FILE), flatten_dict(record, sep=".")
    if before is not None:
        _check_same(workdir, before, now, inputs)
    if (workdir / DAMAGED_FILE).exists():
        raise UserError((workdir / DAMAGED_FILE).read_text().strip())
    if not output.exists():
        return False
    if before is not None and any(before[key] != now[key] for key in now if key.startswith("card.")):
        raise UserError(
            f"--config.card: {output} has another card; remove {output} and run the same command again, which "
            "writes it with this card and trains nothing again"
        )
    return True


def claim(workdir: epath.Path, record: dict[str, Any]) -> None:
    """Writes `config.json`: what the run was last started with."""
    file = workdir / CONFIG_FILE
    temporary = file.with_name(f".{CONFIG_FILE}.incomplete")
    temporary.write_text(json.dumps(record, indent=2) + "\n")
    temporary.replace(file)


def refuse_output(workdir: epath.Path, error: UserError) -> UserError:
    """Records that the run was trained on damaged data, so that no later start gives an output; returns the error."""
    text = f"{error}; --workdir={workdir} was trained on it, so it gives no output: train in a new workdir"
    (workdir / DAMAGED_FILE).write_text(text + "\n")
    return UserError(text)


@contextlib.contextmanager
def locked(workdir: epath.Path) -> Iterator[None]:
    """Keeps every other process out of the workdir while the block runs.

    The operating system holds the lock, and drops it when the process ends, however it ends; the file says who holds
    it, and stays. On a file system that has no locks (or `gs://`) the run goes on without one, and says so.

    Raises:
      UserError: another process holds the lock; names its host and process id.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    if "://" in os.fspath(workdir):
        _warn_unlocked(workdir)
        yield
        return
    file = workdir / LOCK_FILE
    lock = filelock.FileLock(file, blocking=False, fallback_to_soft=False)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise UserError(
            f"--workdir={workdir}: another run is at work in it ({_holder(file)}); wait for it or stop it, or name "
            "another workdir"
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        _warn_unlocked(workdir)
    try:
        if lock.is_locked:
            file.write_text(f"host {socket.gethostname()}, process {os.getpid()}\n")
        yield
    finally:
        lock.release()


def _holder(file: epath.Path) -> str:
    """Who holds the lock; it may just be about to say."""
    for _ in range(10):
        if text := file.read_text().strip():
            return text
        time.sleep(0.1)
    return "host and process not known"


def _warn_unlocked(workdir: epath.Path) -> None:
    sys.stderr.write(f"{workdir}: its file system has no locks; see to it that no other run is at work in it\n")


def _read_record(file: epath.Path) -> dict[str, Any] | None:
    """The record, with today's defaults for keys that came after it; None where there is none."""
    if not file.exists():
        return None
    try:
        before = flatten_dict(json.loads(file.read_text()), sep=".")
    except (ValueError, AssertionError):
        raise UserError(f"{file}: damaged; remove the workdir to start anew") from None
    return flatten_dict(json.loads(base.get_config().to_json()), sep=".") | before


def _check_same(workdir: epath.Path, before: dict[str, Any], now: dict[str, Any], inputs: Inputs) -> None:
    """Raises UserError with the keys that differ, where the run computes something else."""
    before = dict(before)
    if _OLD_CONTENT in before and before.pop(_OLD_CONTENT) == _old_content(before, inputs):
        before |= {key: value for key, value in now.items() if key.startswith(_CONTENT) and key not in before}
    changed = sorted(
        key
        for key in now.keys() | before.keys()
        if key not in PATHS and key.split(".")[0] not in MAY_CHANGE and now.get(key) != before.get(key)
    )
    if changed:
        raise UserError(
            f"--workdir={workdir}: holds another run (config.json differs in: {', '.join(changed)}); "
            "name another workdir, or repeat that run's flags"
        )


def _old_content(before: dict[str, Any], inputs: Inputs) -> str:
    """What an old record would say of these corpora, had they the paths they had then."""
    paths = split_paths(before["data.train"])
    if before["data.public_share"]:
        paths.append(public_path(before["data.public"], before["start_from"]))
    paths += split_paths(before["evaluation.data"])
    corpora = [*itertools.chain(*(group for group, _ in inputs.corpora)), *inputs.held_out.values()]
    named = zip(map(epath.Path, paths), corpora, strict=False)
    return combined_digest({f"{path}/{file['name']}": file["sha256"] for path, c in named for file in c.files})
