"""The command line: a table of verbs, each a module that declares its flags and does its work in `run`."""

import importlib
import itertools
import os
import sys
import types
from collections.abc import Sequence
from pathlib import Path

from absl import flags, logging

import configs
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


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one verb; bad input ends in one line on standard error and exit status 2."""
    verb, *rest = (sys.argv[1:] if arguments is None else list(arguments)) or ["help"]
    try:
        _run(verb, rest)
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.stderr.write(f"{PROGRAM} {verb}: interrupted\n")
        sys.exit(130)
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (UserError, OSError) as error:
        text = str(error) if isinstance(error, UserError) else _reason(error)
        sys.stderr.write(f"{PROGRAM} {verb}: {' '.join(text.split())}\n")
        sys.exit(2)


def _run(verb: str, arguments: Sequence[str]) -> None:
    if verb in ("--help", "-h", "help"):
        print(_overview())
        return
    if verb not in VERBS:
        raise UserError(f"'{verb}' is no verb; use one of {', '.join(VERBS)}")
    module = importlib.import_module(f"flexolmo_jax.cli.{verb.replace('-', '_')}")
    if any(argument in ("--help", "-h", "-help", "--helpfull") for argument in arguments):
        print(_help(verb, module))
        return
    positional = _parse(verb, module, arguments)
    logging.use_absl_handler()
    logging.set_verbosity(logging.WARNING)
    module.run(*positional)


def _parse(verb: str, module: types.ModuleType, arguments: Sequence[str]) -> list[str]:
    """Parses the flags that a verb's module defines; returns what is not a flag."""
    arguments = list(itertools.starmap(_located, itertools.pairwise(["", *arguments])))
    try:
        positional = flags.FLAGS([f"{PROGRAM} {verb}", *map(_underscored, arguments)])[1:]
    except flags.Error as error:
        raise UserError(f"{_reason(error)} (see `{PROGRAM} {verb} --help`)") from error
    except Exception as error:  # reading a configuration file runs it, so it may be anything
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


def _reason(error: Exception) -> str:
    """What an error of a library says, without the traceback that ml_collections puts in the middle."""
    lines = str(error).strip().splitlines() or [""]
    return " ".join(dict.fromkeys((lines[0], lines[-1])))


def _overview() -> str:
    width = max(map(len, VERBS))
    lines = [f"  {verb:<{width}}  {does}" for verb, does in VERBS.items()]
    return "\n".join([f"usage: {PROGRAM} VERB [--flag=value ...]", "", *lines, "", f"{PROGRAM} VERB --help says more."])


def _help(verb: str, module: types.ModuleType) -> str:
    return "\n".join([f"{PROGRAM} {verb}: {VERBS[verb]}", "", module.__doc__.strip(), flags.FLAGS.module_help(module)])
