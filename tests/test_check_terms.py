"""launch/check_terms.py finds old terms, and accepts what an exception covers."""

import importlib.util
import pathlib
import tomllib

import pytest

LAUNCH = pathlib.Path(__file__).parents[1] / "launch"


def read_terms():
    """The module launch/check_terms.py and its table."""
    spec = importlib.util.spec_from_file_location("check_terms", LAUNCH / "check_terms.py")
    check_terms = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(check_terms)
    return check_terms, tomllib.loads((LAUNCH / "terms.toml").read_text())


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("the rows of a batch", "rows"),
        ("table.add_row(cells)", None),
        ("config.data.accumulate = 2", "data.accumulate"),
        ("two verbs", "verbs"),
        ("the outer product of two vectors", None),
        ("a checkpoint that it goes on from", "goes on from"),
        ("for said, line in lines:", "said"),
    ],
)
def test_old_terms_are_found_unless_an_exception_covers_them(line, found):
    check_terms, table = read_terms()
    terms = [term for _, term, _ in check_terms._terms("docs/page.md", ["", line], table["term"])]
    assert terms == ([found] if found else [])


def test_old_names_of_variables_are_found():
    check_terms, table = read_terms()
    lines = ["def f(given, where_not):", "    odd, even = given", "    return jnp.mean(even, where=odd)"]
    names = {(number, name) for number, name, _ in check_terms._names("a.py", lines, table["name"])}
    assert names == {(1, "given"), (2, "odd")}
