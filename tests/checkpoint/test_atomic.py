"""Directories that are complete or absent."""

import errno
from unittest import mock

import pytest

from flexolmo_jax.checkpoint.atomic import atomic_directory
from flexolmo_jax.errors import UserError


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_takes_its_name_only_when_the_block_ends(tmp_path):
    with atomic_directory(tmp_path / "new" / "out") as directory:
        (directory / "file").write_text("whole")
        assert not (tmp_path / "new" / "out").exists()
    assert names(tmp_path / "new") == ["out"]
    assert (tmp_path / "new" / "out" / "file").read_text() == "whole"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_leaves_nothing_when_the_block_raises(tmp_path, error):
    def half():
        with atomic_directory(tmp_path / "out") as directory:
            (directory / "folder").mkdir()
            (directory / "folder" / "file").write_text("half")
            raise error

    with pytest.raises(error):
        half()
    assert names(tmp_path) == []


def test_an_error_of_writing_names_what_was_asked_for(tmp_path):
    def full(file):
        with atomic_directory(tmp_path / "out") as directory:
            raise OSError(errno.ENOSPC, "No space left on device", *file(directory))

    for file in (lambda directory: [], lambda directory: [str(directory / "part")]):
        with pytest.raises(OSError, match="No space left") as caught:
            full(file)
        assert caught.value.filename == f"--out={tmp_path}/out"
    with pytest.raises(OSError, match="No space left") as caught:
        full(lambda directory: ["/elsewhere"])
    assert caught.value.filename == "/elsewhere"
    assert names(tmp_path) == []


def test_what_failed_first_is_told_where_nothing_can_be_removed(tmp_path, monkeypatch):
    def half():
        with atomic_directory(tmp_path / "out") as directory:
            monkeypatch.setattr(type(directory), "rmtree", mock.Mock(side_effect=OSError(errno.EROFS, "read-only")))
            raise ValueError("first")

    with pytest.raises(ValueError, match="first"):
        half()


def test_removes_what_a_killed_attempt_left(tmp_path):
    killed = atomic_directory(tmp_path / "out")
    (killed.__enter__() / "stale").write_text("half")
    assert names(tmp_path) == [".out.incomplete"]
    with atomic_directory(tmp_path / "out") as directory:
        (directory / "file").write_text("whole")
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["file"]


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), lambda path: path.write_text("mine")])
def test_refuses_a_name_that_is_taken(tmp_path, make):
    make(tmp_path / "out")
    with pytest.raises(UserError, match=r"--workdir=.*/out: exists already"):
        atomic_directory(tmp_path / "out", flag="--workdir").__enter__()
    assert names(tmp_path) == ["out"]
