"""Where the wall time of a run goes, as it runs and afterwards (docs/reliability.md, "Goodput").

Each line of `metrics.jsonl` that follows a step has the seconds since the line before: `seconds/steps`, and what was no
step: `seconds/evaluation`, `seconds/checkpoint`; after a start also `seconds/start` and `seconds/lost`. What is left of
the time between the first line and the last is that in which no process ran.
"""

import contextlib
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

BETWEEN_STEPS = ("start", "evaluation", "checkpoint")  # while the loop takes no step
ALWAYS = ("steps", "data")  # in each line; waiting for batches is in the time of steps
Line = Mapping[str, Any]


class Clock:
    """Measures what a run spends its time on, lap by lap; made when the run is started."""

    def __init__(self):
        """Starts the first lap."""
        self._since, self._spent = time.perf_counter(), defaultdict[str, float](float)

    @contextlib.contextmanager
    def spending(self, activity: str) -> Iterator[None]:
        """Counts the block's time as that of an activity."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._spent[activity] += time.perf_counter() - began

    def spend(self, activity: str, seconds: float) -> None:
        """Counts seconds as those of an activity."""
        self._spent[activity] += seconds

    def has_started(self) -> None:
        """Counts all the time until now as that of the start."""
        self._spent["start"] = time.perf_counter() - self._since

    def lap(self) -> dict[str, float]:
        """{"seconds/ACTIVITY": seconds} since the last lap."""
        now = time.perf_counter()
        elapsed, self._since = now - self._since, now
        spent, self._spent = self._spent, defaultdict[str, float](float)
        spent["steps"] = max(0.0, elapsed - sum(spent[activity] for activity in BETWEEN_STEPS))
        names = [*ALWAYS, *(name for name in sorted(spent) if name not in ALWAYS and spent[name])]
        return {f"seconds/{name}": spent[name] for name in names}


def began(lines: Sequence[Line]) -> float:
    """When a run was started first, in seconds since 1970, by its lines; infinite where they do not say it.

    Of a run that was killed before its first checkpoint, all lines were dropped: the first one then has their seconds
    as lost.
    """
    if not lines or "seconds/start" not in lines[0]:
        return math.inf
    return lines[0]["time"] - sum(lines[0].get(f"seconds/{name}", 0.0) for name in ("steps", *BETWEEN_STEPS, "lost"))


def seconds_of_steps(lines: Sequence[Line]) -> float:
    """The time of the steps in these lines."""
    return sum(line.get("seconds/steps", 0.0) for line in lines)


def time_spent(lines: Sequence[Line]) -> dict[str, float]:
    """{activity: seconds} of a run, by all lines of its `metrics.jsonl`.

    Returns:
      "steps", "start", "evaluation", "checkpoint", "lost" (steps that were taken again), and "away": the time in which
      no process ran. Goodput is the share of "steps" in the sum.
    """
    spent = {
        name: sum(line.get(f"seconds/{name}", 0.0) for line in lines) for name in ("steps", *BETWEEN_STEPS, "lost")
    }
    elapsed = lines[-1]["time"] - began(lines) if lines and math.isfinite(began(lines)) else sum(spent.values())
    return spent | {"away": max(0.0, elapsed - sum(spent.values()))}
