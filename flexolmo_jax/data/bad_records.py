"""What becomes of records that hold no usable text."""

import dataclasses
from typing import Any

from flexolmo_jax.errors import UserError

_LISTED = 100


class BadRecordError(UserError):
    """A record (or a file, or the rest of one) holds no usable text; the message says why and what to do."""


class StoppedError(UserError):
    """The first bad record, where they are not to be skipped; the message begins with its place."""


@dataclasses.dataclass
class BadRecords:
    """Stops at the first bad record, or counts them.

    Attributes:
      skip: whether to go on.
      count: how many there were.
      listed: of the first hundred, {"place", "reason"}.
    """

    skip: bool = False
    count: int = 0
    listed: list[dict[str, str]] = dataclasses.field(default_factory=list)

    def add(self, place: str, reason: object) -> None:
        """Counts a bad record at `place`.

        Raises:
          StoppedError: bad records are not to be skipped.
        """
        if not self.skip:
            raise StoppedError(f"{place}: {reason}")
        self.count += 1
        if len(self.listed) < _LISTED:
            printable = place.encode(errors="backslashreplace").decode()  # names of files may be no UTF-8
            self.listed.append({"place": printable, "reason": str(reason)})

    def first(self) -> str:
        """Names the first of them, for people."""
        return f"the first: {self.listed[0]['place']}: {self.listed[0]['reason']}"

    def description(self) -> dict[str, Any]:
        """What a corpus keeps of them."""
        return {"count": self.count, "records": self.listed}
