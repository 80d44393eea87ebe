"""The workdir of a run: which run it holds, the lock of the one process that works in it, and how SIGTERM ends that."""

import contextlib
import errno
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from typing import Any

import filelock
from etils import epath
from flax.traverse_util import flatten_dict

from configs import base, keys
from flexolmo_jax import distributed
from flexolmo_jax.errors import ArgumentError, UserError
from flexolmo_jax.paths import is_remote

CONFIG_FILE = "config.json"
CHECKPOINTS = "checkpoints"
OUTPUTS = MODEL, CONTRIBUTION = "model", "contribution"
LOCK_FILE = ".lock"
DAMAGED_FILE = "damaged_corpus.txt"  # why no output may ever come of this run
# What may differ when a run is resumed: where it runs, what it keeps, and what its owner says of the data.
MAY_CHANGE = {
    *("mesh", "sharding_rules", "checkpoint", "distributed", "log", "profile", "card"),
    *("data.prefetch", "data.max_epochs"),
}
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # what a file system without locks answers


def content_key(name: str) -> str:
    """The key in `config.json` for the content of what the configuration key `name`, a path, names."""
    return f"content of {name}"


def check_place(workdir: epath.Path) -> None:
    """Raises ArgumentError where checkpoints cannot be saved."""
    if os.fspath(workdir).startswith("s3://"):
        problem = "Orbax cannot save checkpoints there; name one on gs:// or on a disk or mount that all hosts see"
        raise ArgumentError("workdir", os.fspath(workdir), problem)


def finished(workdir: epath.Path, record: dict[str, Any]) -> epath.Path | None:
    """The output of this run; None for a run to begin or to resume.

    Args:
      workdir: the directory, which need not be there.
      record: what `config.json` holds once the run has begun.

    Raises:
      UserError: the workdir holds another run, one that may give no output, or an output with another card.
    """
    before, now = _read_record(workdir), flatten_dict(record, sep=".")
    if before is not None:
        _check_same(workdir, before, now)
    if (workdir / DAMAGED_FILE).exists():
        raise UserError((workdir / DAMAGED_FILE).read_text().strip())
    output = next((workdir / name for name in OUTPUTS if (workdir / name).exists()), None)
    if output is None:
        return None
    if before is not None and any(before[key] != now[key] for key in now if key.startswith("card.")):
        raise UserError(
            f"config.card: {output} has another card; remove {output} and run the same command again, which "
            "writes it with this card and trains nothing again"
        )
    return output


def claim(workdir: epath.Path, record: dict[str, Any]) -> None:
    """Writes `config.json`: what the run was last started with."""
    file = workdir / CONFIG_FILE
    temporary = file.with_name(f".{CONFIG_FILE}.incomplete")
    temporary.write_text(json.dumps(record, indent=2) + "\n")
    temporary.replace(file)


def refuse_output(workdir: epath.Path, error: UserError) -> UserError:
    """Records that the run used damaged data, so that no later start gives an output; returns the error."""
    text = f"{error}; the run in {workdir} used it, so it gives no output: train in a new workdir"
    (workdir / DAMAGED_FILE).write_text(text + "\n")
    return UserError(text)


@contextlib.contextmanager
def locked(workdir: epath.Path) -> Iterator[None]:
    """Keeps every other process out of the workdir while the block runs.

    The operating system holds the lock, and releases it when the process ends, however it ends; the file names the
    process, and stays. On a file system that has no locks (or `gs://`) the run has no lock, and a warning is written.
    Of a run's processes the first takes the lock.

    Raises:
      ArgumentError: another process holds the lock; the message names its host and process id.
    """
    with contextlib.ExitStack() as until_done:
        with distributed.agreed("lock"):
            if distributed.is_primary():
                until_done.enter_context(_locked(workdir))
        yield


@contextlib.contextmanager
def _locked(workdir: epath.Path) -> Iterator[None]:
    """As `locked`, for this process."""
    workdir.mkdir(parents=True, exist_ok=True)
    if is_remote(workdir):
        _warn_unlocked(workdir)
        yield
        return
    file = workdir / LOCK_FILE
    lock = filelock.FileLock(file, blocking=False, fallback_to_soft=False)
    try:
        lock.acquire()
    except filelock.Timeout:
        problem = f"another run is at work in it ({_holder(file)}); wait for it or stop it, or name another workdir"
        raise ArgumentError("workdir", os.fspath(workdir), problem) from None
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


class Terminated(BaseException):
    """SIGTERM came where nothing has to be saved first; like KeyboardInterrupt, not an error to be handled."""


class Sigterm:
    """A handler of SIGTERM, by which schedulers ask a run to end. Only the first signal counts.

    It raises `Terminated` at once, except within `waiting`, where the step under way is to be finished first. Of a run
    with several processes JAX handles the signal, which may come to one of them, and finds the step that all finish.
    """

    def __init__(self):
        """No signal has come."""
        self.received = False
        self._waits = False

    def __call__(self, *_) -> None:
        """Handles the signal."""
        first, self.received = not self.received, True
        if first and not self._waits:
            raise Terminated

    def asks_to_stop(self, step: int) -> bool:
        """Whether the run ends after this step; all processes get the same answer, and ask after each step."""
        return self.received if distributed.count() == 1 else distributed.asked_to_stop(step)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Lets the block decide what to do: it calls `asks_to_stop`."""
        self._waits = True
        try:
            yield
        finally:
            self._waits = False


@contextlib.contextmanager
def handle_sigterm() -> Iterator[Sigterm]:
    """Handles SIGTERM while the block runs; Python handles signals in the main thread only."""
    handler = Sigterm()
    if distributed.count() > 1:  # JAX's own handler stays
        yield handler
        return
    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield handler
    finally:
        signal.signal(signal.SIGTERM, before)


def _holder(file: epath.Path) -> str:
    """Host and process of the lock's holder, which may be about to write them."""
    for _ in range(10):
        if text := file.read_text().strip():
            return text
        time.sleep(0.1)
    return "host and process not known"


def _warn_unlocked(workdir: epath.Path) -> None:
    sys.stderr.write(f"{workdir}: its file system has no locks; see to it that no other run is at work in it\n")


def _read_record(workdir: epath.Path) -> dict[str, Any] | None:
    """The record, with today's defaults for keys that came after it; None where there is none."""
    file = workdir / CONFIG_FILE
    if not file.exists():
        return None
    try:
        before = flatten_dict(json.loads(file.read_text()), sep=".")
    except (ValueError, AssertionError):
        raise UserError(f"{file}: damaged; remove the workdir to start anew") from None
    for old, new in base.RENAMED.items():
        if any(key == old or key.startswith(f"{old}.") for key in before):
            problem = f"made by another version, whose {old} is now {new}; finish it with that version, or begin anew"
            raise ArgumentError("workdir", os.fspath(workdir), problem)
    return keys.flatten(json.loads(base.get_config().to_json())) | before


def _check_same(workdir: epath.Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises ArgumentError with the keys that differ, where the run computes something else.

    A path may differ: the content of what it names is compared.
    """
    changed = sorted(
        key
        for key in now.keys() | before.keys()
        if content_key(key) not in now and not {key, key.split(".")[0]} & MAY_CHANGE and now.get(key) != before.get(key)
    )
    if changed:
        raise ArgumentError(
            "workdir",
            os.fspath(workdir),
            f"holds another run (config.json differs in: {', '.join(changed)}); name another workdir, or repeat that "
            "run's flags",
        )
