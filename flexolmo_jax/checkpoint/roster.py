"""The experts of a model: what a manifest says of each, and the names that they may have."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from flexolmo_jax.checkpoint import DTYPES
from flexolmo_jax.checkpoint.tree import Slice, combined_digest

ANCHOR_NAME = "anchor"
NAME_RULE = f"use lower-case letters, digits, - and _, and not '{ANCHOR_NAME}'"
EXPERT_TYPES = {"name": str, "leaves": dict, "card": dict}
CONTRIBUTION_TYPES = {"expert": str, "leaves": dict, "card": dict, "anchor_digest": str, "architecture": dict}

Casts = Mapping[str, Mapping[str, Any]]
"""{leaf: {"dtypes": [of what was published, ..., of what is stored], "digest": of what is stored}}."""


def cast_record(before: Casts, leaf: str, part: Slice, digest: str) -> dict[str, Any]:
    """The record of a leaf that was read as `part` says, and was written with that digest."""
    dtypes = before[leaf]["dtypes"] if leaf in before else [part.source_dtype.name]
    return {"dtypes": [*dtypes, part.dtype.name], "digest": digest}


def stored_digests(leaves: Mapping[str, str], casts: Casts) -> dict[str, str]:
    """{leaf: digest of what is stored}."""
    return {leaf: casts[leaf]["digest"] if leaf in casts else digest for leaf, digest in leaves.items()}


@dataclasses.dataclass(frozen=True)
class Expert:
    """One line of the roster.

    Attributes:
      name: in the roster.
      leaves: {leaf: digest} as its owner published them.
      card: the data card that its owner wrote.
      casts: of the leaves that are stored in another dtype than they were published in.
      contribution: the manifest that came from its owner, as it was; None: it came without one.
    """

    name: str
    leaves: Mapping[str, str]
    card: Mapping[str, Any]
    casts: Casts = dataclasses.field(default_factory=dict)
    contribution: Mapping[str, Any] | None = dataclasses.field(default=None, compare=False)

    @property
    def digest(self) -> str:
        """Of what its owner published."""
        return combined_digest(self.leaves)

    @property
    def stored(self) -> dict[str, str]:
        """{leaf: digest of what is stored}."""
        return stored_digests(self.leaves, self.casts)

    @property
    def owner_name(self) -> str:
        """The name that its owner gave it; another one in the roster is an alias."""
        return self.contribution["expert"] if self.contribution else self.name

    def document(self) -> dict[str, Any]:
        """What a model's manifest says of it, for JSON."""
        document = {"name": self.name, "leaves": dict(self.leaves), "card": dict(self.card), "digest": self.digest}
        document |= {"casts": dict(sorted(self.casts.items()))} if self.casts else {}
        return document | ({"contribution": self.contribution} if self.contribution else {})

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> "Expert":
        """Reads what `document` wrote; raises KeyError, TypeError, ValueError or AttributeError where it is damaged."""
        check_types(record, EXPERT_TYPES)
        contribution = record.get("contribution")
        if contribution is not None:
            check_types(contribution, CONTRIBUTION_TYPES)
        return cls(record["name"], record["leaves"], record["card"], read_casts(record, "leaves"), contribution)


def is_expert_name(name: str) -> bool:
    """Whether a contributed expert can have that name (`NAME_RULE`)."""
    return re.fullmatch(r"[a-z0-9][a-z0-9_-]*", name) is not None and name != ANCHOR_NAME


def check_types(record: Mapping[str, Any], types: Mapping[str, type]) -> None:
    """Raises KeyError or TypeError unless a record has these keys, with values of these types."""
    for key, expected in types.items():
        if not isinstance(record[key], expected):
            raise TypeError(f"{key} is no {expected.__name__}")
    for key in ("leaves", "shared"):
        if types.get(key) is dict and not all(isinstance(digest, str) for digest in record[key].values()):
            raise TypeError(f"{key}: a digest is no str")
    if "architecture" in types and not all(isinstance(x, int | float | str) for x in record["architecture"].values()):
        raise TypeError("architecture: a value is neither a number nor a name")


def read_casts(record: Mapping[str, Any], leaves: str) -> Casts:
    """The casts of a record, none where it names none; raises as `Expert.read` does."""
    casts = record.get("casts", {})
    for leaf, cast in casts.items():
        check_types(cast, {"dtypes": list, "digest": str})
        if leaf not in record[leaves] or len(cast["dtypes"]) < 2 or not set(cast["dtypes"]) <= set(DTYPES):
            raise ValueError(f"a cast of {leaf} to {cast['dtypes']}")
    return casts
