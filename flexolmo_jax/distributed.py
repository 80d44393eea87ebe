"""Several processes that work as one: how they find each other, agree on a value, and wait for each other.

They talk through the coordination service of `jax.distributed`, which process 0 holds: no device takes part, so that an
agreement needs no compiled program, and one that does not come ends with the names of those that are missing. A single
process agrees with itself.
"""

import contextlib
import contextvars
import itertools
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import jax
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

from flexolmo_jax.errors import ArgumentError, ProcessesError, UserError, first_line

LOST = 75  # exit status of a process that has lost the others: EX_TEMPFAIL of sysexits.h, to be run again
T = TypeVar("T")
_KEYS = "flexolmo_jax"  # of what processes tell each other


class Timeouts(NamedTuple):
    """How long processes wait for each other, seconds.

    Attributes:
      start_timeout: until all have started.
      heartbeat_timeout: without a sign of life, after which a process counts as lost.
      agreement_timeout: until all have come to the same point; longer than the slowest compilation or read.
    """

    start_timeout: int = 300
    heartbeat_timeout: int = 30
    agreement_timeout: int = 1800


_timeouts = Timeouts()
_index, _count = 0, 1  # not `jax.process_index`, which takes the devices of commands that need none
_numbers = itertools.count()
_is_alone = contextvars.ContextVar("is_alone", default=False)


def start(
    coordinator: str = "",
    num_processes: int | None = None,
    process_id: int | None = None,
    timeouts: Timeouts = _timeouts,
) -> None:
    """Joins the other processes; to be called before anything touches a device.

    If they have not all started in time, this process ends, with status `LOST`: JAX would abort it.

    Args:
      coordinator: HOST:PORT of process 0. With none of these three, they are what the scheduler says: Cloud TPU, GKE,
        SLURM, Open MPI or Kubernetes.
      num_processes: how many there are.
      process_id: which one this is, from 0.
      timeouts: how long they wait for each other.

    Raises:
      UserError: the scheduler is not known, or what is given makes no sense.
    """
    global _timeouts, _index, _count
    place = (coordinator or None, num_processes, process_id)
    if any(value is not None for value in place):
        _check_given(coordinator, num_processes, process_id)
        _forget_other_clusters()
    _timeouts = timeouts
    with _ending_after(timeouts.start_timeout, coordinator):
        try:
            jax.distributed.initialize(
                *place,
                initialization_timeout=timeouts.start_timeout + 60,
                heartbeat_timeout_seconds=timeouts.heartbeat_timeout,
                shutdown_timeout_seconds=timeouts.agreement_timeout,
            )
        except ValueError as error:
            problem = (
                f"no scheduler that JAX knows says which processes there are ({first_line(error)}); give HOST:PORT"
            )
            raise ArgumentError("coordinator", coordinator, f"{problem}, num_processes and process_id") from None
    _index, _count = jax.process_index(), jax.process_count()


def count() -> int:
    """How many processes work together here."""
    return 1 if _is_alone.get() else _count


def index() -> int:
    """Which one this is, from 0."""
    return _index


def is_primary() -> bool:
    """Whether this is the process that writes what is written once: logs, metrics, manifests."""
    return _index == 0


@contextlib.contextmanager
def primary_alone(name: str) -> Iterator[bool]:
    """A block for process 0 alone, which agrees with nobody within it; yields whether this is that process.

    All must enter it; it raises what `agreed` does.
    """
    with agreed(name):
        token = _is_alone.set(True)
        try:
            yield is_primary()
        finally:
            _is_alone.reset(token)


