"""The `metrics.jsonl` of a run: a line of JSON for each report, in the order of steps."""

import json
import time
from collections.abc import Iterable, Mapping
from typing import Any

from etils import epath

from flexolmo_jax.paths import is_remote

METRICS_FILE = "metrics.jsonl"
_STORE_SECONDS = 60.0  # between rewritings of a remote file


class MetricsFile:
    """Appends lines to a file. Object stores cannot append: there the whole file is written again, now and then."""

    def __init__(self, workdir: epath.Path):
        """Names the file in `workdir`; nothing is read or written yet."""
        self._path, self._is_remote = workdir / METRICS_FILE, is_remote(workdir)
        self._lines: list[str] = []  # of a remote file
        self._stored, self._stored_at = 0, time.monotonic()

    def drop_later(self, first: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Drops the lines of steps after `first`; returns the values of those that stay, and of those that go."""
        if not self._path.exists():
            return [], []
        lines = [(line, _parsed(line)) for line in self._path.read_text().splitlines()]
        kept = [(line, values) for line, values in lines if values and values["step"] <= first]
        if self._is_remote:
            self._lines, self._stored = [line for line, _ in kept], len(lines)
            self.store()
        else:
            temporary = self._path.with_name(f".{METRICS_FILE}.incomplete")
            temporary.write_text(_text(line for line, _ in kept))
            temporary.replace(self._path)
        stay = [values for _, values in kept if values]
        return stay, [values for _, values in lines[len(kept) :] if values]

    def append(self, values: Mapping[str, Any]) -> None:
        """Adds a line."""
        line = json.dumps(values)
        if not self._is_remote:
            with self._path.open("a") as file:
                file.write(f"{line}\n")
            return
        self._lines.append(line)
        if time.monotonic() - self._stored_at >= _STORE_SECONDS:
            self.store()

    def store(self) -> None:
        """Sees to it that all lines are in the file."""
        if not self._is_remote or len(self._lines) == self._stored:
            return
        if self._lines:
            self._path.write_text(_text(self._lines))
        else:  # some object stores refuse an empty file
            self._path.unlink()
        self._stored, self._stored_at = len(self._lines), time.monotonic()


def _text(lines: Iterable[str]) -> str:
    return "".join(f"{line}\n" for line in lines)


def _parsed(line: str) -> dict[str, Any] | None:
    """A line's values; None for the torn last line of a run that was killed."""
    try:
        values = json.loads(line)
        return values if isinstance(values, dict) and isinstance(values["step"], int) else None
    except (ValueError, KeyError):
        return None
