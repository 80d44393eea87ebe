"""Which leaves are trained: an ordered table of path patterns, each marked trainable or frozen."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flexolmo_jax.errors import UserError

TRAINABLE, FROZEN = "trainable", "frozen"
# By what is trained: an anchor; an owner's expert; a merged model's router; all of a merged model.
PARTITIONS = {
    # The router row and bias of an anchor wait for its experts: alone, it has nothing to route.
    "anchor": ((r"blocks/moe/anchor/router/.*", FROZEN), (r".*", TRAINABLE)),
    "expert": ((r"blocks/moe/expert/.*", TRAINABLE), (r".*", FROZEN)),
    "router": ((r"blocks/moe/experts/router/.*", TRAINABLE), (r".*", FROZEN)),
    "joint": ((r".*", TRAINABLE),),
}


def trainable_paths(paths: Iterable[str], partition: Sequence[tuple[str, str]]) -> set[str]:
    """The paths a partition marks trainable; the first pattern that matches a whole path decides.

    Args:
      paths: every leaf's path, such as `blocks/moe/expert/gate`.
      partition: (regular expression, "trainable" or "frozen") in order.

    Raises:
      UserError: a path no pattern matches, a pattern that decides no path, an unknown mark or a bad
        expression, or nothing left to train.
    """
    flag = "--config.partition"
    for pattern, mark in partition:
        if mark not in (TRAINABLE, FROZEN):
            raise UserError(f"{flag}: '{pattern}' is marked '{mark}'; use '{TRAINABLE}' or '{FROZEN}'")
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"{flag}: '{pattern}' is not a regular expression ({error})") from None
    deciding: dict[str, list[str]] = {pattern: [] for pattern, _ in partition}
    trainable = set()
    for path in paths:
        rule = next(((p, mark) for p, mark in partition if re.fullmatch(p, path)), None)
        if rule is None:
            raise UserError(f"{flag}: no pattern matches the leaf {path}; add one that does")
        deciding[rule[0]].append(path)
        if rule[1] == TRAINABLE:
            trainable.add(path)
    idle = [pattern for pattern, decided in deciding.items() if not decided]
    if idle:
        raise UserError(f"{flag}: '{idle[0]}' decides no leaf of this model; remove it, or fix or move it")
    if not trainable:
        raise UserError(f"{flag}: every leaf is frozen; mark at least one pattern '{TRAINABLE}'")
    return trainable


def split(leaves: Mapping[str, Any], trainable: set[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits a flat dict into (trainable, frozen)."""
    return (
        {path: leaf for path, leaf in leaves.items() if path in trainable},
        {path: leaf for path, leaf in leaves.items() if path not in trainable},
    )
