"""Fields of a JSON request: each is read as what it must be, or refused with what would be right."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from flexolmo_jax.serving.errors import ApiError

_INT32_MAX = 2**31 - 1


def read_object(body: bytes) -> dict[str, Any]:
    """The fields of a body.

    Raises:
      ApiError: 400, it is no JSON object.
    """
    try:
        given = json.loads(body)
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise ApiError(400, f"the body is not JSON ({reason}); send an object of fields") from error
    if not isinstance(given, dict):
        raise ApiError(400, f"the body is {shown(given)}; send a JSON object of fields")
    return given


def texts(given: Mapping[str, Any], name: str, at_most: int | None = None) -> list[str]:
    """A list of texts that are not empty, which may be given as one text; none by default."""
    value = given.get(name)
    if value is None:
        return []
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list) or not all(is_text(text) and text for text in found):
        raise bad(name, given, "a text that is not empty, or a list of such")
    if at_most is not None and len(found) > at_most:
        raise ApiError(400, f"{name}: has {len(found)} texts; give at most {at_most}", name)
    return found


def integer(given: Mapping[str, Any], name: str, default: int, low: int, high: int = _INT32_MAX) -> int:
    """A whole number from `low` to `high`."""
    value = default if given.get(name) is None else given[name]
    if type(value) is not int or not low <= value <= high:
        raise bad(name, given, f"a whole number from {low} to {high}")
    return value


def optional_integer(given: Mapping[str, Any], name: str, low: int, high: int = _INT32_MAX) -> int | None:
    """The same, or None where it is not given."""
    return None if given.get(name) is None else integer(given, name, low, low, high)


def number(given: Mapping[str, Any], name: str, default: float, low: float, high: float, above: bool = False) -> float:
    """A number from `low` to `high`, or above `low`."""
    value = default if given.get(name) is None else given[name]
    if type(value) not in (int, float) or not low <= value <= high or (above and value == low):
        raise bad(name, given, f"a number {f'above {low:g} and at most' if above else f'from {low:g} to'} {high:g}")
    return float(value)


def boolean(given: Mapping[str, Any], name: str, default: bool = False) -> bool:
    """True or false."""
    value = default if given.get(name) is None else given[name]
    if not isinstance(value, bool):
        raise bad(name, given, "true or false")
    return value


def token_ids(given: Mapping[str, Any], name: str, vocab_size: int, at_most: int) -> tuple[int, ...]:
    """A list of token ids; none by default."""
    value = [] if given.get(name) is None else given[name]
    if not isinstance(value, list) or not all(type(id) is int and 0 <= id < vocab_size for id in value):
        raise bad(name, given, f"a list of token ids from 0 to {vocab_size - 1}")
    if len(value) > at_most:
        raise ApiError(400, f"{name}: has {len(value)} token ids; give at most {at_most}", name)
    return tuple(value)


def is_text(value: Any) -> bool:
    """Whether it is a text that can be written in UTF-8: JSON can escape half a surrogate pair."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def is_ids(value: Any) -> bool:
    """Whether it is a list of whole numbers, at least one."""
    return isinstance(value, list) and len(value) > 0 and all(type(id) is int for id in value)


def shown(value: Any) -> str:
    """A value as a message shows it: as JSON says it, and not at length."""
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def bad(name: str, given: Mapping[str, Any], right: str) -> ApiError:
    """What to raise where a field is wrong or missing."""
    found = f"is {shown(given[name])}" if given.get(name) is not None else "is missing"
    return ApiError(400, f"{name}: {found}; give {right}", name)


def refuse_unknown(given: Mapping[str, Any], supported: Sequence[str], neutral: Mapping[str, tuple], kind: str) -> None:
    """A field that is not known is refused too: a misspelt `without` must not pass unseen.

    Args:
      given: the fields.
      supported: names of those that are read.
      neutral: {name of a field that would change the answer and is not supported: the values that would not}; of a
        field that changes nothing, an empty tuple.
      kind: what is asked for, in a message.

    Raises:
      ApiError: 400.
    """
    for name, value in given.items():
        if name in supported or value is None:
            continue
        if name not in neutral:
            message = f"{shown(name)}: is not a field of a {kind}; use some of {', '.join(supported)}"
            raise ApiError(400, message, name.encode(errors="replace").decode())
        # JSON's true is no 1.
        if neutral[name] and not any(type(value) is type(same) and value == same for same in neutral[name]):
            raise ApiError(400, f"{name}: is not supported here; leave it out", name)
