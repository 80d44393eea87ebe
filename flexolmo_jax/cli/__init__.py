"""The command line: a table of commands, each a module that declares its flags and does its work in `run`.

To add a command, write `cli/NAME.py` and add it to `COMMANDS`. The module has

- a docstring, which is its help, with an example;
- absl flags;
- `run(*arguments)`, which does the work; arguments that are not flags are allowed if it takes any;
- optionally `FLAG_OF`, {argument of the library: flag} where their names differ, for error messages;
- optionally `MEMORY_REMEDY`, what to lower when memory does not suffice;
- optionally `KEEPS_COMPILED = False`, if it must compile anew each time.
"""

import functools
import importlib
import itertools
import os
import re
import sys
import traceback
import types
from collections.abc import Sequence
from inspect import signature  # not the module: the command `inspect` has its name here
from pathlib import Path
from typing import Any, NoReturn

from absl import flags
from ml_collections import ConfigDict

import configs
import flexolmo_jax
from configs.keys import flatten
from flexolmo_jax.cli import compilation_cache, failures, flags_of, process
from flexolmo_jax.errors import UserError

PROGRAM = "flexolmo"
COMMANDS = {
    "tokenize": "makes a corpus directory from texts",
    "select-proxies": "selects public documents that are like an owner's",
    "clean": "drops duplicates, repetitions and held-out text from corpora",
    "train": "trains an anchor, an expert or a model's router, as a configuration describes",
    "statistics": "adds what a merge chooses experts by to a contribution or an anchor",
    "merge": "combines an anchor and contributions into one model",
    "opt-out": "makes a model without some experts, exactly as if they had never been merged",
    "evaluate": "measures a model's held-out loss or its scores on tasks, with any experts left out",
    "report": "writes an HTML page that compares models on held-out text, with every opt-out",
    "generate": "continues a prompt, and shows each expert's share of the routing weight",
    "serve": "serves a model with the OpenAI API",
    "benchmark": "measures training and decoding steps on this machine, and compares with transformers",
    "plan": "computes memory and time of a training step on TPUs or GPUs that this machine lacks",
    "convert": "converts a directory of format 1, which earlier versions wrote, to format 2",
    "inspect": "describes a directory and checks its digests",
    "import-hf": "makes a model or a contribution from a Hugging Face directory",
    "export-hf": "makes a Hugging Face directory from a model, an anchor or a contribution",
}
_TRACEBACK = "--traceback"
# Flags of every command.
flags.DEFINE_bool("traceback", False, "Show the traceback of an error and the logs of libraries, for a bug report.")
flags.DEFINE_string(
    "compilation_cache",
    None,
    "Directory of compiled programs that later processes reuse; by default in your cache directory. Empty: none.",
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command. Errors end in one line on standard error, with exit status 2 if the user can fix them.

    Args:
      arguments: the command and its flags; None for those of this process, which is then set up (see `process`).
    """
    arguments_list = [*map(_with_underscores, sys.argv[1:] if arguments is None else arguments)]
    first = next((i for i, argument in enumerate(arguments_list) if not _is_common(argument)), len(arguments_list))
    command, rest = (arguments_list[first:] or ["help"])[0], arguments_list[:first] + arguments_list[first + 1 :]
    label, shows_traceback = f"{PROGRAM} {command}", _TRACEBACK in rest
    translate = functools.partial(_translated, command)
    if arguments is None:
        process.open_closed_outputs()
    try:
        if arguments is None and not shows_traceback:
            process.quiet_libraries(label, translate)
        _run(command, rest, owns_process=arguments is None)
        _flush()
    except KeyboardInterrupt:
        _end(f"{label}: interrupted", 130)
    except BrokenPipeError:  # the reader of the output has stopped reading
        _drop_output()
        sys.exit(141)
    except SystemExit:
        raise
    except BaseException as error:  # a panic in Rust code is not an `Exception`
        if shows_traceback:
            traceback.print_exception(error)
        failure = failures.describe(error, _destination(), _declared(command, "MEMORY_REMEDY", ""), translate)
        _end(f"{label}: {failure.line}", failure.status)


def _run(command: str, arguments: Sequence[str], owns_process: bool) -> None:
    """Runs a command; `owns_process` if it may change the process's environment and signal handlers."""
    if command in ("--help", "-h", "help"):
        print(_overview())
        return
    if command == "--version":
        print(f"{PROGRAM} {flexolmo_jax.__version__}")
        return
    if command not in COMMANDS:
        raise UserError(f"'{command}' is not a command; use one of {', '.join(COMMANDS)}")
    module = importlib.import_module(_module(command))
    if any(argument in ("--help", "-h", "-help", "--helpfull") for argument in arguments):
        print(_help(command, module))
        return
    positional = _parse(command, module, arguments)
    if owns_process:
        _keep_compiled(command)
        if "out" in flags.FLAGS:
            process.end_on_sigterm()
    module.run(*positional)


def _keep_compiled(command: str) -> None:
    directory = flags.FLAGS.compilation_cache if _declared(command, "KEEPS_COMPILED", True) else ""
    problem = compilation_cache.keep_compiled(directory)
    if problem is not None:
        sys.stderr.write(f"{PROGRAM} {command}: --compilation_cache={directory}: {problem}; continues without it\n")


def _translated(command: str, error: UserError) -> str:
    """The message of an error of the library, with the flags of the command in place of the library's arguments."""
    module = sys.modules.get(_module(command))
    defined = flags.FLAGS.get_key_flags_for_module(module.__name__) if module else []
    values: dict[str, Any] = {flag.name: flag.value for flag in defined}
    config = values.pop("config", None)
    if isinstance(config, ConfigDict):  # not one that could not be read
        values |= flatten(config, "config.")
    return flags_of.translate(error, values, _declared(command, "FLAG_OF", {}))


def _declared(command: str, name: str, default: Any) -> Any:
    """What a command's module declares under a name, if it was imported and declares that."""
    return getattr(sys.modules.get(_module(command)), name, default)


def _destination() -> str:
    """The flag and the path that the command writes to; "" if there is none."""
    values = ((name, flags.FLAGS[name].value) for name in ("out", "workdir", "json") if name in flags.FLAGS)
    return next((f"--{name}={value}" for name, value in values if value), "")


def _module(command: str) -> str:
    return f"{__name__}.{command.replace('-', '_')}"


def _is_common(argument: str) -> bool:
    """Whether an argument is a flag of all commands, which may precede the command."""
    return argument == _TRACEBACK or argument.startswith("--compilation_cache=")


def _flush() -> None:
    """Writes what was printed; raises an OSError that names standard output if that fails."""
    try:
        sys.stdout.flush()
    except OSError as error:
        error.filename = "standard output"
        raise


def _drop_output() -> None:
    """Keeps the interpreter from writing the unwritten output again when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _end(line: str, status: int) -> NoReturn:
    try:
        sys.stdout.flush()
    except OSError:
        _drop_output()
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
    distributed = sys.modules.get("flexolmo_jax.distributed")
    if distributed is not None and distributed.count() > 1:
        os._exit(status)  # a proper end would wait for the others, which may wait for this one
    sys.exit(status)


def _parse(command: str, module: types.ModuleType, arguments: Sequence[str]) -> list[str]:
    """Parses the flags that a command's module defines; returns the other arguments."""
    arguments = list(itertools.starmap(_found_config, itertools.pairwise(["", *arguments])))
    try:
        positional = flags.FLAGS([f"{PROGRAM} {command}", *arguments])[1:]
        if "config" in flags.FLAGS and flags.FLAGS.config is not None:
            _ = flags.FLAGS.config.keys  # reading a value raises the errors of the configuration file
    except flags.Error as error:
        missing = r"flag (--\w+)=None: Flag \S+ must have a value other than None\."
        reason = re.sub(missing, r"\1: not given.", _reason(error))
        raise UserError(f"{reason} (see `{PROGRAM} {command} --help`)") from error
    except (Exception, SystemExit) as error:  # a configuration file is code, so it may raise anything
        config = next((argument for argument in arguments if argument.startswith("--config=")), "--config")
        reason = f"{type(error).__name__}: {_reason(error)}"
        advice = flags_of.renamed_key(arguments, reason) or "the keys of a configuration are those of configs/base.py"
        raise UserError(f"{config}: {reason}; {advice}") from error
    for flag in flags.FLAGS.get_key_flags_for_module(module.__name__):
        if flag.present > 1 and not isinstance(flag, flags.MultiFlag):
            raise UserError(f"--{flag.name}: given {flag.present} times; give it once")
    if positional and not signature(module.run).parameters:
        raise UserError(f"'{positional[0]}' is not a flag; write --name=value (see `{PROGRAM} {command} --help`)")
    return positional


def _found_config(previous: str, argument: str) -> str:
    """The argument, with the path of its configuration file if only this package has that.

    The file is that of `--config=FILE:ARGUMENT`, or of the argument after `--config`.
    """
    value = argument.removeprefix("--config=")
    file = value.partition(":")[0]
    if (value == argument and previous != "--config") or not file or os.path.exists(file):
        return argument
    folder = Path(configs.__file__).parent
    if Path(file).parent != Path(folder.name) or not (folder.parent / file).is_file():
        raise UserError(f"--config={value}: no such file; give one of your own, or of this package: configs/expert.py")
    return argument.removesuffix(value) + str(folder.parent / value)


def _with_underscores(argument: str) -> str:
    """Makes `--expert_names=x` of `--expert-names=x`; keys of a configuration stay as they are."""
    name, equals, value = argument.partition("=")
    if not name.startswith("--") or name.startswith("--config."):
        return argument
    return f"--{name[2:].replace('-', '_')}{equals}{value}"


def _reason(error: BaseException) -> str:
    """The message of a library's error, without the traceback that ml_collections includes."""
    lines = str(error).strip().splitlines() or [""]
    return " ".join(dict.fromkeys((lines[0], lines[-1])))


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {command:<{width}}  {summary}" for command, summary in COMMANDS.items()]
    usage = f"usage: {PROGRAM} COMMAND [--flag=value ...]"
    return "\n".join([usage, "", *lines, "", f"{PROGRAM} COMMAND --help describes its flags."])


def _help(command: str, module: types.ModuleType) -> str:
    lists = map(flags.FLAGS.module_help, (module, sys.modules[__name__]))
    return "\n".join([f"{PROGRAM} {command}: {COMMANDS[command]}", "", (module.__doc__ or "").strip(), *lists])
