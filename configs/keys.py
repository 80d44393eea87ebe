"""How a configuration key is declared: its default and, where not every value will do, a bound."""

import dataclasses
import math
import pkgutil
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

# Returns what is wrong with a value and what would be right, or "".
Bound = Callable[[Any], str]


@dataclasses.dataclass(frozen=True)
class Key:
    """The default of a key, and the bound of its values. A default outside the bound has to be set."""

    default: Any
    bound: Bound


def key(default: Any, bound: Bound) -> Any:
    """Declares a key that has a bound: its default, which may lie outside, and the bound."""
    return Key(default, bound)


def at_least(minimum: float, below: float = math.inf, shown: str = "") -> Bound:
    """Numbers from `minimum` on and, where given, `below` a limit; `shown` is how the limit is written."""
    limits = f"must be at least {minimum}" + (f" and below {shown or below}" if below < math.inf else "")
    return lambda value: "" if minimum <= value < below else limits


def fraction(value: float) -> str:
    """A bound: numbers from 0 to 1, both included."""
    return "" if 0 <= value <= 1 else "must be from 0 to 1"


def choices(*values: str, registry: str = "") -> Bound:
    """Some strings, and the keys of a registry "module:NAME" of flexolmo_jax, imported when a value is checked."""

    def bound(value: str) -> str:
        allowed = [*values, *(pkgutil.resolve_name(f"flexolmo_jax.{registry}") if registry else ())]
        return "" if value in allowed else f"must be one of {', '.join(allowed)}"

    return bound


def pairs(value: Sequence[Any]) -> str:
    """A bound: a sequence of pairs."""
    return "" if _holds(value, 2) else "must hold pairs; write them in a configuration file"


def triples(value: Sequence[Any]) -> str:
    """A bound: a sequence of triples."""
    return "" if _holds(value, 3) else "must hold triples; write them in a configuration file"


def _holds(value: Sequence[Any], size: int) -> bool:
    return all(isinstance(item, Sequence) and not isinstance(item, str) and len(item) == size for item in value)


def patterns(value: Sequence[str]) -> str:
    """A bound: a sequence of regular expressions."""
    for pattern in value:
        try:
            re.compile(pattern)
        except re.error as error:
            return f"'{pattern}' is not a regular expression ({error})"
    return ""


def flatten(config: Mapping[str, Any] | ConfigDict, prefix: str = "") -> dict[str, Any]:
    """{dotted key: value} of a configuration and its sections."""
    flat = {}
    for name, value in config.items():
        flat |= (
            flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping | ConfigDict) else {prefix + name: value}
        )
    return flat


def defaults(declared: ConfigDict) -> ConfigDict:
    """The configuration that declarations describe: every key with its default. Locked: an unknown key is an error."""
    config = ConfigDict()
    for name, value in declared.items():
        value = value.default if isinstance(value, Key) else value
        config[name] = defaults(value) if isinstance(value, ConfigDict) else value
    return config.lock()


def first_problem(declared: ConfigDict, config: ConfigDict) -> tuple[str, Any, str] | None:
    """The first key of a configuration that is missing, unknown or out of its bound.

    Args:
      declared: the declarations.
      config: the configuration.

    Returns:
      (dotted key, its value, what is wrong), or None.
    """
    known, values = flatten(declared), flatten(config)
    for name in known.keys() ^ values.keys():
        return name, values.get(name), "is missing" if name in known else "no such key; configs/base.py has all of them"
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            return name, value, "must be a finite number"
        if isinstance(known[name], Key) and (problem := known[name].bound(value)):
            return name, value, problem
    return None
