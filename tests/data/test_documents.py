"""Documents read from files of every kind, and what is said about bad ones."""

import gzip
import json

import pytest

from flexolmo_jax.data.documents import read_documents
from flexolmo_jax.errors import UserError

LINES = ["first", "zwei\nLinien, ünï", "\ud83e\uddd1"]


def test_every_kind_of_file_in_sorted_order(tmp_path):
    lines = "\n".join([json.dumps({"id": i, "text": text}) for i, text in enumerate(LINES)]) + "\n\n"
    (tmp_path / "d.txt").write_bytes("whole\r\nfile, ünï\n".encode())
    (tmp_path / "c.md").write_text("# title")
    (tmp_path / "b.jsonl").write_text(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    expected = [*LINES, *LINES, "# title", "whole\r\nfile, ünï\n"]
    expected = [text.encode("utf-16", "surrogatepass").decode("utf-16") for text in expected]
    assert list(read_documents([f"{tmp_path}/*"])) == expected
    assert list(read_documents([f"{tmp_path}/*.md", f"{tmp_path}/[bc]*", f"{tmp_path}/c.md"])) == [
        "# title",
        *expected[:3],
    ]


def test_directories_are_searched_where_the_pattern_says(tmp_path):
    (tmp_path / "x" / "y").mkdir(parents=True)
    (tmp_path / "x" / "y" / "deep.txt").write_text("deep")
    (tmp_path / "x" / "near.txt").write_text("near")
    assert list(read_documents([f"{tmp_path}/*/*.txt"])) == ["near"]
    assert sorted(read_documents([f"{tmp_path}/**/*.txt"])) == ["deep", "near"]


def test_relative_pattern(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("a")
    monkeypatch.chdir(tmp_path)
    assert list(read_documents(["*.txt"])) == ["a"]
    assert list(read_documents(["a.txt"])) == ["a"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"abc\xff", "a.txt: is not UTF-8 .byte 3."),
        ("a.jsonl", b'{"text": "ok"}\n{"text": \n', "a.jsonl:2: is not JSON "),
        ("a.jsonl", b'{"text": "ok"}\n\n["text"]\n', 'a.jsonl:3: is not an object with a string under "text"'),
        ("a.jsonl", b'{"body": "x"}', "a.jsonl:1: is not an object with"),
        ("a.jsonl", b'{"text": 1}', "a.jsonl:1: is not an object with"),
        ("a.jsonl", b'{"text": "\xff"}', "a.jsonl:1: is not UTF-8"),
        ("a.jsonl", b'{"text": "\\ud800"}', "a.jsonl:1: escapes half of a surrogate pair"),
        ("a.jsonl", b'{"text": ' + b"1" * 5000 + b"}", "a.jsonl:1: is not JSON"),
        ("a.jsonl.gz", b'{"text": "not compressed"}', "a.jsonl.gz: is not a whole gzip file"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "cut"}\n' * 99, mtime=0)[:-12], "a.jsonl.gz: is not a whole gzip file"),
        ("b.txt", b"", "--input=.*/a[.].: matches no file"),
    ],
)
def test_errors(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        list(read_documents([f"{tmp_path}/a.*"]))
    assert "\n" not in str(caught.value)


def test_a_directory_is_no_file(tmp_path):
    with pytest.raises(UserError, match=f"^--input={tmp_path}: matches no file"):
        list(read_documents([str(tmp_path)]))
