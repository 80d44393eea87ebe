"""Finds terms that this project does not use: `bash launch/check_terms.sh`; launch/terms.toml has the table."""

import ast
import fnmatch
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
TABLE = "launch/terms.toml"
# They contain the old terms on purpose: the table, its tests, and the list of renamed keys and modules.
SKIPPED = (TABLE, "tests/test_check_terms.py", "CHANGELOG.md")
SUFFIXES = (".py", ".md", ".sh", ".toml", ".cfg", ".html", ".jinja", ".yaml", ".yml", ".txt")


def main(paths: list[str]) -> int:
    """Prints a line for each use of an old term; returns the exit status."""
    table = tomllib.loads((ROOT / TABLE).read_text())
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *paths],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    files = [name for name in listed.stdout.splitlines() if name.endswith(SUFFIXES) and name not in SKIPPED]
    found = 0
    for name in files:
        if not (ROOT / name).is_file():
            continue
        lines = (ROOT / name).read_text().splitlines()
        for number, term, use in sorted({*_terms(name, lines, table["term"]), *_names(name, lines, table["name"])}):
            print(f"{name}:{number}: '{term}'; use {use}")
            found += 1
    if found:
        print(f"{found} uses of terms that {TABLE} replaces", file=sys.stderr)
    return 1 if found else 0


def _terms(name: str, lines: list[str], terms: list[dict[str, Any]]) -> Iterator[tuple[int, str, str]]:
    """Yields (line number, what was found, what to use) for each term of a text."""
    for term in terms:
        pattern = re.compile(term["pattern"], re.IGNORECASE)
        for number, line in enumerate(lines, 1):
            match = pattern.search(line)
            if match and not _is_allowed(name, line, term):
                yield number, match[0], term["use"]


def _names(name: str, lines: list[str], groups: list[dict[str, Any]]) -> Iterator[tuple[int, str, str]]:
    """Yields the same for each name that a Python file binds."""
    if not name.endswith(".py"):
        return
    bound = set(_bound(ast.parse("\n".join(lines), name)))
    for group in groups:
        for number, identifier in bound:
            if identifier.lstrip("_") in group["names"] and not _is_allowed(name, lines[number - 1], group):
                yield number, identifier, group["use"]


def _bound(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yields (line number, name) of every variable, argument, field, function and class that a module defines."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()) | ast.arg(arg=name):
                yield node.lineno, name
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield node.lineno, name


def _is_allowed(name: str, line: str, term: dict[str, Any]) -> bool:
    """Whether an exception of a term covers a line of a file."""
    for exception in term.get("allow", ()):
        in_files = any(fnmatch.fnmatch(name, glob) for glob in exception.get("files", ("*",)))
        if in_files and re.search(exception.get("line", ""), line, re.IGNORECASE):
            return True
    return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
