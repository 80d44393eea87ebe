"""Records of input files without usable text: counted, or an error."""

import dataclasses
from typing import Any

from flexolmo_jax.errors import UserError

_LISTED = 100


class BadRecordError(UserError):
    """A record, a file or the rest of a file has no usable text; the message says why, and what to do."""


class StoppedError(UserError):
    """A bad record, where bad records are errors; the message begins with its place."""


@dataclasses.dataclass
class BadRecords:
    """Raises an error at the first bad record, or counts them.

    Attributes:
      skip: whether to count them and continue.
      count: number of bad records.
      listed: the first hundred, {"place", "reason"}.
    """

    skip: bool = False
    count: int = 0
    listed: list[dict[str, str]] = dataclasses.field(default_factory=list)

    def add(self, place: str, reason: object) -> None:
        """Counts a bad record at `place`.

        Raises:
          StoppedError: `skip` is False.
        """
        if not self.skip:
            raise StoppedError(f"{place}: {reason}")
        self.count += 1
        if len(self.listed) < _LISTED:
            printable = place.encode(errors="backslashreplace").decode()  # file names need not be UTF-8
            self.listed.append({"place": printable, "reason": str(reason)})

    def first(self) -> str:
        """The place and reason of the first, for messages."""
        return f"the first: {self.listed[0]['place']}: {self.listed[0]['reason']}"

    def description(self) -> dict[str, Any]:
        """The record of them in corpus.json."""
        return {"count": self.count, "records": self.listed}
