"""The documentation: its commands have flags, keys and configurations that exist, and its links lead somewhere."""

import functools
import importlib
import pathlib
import re
import shlex

import pytest

from configs import base
from flexolmo_jax import cli
from tests.support.small import flexolmo

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
# `flexolmo ...`, and `$launch --name=NAME ...`, which is the same through a launcher.
COMMAND = re.compile(r"^ {4,}(?:flexolmo|\$launch(?: --\S+)*) (.*)$", re.MULTILINE)
COMMANDS = sorted(
    {
        (page.relative_to(ROOT).as_posix(), " ".join(f"flexolmo {line}".split()))
        for page in PAGES
        if page.name != "CHANGELOG.md"
        for line in COMMAND.findall(page.read_text().replace("\\\n", " "))
    }
)


@functools.cache
def flags_of(command):
    """Names of the flags in a command's help."""
    return set(re.findall(r"^ +--(?:\[no\])?(\w+): \S", flexolmo(command, "--help").out, re.MULTILINE))


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_a_command_is_one_that_exists(page, line):
    _, command, *arguments = shlex.split(line, comments=True)
    if command.startswith("--"):
        return
    assert command in cli.COMMANDS
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name == "--config":
            module, _, size = value.partition(":")
            importlib.import_module(module.removesuffix(".py").replace("/", ".")).get_config(*filter(None, [size]))
        elif name.startswith("--config."):
            *sections, key = name.split(".")[1:]
            assert key in functools.reduce(lambda config, section: config[section], sections, base.get_config())
        elif name.startswith("--"):
            assert name[2:].replace("-", "_") in flags_of(command)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files(page):
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / link).exists(), link


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
