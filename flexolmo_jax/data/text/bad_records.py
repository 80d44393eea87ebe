"""Records of input files without usable text: counted, or an error."""

import collections
import dataclasses
from collections.abc import Mapping
from typing import Any

from flexolmo_jax.errors import UserError

_LISTED = 100


class BadRecordError(UserError):
    """A record, a file or the rest of a file has no usable text; the message says why, and what to do.

    Attributes:
      kind: why, in a few words without details, by which bad records are counted.
    """

    def __init__(self, message: str, kind: str = "unusable"):
        """Takes the message and the kind."""
        super().__init__(message)
        self.kind = kind


class StoppedError(UserError):
    """A bad record, where bad records are errors; the message begins with its place.

    Attributes:
      documents: number of documents that had been tokenized before.
      tokens: number of their tokens.
    """

    documents = tokens = 0

    def after(self, documents: int, tokens: int, kept: str = "") -> "StoppedError":
        """The same error; its message tells how far the work had come, and what of it is kept."""
        counts = f"stopped after {documents:,} documents, {tokens:,} tokens"
        return StoppedError(f"{self} ({counts}; no corpus is made{kept and f', {kept}'})")


@dataclasses.dataclass
class BadRecords:
    """Raises an error at the first bad record, or counts them.

    Attributes:
      skip: whether to count them and continue.
      count: number of bad records.
      kinds: the number of each kind.
      listed: the first hundred, {"place", "reason"}.
    """

    skip: bool = False
    count: int = 0
    kinds: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    listed: list[dict[str, str]] = dataclasses.field(default_factory=list)

    def add(self, place: str, reason: object) -> None:
        """Counts a bad record at `place`.

        Raises:
          StoppedError: `skip` is False.
        """
        if not self.skip:
            raise StoppedError(f"{place}: {reason}")
        self.count += 1
        self.kinds[getattr(reason, "kind", "unusable")] += 1
        if len(self.listed) < _LISTED:
            printable = place.encode(errors="backslashreplace").decode()  # file names need not be UTF-8
            self.listed.append({"place": printable, "reason": str(reason)})

    def extend(self, description: Mapping[str, Any]) -> None:
        """Counts the bad records of a description that follow these.

        Raises:
          StoppedError: there are some, and `skip` is False.
        """
        if description["count"] and not self.skip:
            first = description["records"][0]
            raise StoppedError(f"{first['place']}: {first['reason']}")
        self.count += description["count"]
        self.kinds.update(description["kinds"])
        self.listed += description["records"][: _LISTED - len(self.listed)]

    def first(self) -> str:
        """The place and reason of the first, for messages."""
        return f"the first: {self.listed[0]['place']}: {self.listed[0]['reason']}"

    def description(self) -> dict[str, Any]:
        """The record of them in corpus.json."""
        return {"count": self.count, "kinds": dict(sorted(self.kinds.items())), "records": self.listed}
