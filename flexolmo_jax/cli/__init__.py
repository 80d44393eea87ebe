"""The command line: a table of verbs, each a module that declares its flags and does its work in `run`."""

import functools
import importlib
import itertools
import os
import re
import sys
import traceback
import types
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from absl import flags

import configs
from flexolmo_jax.cli import compilation_cache, failures, flags_of, process
from flexolmo_jax.errors import UserError

PROGRAM = "flexolmo"
VERBS = {
    "tokenize": "texts to a corpus directory",
    "train": "an anchor, an expert, or a model's router, as a configuration says",
    "merge": "an anchor and contributions to one model",
    "opt-out": "a model without some experts, exactly as if they had never been merged",
    "evaluate": "held-out loss of a model, or its scores on tasks, with any experts left out",
    "generate": "text that continues a prompt, and each expert's share of it",
    "serve": "a model answering the OpenAI API's requests for completions",
    "benchmark": "what steps of training and decoding cost on this machine, next to transformers",
    "plan": "what a training step needs on TPUs or GPUs that need not be there, and how long it takes",
    "inspect": "what a directory is, and whether its digests hold",
    "import-hf": "a model or a contribution of a Hugging Face directory",
    "export-hf": "a Hugging Face directory of a model, an anchor or a contribution",
}
_TRACEBACK = "--traceback"
# Flags of every verb.
flags.DEFINE_bool("traceback", False, "Show everything about an error, and what libraries log, for a report.")
flags.DEFINE_string(
    "compilation_cache",
    None,
    "Directory that keeps compiled programs for the next process; by default one of yours. Empty: none.",
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one verb. Whatever fails ends in one line on standard error, and exit status 2 where a user can fix it.

    Args:
      arguments: what to run; None for those of this process, which then is set up for it (see `process`).
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    given = [*map(_underscored, given)]
    first = next((i for i, argument in enumerate(given) if not _is_common(argument)), len(given))
    verb, rest = (given[first:] or ["help"])[0], given[:first] + given[first + 1 :]
    label, traceback_shown = f"{PROGRAM} {verb}", _TRACEBACK in rest
    if arguments is None:
        process.open_closed_outputs()
    try:
        if arguments is None and not traceback_shown:
            process.quiet_libraries(label)
        _run(verb, rest, alone=arguments is None)
        _flush()
    except KeyboardInterrupt:
        _end(f"{label}: interrupted", 130)
    except BrokenPipeError:  # whoever read our output has seen enough
        _drop_output()
        sys.exit(141)
    except SystemExit:
        raise
    except BaseException as error:  # code of Rust that panics raises no `Exception`
        if traceback_shown:
            traceback.print_exception(error)
        failure = failures.describe(error, _written(), _memory_remedy(verb), functools.partial(_translated, verb))
        _end(f"{label}: {failure.line}", failure.status)


def _run(verb: str, arguments: Sequence[str], alone: bool) -> None:
    """Runs a verb, `alone` in its process or not."""
    if verb in ("--help", "-h", "help"):
        print(_overview())
        return
    if verb not in VERBS:
        raise UserError(f"'{verb}' is no verb; use one of {', '.join(VERBS)}")
    module = importlib.import_module(_module(verb))
    if any(argument in ("--help", "-h", "-help", "--helpfull") for argument in arguments):
        print(_help(verb, module))
        return
    positional = _parse(verb, module, arguments)
    if alone:
        _keep_compiled(verb)
        if "out" in flags.FLAGS:
            process.end_on_sigterm()
    module.run(*positional)


def _keep_compiled(verb: str) -> None:
    directory = "" if verb in compilation_cache.WITHOUT else flags.FLAGS.compilation_cache
    why_not = compilation_cache.keep_compiled(directory)
    if why_not is not None:
        sys.stderr.write(f"{PROGRAM} {verb}: --compilation_cache={directory}: {why_not}; goes on without it\n")


def _translated(verb: str, error: UserError) -> str:
    """The message of an error of the library, in terms of the flags that the verb was given."""
    module = sys.modules.get(_module(verb))
    defined = flags.FLAGS.get_key_flags_for_module(module.__name__) if module else []
    return flags_of.translate(error, {flag.name: flag.value for flag in defined}, getattr(module, "FLAG_OF", {}))


def _written() -> str:
    """The flag and the path that the verb writes to, where it has one."""
    given = ((name, flags.FLAGS[name].value) for name in ("out", "workdir", "json") if name in flags.FLAGS)
    return next((f"--{name}={value}" for name, value in given if value), "")


def _memory_remedy(verb: str) -> str:
    """What a verb's module says to do where memory does not suffice."""
    return getattr(sys.modules.get(_module(verb)), "MEMORY_REMEDY", "")


def _module(verb: str) -> str:
    return f"{__name__}.{verb.replace('-', '_')}"


def _is_common(argument: str) -> bool:
    """Whether an argument is a flag of all verbs, which may stand before the verb."""
    return argument == _TRACEBACK or argument.startswith("--compilation_cache=")


def _flush() -> None:
    """Writes what was printed; raises OSError, which names standard output, where that cannot be."""
    try:
        sys.stdout.flush()
    except OSError as error:
        error.filename = "standard output"
        raise


def _drop_output() -> None:
    """Has the interpreter, as it ends, not try once more to write what could not be written."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _end(line: str, status: int) -> NoReturn:
    try:
        sys.stdout.flush()
    except OSError:
        _drop_output()
    sys.stderr.write(f"{line}\n")
    sys.exit(status)


def _parse(verb: str, module: types.ModuleType, arguments: Sequence[str]) -> list[str]:
    """Parses the flags that a verb's module defines; returns what is not a flag."""
    arguments = list(itertools.starmap(_located, itertools.pairwise(["", *arguments])))
    try:
        positional = flags.FLAGS([f"{PROGRAM} {verb}", *arguments])[1:]
        if "config" in flags.FLAGS:
            _ = flags.FLAGS.config.keys  # a file that could not be read is only told of when it is used
    except flags.Error as error:
        missing = r"flag (--\w+)=None: Flag \S+ must have a value other than None\."
        reason = re.sub(missing, r"\1: not given.", _reason(error))
        raise UserError(f"{reason} (see `{PROGRAM} {verb} --help`)") from error
    except (Exception, SystemExit) as error:  # reading a configuration file runs it, so it may be anything
        config = next((argument for argument in arguments if argument.startswith("--config=")), "--config")
        reason = f"{type(error).__name__}: {_reason(error)}"
        raise UserError(f"{config}: {reason}; the keys of a configuration are those of configs/base.py") from error
    for flag in flags.FLAGS.get_key_flags_for_module(module.__name__):
        if flag.present > 1 and not isinstance(flag, flags.MultiFlag):
            raise UserError(f"--{flag.name}: given {flag.present} times; give it once")
    if positional and verb != "inspect":
        raise UserError(f"'{positional[0]}' is not a flag; write --name=value (see `{PROGRAM} {verb} --help`)")
    return positional


def _located(before: str, argument: str) -> str:
    """The file of `--config=FILE:ARGUMENT`, or of what follows `--config`, as it is here or else in this package."""
    value = argument.removeprefix("--config=")
    file = value.partition(":")[0]
    if (value == argument and before != "--config") or not file or os.path.exists(file):
        return argument
    folder = Path(configs.__file__).parent
    if Path(file).parent != Path(folder.name) or not (folder.parent / file).is_file():
        raise UserError(f"--config={value}: no such file; give one of your own, or of this package: configs/expert.py")
    return argument.removesuffix(value) + str(folder.parent / value)


def _underscored(argument: str) -> str:
    """`--expert-names=x` is `--expert_names=x`; keys of a configuration are taken as they are."""
    name, equals, value = argument.partition("=")
    if not name.startswith("--") or name.startswith("--config."):
        return argument
    return f"--{name[2:].replace('-', '_')}{equals}{value}"


def _reason(error: BaseException) -> str:
    """What an error of a library says, without the traceback that ml_collections puts in the middle."""
    lines = str(error).strip().splitlines() or [""]
    return " ".join(dict.fromkeys((lines[0], lines[-1])))


def _overview() -> str:
    width = max(map(len, VERBS))
    lines = [f"  {verb:<{width}}  {does}" for verb, does in VERBS.items()]
    return "\n".join([f"usage: {PROGRAM} VERB [--flag=value ...]", "", *lines, "", f"{PROGRAM} VERB --help says more."])


def _help(verb: str, module: types.ModuleType) -> str:
    lists = map(flags.FLAGS.module_help, (module, sys.modules[__name__]))
    return "\n".join([f"{PROGRAM} {verb}: {VERBS[verb]}", "", module.__doc__.strip(), *lists])
