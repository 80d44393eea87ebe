"""Work in several processes: results in order, progress, and an error where a process ends too early."""

import concurrent.futures
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from typing import Any, TypeVar

from flexolmo_jax.errors import UserError

Task = TypeVar("Task")
Result = TypeVar("Result")
Advance = Callable[[int], None]
_POLL_SECONDS = 0.2


def map_in_processes(
    function: Callable[[Task, Advance], Result], tasks: Sequence[Task], processes: int, advance: Advance
) -> Generator[Result, None, None]:
    """Calls `function(task, advance)` for each task, and yields the results in order.

    An error of a task is raised in its turn, when the results before it were yielded. Other processes then stop at
    their next call of `advance`. They also end when this process does, however it ends.

    Args:
      function: what to call; with several processes it is pickled, as tasks and results are.
      tasks: its first arguments.
      processes: how many processes work; 1 is this one.
      advance: called with the numbers that `function` passes to its second argument, from time to time.

    Raises:
      UserError: a process ended before its task did.
    """
    if processes == 1 or len(tasks) < 2:
        for task in tasks:
            yield function(task, advance)
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy locks that threads hold
    total, stopped = context.Value("q", 0), context.Event()
    pool = concurrent.futures.ProcessPoolExecutor(
        min(processes, len(tasks)), context, initializer=_start_worker, initargs=(total, stopped)
    )
    shown = 0
    with pool:
        try:
            futures = [pool.submit(_call, function, task) for task in tasks]
            for future in futures:
                while not future.done():
                    concurrent.futures.wait([future], _POLL_SECONDS)
                    now = total.value
                    advance(now - shown)
                    shown = now
                yield future.result()
        except BrokenProcessPool as error:
            raise UserError(
                "a process of those that work together has ended early: it was killed, or memory ran out; run the "
                "command again, with fewer processes if memory is short"
            ) from error
        finally:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)


class _StoppedWorkError(Exception):
    """Nobody waits for this work any more."""


def _advance(count: int) -> None:
    """Set in a worker process, by `_start_worker`."""


def _start_worker(total: Any, stopped: Any) -> None:
    """Sets a worker process up."""
    global _advance
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the first one tells the others
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes themselves take all cores
    parent = multiprocessing.parent_process()
    if parent:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()

    def advance(count: int) -> None:
        if stopped.is_set():
            raise _StoppedWorkError
        with total.get_lock():
            total.value += count

    _advance = advance


def _end_with(sentinel: int) -> None:
    """Ends this process when the one of the sentinel does."""
    connection.wait([sentinel])
    os._exit(1)


def _call(function: Callable[[Task, Advance], Result], task: Task) -> Result:
    return function(task, _advance)
