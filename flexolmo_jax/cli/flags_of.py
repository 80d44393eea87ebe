"""Error messages of the library, with flags in place of its arguments."""

import re
from collections.abc import Mapping, Sequence

from configs import base
from flexolmo_jax.errors import ArgumentError, UserError

# config.KEY, unless it is a flag already or the name of a file.
_KEY = re.compile(rf"(?<![\w./-])config\.(?=({'|'.join(base.get_config())})\b)")


def translate(error: UserError, values: Mapping[str, object], flags: Mapping[str, str]) -> str:
    """The message of an error for the user of a command.

    Args:
      error: raised by the library.
      values: {flag: value or list of values} of the command.
      flags: {argument of the library: flag}, where their names differ.

    Returns:
      The message. An argument, a path that is the value of a flag, and keys of a configuration are written as flags:
      "--model=runs/a: no such directory; give a model directory".
    """
    message = str(error)
    if isinstance(error, ArgumentError) and not error.argument.startswith("config."):
        flag = flags.get(error.argument, error.argument)
        message = f"--{flag}={error.value}: {error.problem}"
    else:
        candidates = ((name, value) for name, every in values.items() for value in _each(every) if value)
        flag = next((name for name, value in candidates if message.startswith(f"{value}: ")), None)
        message = message if flag is None else f"--{flag}={message}"
    return as_flags(message)


def as_flags(text: str) -> str:
    """A text in which keys of a configuration are flags: "--config.steps=2" for "config.steps=2"."""
    return _KEY.sub("--config.", text)


def renamed_key(arguments: Sequence[str], reason: str) -> str:
    """Names the new key where a flag, or the reason why a configuration file failed, has an old one; "" elsewhere.

    Args:
      arguments: of the command.
      reason: the message of ml_collections, which quotes the last part of a key.
    """
    for old, new in base.RENAMED.items():
        in_flag = any(re.match(rf"--config\.{re.escape(old)}[.=]", argument) for argument in arguments)
        if in_flag or re.search(rf"""['"]{old.rpartition(".")[2]}['"]""", reason):
            return f"--config.{old} is now --config.{new}"
    return ""


def _each(value: object) -> Sequence[str]:
    """The strings among a flag's values."""
    values = value if isinstance(value, list | tuple) else [value]
    return [value for value in values if isinstance(value, str)]