def gather(name: str, value: Any) -> list[Any]:
    """What each process says, in their order, once all are here; they must call this in the same order of names.

    Args:
      name: of the agreement, for errors.
      value: what this process says, as JSON has it.

    Raises:
      ProcessesError: a process has not come in time, or has come to another agreement.
    """
    if count() == 1:
        return [value]
    client, number = multihost.get_jax_distributed_client(), next(_numbers)
    client.key_value_set(_key(number, index()), json.dumps([name, value]))
    answers = []
    for process in range(count()):
        try:
            text = client.blocking_key_value_get(_key(number, process), 1000 * _timeouts.agreement_timeout)
        except jax.errors.JaxRuntimeError as error:
            raise _missing(client, number, name, error) from None
        other, value = json.loads(text)
        if other != name:
            raise ProcessesError(f"process {process} is at '{other}', process {index()} at '{name}'; they must agree")
        answers.append(value)
    if number:  # all have read what was told before, since all have come here
        client.key_value_delete(_key(number - 1, index()))
    return answers


@contextlib.contextmanager
def agreed(name: str) -> Iterator[None]:
    """A block that fails in all processes if it fails in one; all must enter it.

    Raises:
      UserError: one process raised it; that process raises its own.
      ProcessesError: one failed otherwise, or has not come in time.
    """
    try:
        yield
    except ProcessesError:
        raise
    except Exception as error:
        # What is no error of the user's is a bug, which the others can only name.
        gather(name, ["user" if isinstance(error, UserError) else "program", str(error) or type(error).__name__])
        raise
    answers = gather(name, None)
    for process, problem in enumerate(answers):
        if problem:
            kind, text = problem
            raise (UserError if kind == "user" else ProcessesError)(f"process {process}: {text}")


def from_primary(name: str, make: Callable[[], T]) -> T:
    """What `make` returns in process 0, as JSON has it; it is not called in others. Raises what `agreed` does."""
    made: Any = None
    with primary_alone(name) as is_this:
        if is_this:
            made = make()
    return gather(name, made)[0] if count() > 1 else made


def asked_to_stop(step: int) -> bool:
    """Whether the scheduler has told a process to end, and this is the step after which all of them do.

    To be called once for each step. JAX's notifier of preemptions handles SIGTERM, and finds the step.
    """
    return multihost_utils.reached_preemption_sync_point(step)


def _key(number: int, process: int) -> str:
    return f"{_KEYS}/{number}/{process}"


def _missing(client: Any, number: int, name: str, error: Exception) -> ProcessesError:
    """Says which processes have not come."""
    absent = []
    for process in range(count()):
        try:
            client.key_value_try_get(_key(number, process))
        except jax.errors.JaxRuntimeError:
            absent.append(str(process))
    if not absent:
        return ProcessesError(f"'{name}': the processes lost each other ({first_line(error)[:200]})")
    return ProcessesError(
        f"'{name}': not there within {_timeouts.agreement_timeout} seconds: process {', '.join(absent)} of {count()}; "
        "see the logs there"
    )


@contextlib.contextmanager
def _ending_after(timeout: float, coordinator: str) -> Iterator[None]:
    """Ends the process where the block takes longer than `timeout` seconds."""

    def end() -> None:
        address = f" at {coordinator}" if coordinator else ""
        sys.stderr.write(
            f"distributed: not all processes have started within {timeout:g} seconds, or the first cannot be "
            f"reached{address}; see the logs of the others, and run the same command again, in all of them\n"
        )
        sys.stderr.flush()
        os._exit(LOST)

    timer = threading.Timer(timeout, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _check_given(coordinator: str, num_processes: int | None, process_id: int | None) -> None:
    """All three are needed, and the process is one of them."""
    if not coordinator or ":" not in coordinator:
        raise ArgumentError("coordinator", coordinator, "give HOST:PORT of process 0, the same for all processes")
    if num_processes is None or num_processes < 1:
        raise ArgumentError("num_processes", num_processes, "give how many processes there are, 1 or more")
    if process_id is None or not 0 <= process_id < num_processes:
        problem = f"give which process this is, from 0 to {num_processes - 1}"
        raise ArgumentError("process_id", process_id, problem)


def _forget_other_clusters() -> None:
    """Removes what a former slice left in the environment: libtpu would look for its other slices, and wait."""
    for variable in [name for name in os.environ if name.startswith("MEGASCALE_")]:
        del os.environ[variable]
