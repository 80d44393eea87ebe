"""Directories that are complete or absent."""

import errno
import pathlib
from unittest import mock

import pytest
from etils.epath import backend, gpath

from flexolmo_jax.checkpoint.atomic import atomic_directory
from flexolmo_jax.checkpoint.model_directory import read_model
from flexolmo_jax.data.corpus import Corpus
from flexolmo_jax.data.corpus_writer import copy_documents
from flexolmo_jax.errors import UserError
from tests.support import small


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
        assert caught.value.filename == f"{tmp_path}/out"
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
    with pytest.raises(UserError, match=r"^/.*/out: exists already"):
        atomic_directory(tmp_path / "out").__enter__()
    assert names(tmp_path) == ["out"]


class Bucket:
    """Stands for an object store, whose files lie in a folder: a backend of epath for gs://."""

    def __init__(self, root):
        self._root, self.calls = str(root), []

    def __getattr__(self, name):
        def call(*arguments, **options):
            self.calls.append((name, *arguments))
            local = [str(x).replace("gs://bucket", self._root) for x in arguments[:1]] + list(arguments[1:])
            return getattr(backend.os_backend, name)(*local, **options)

        return call


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    monkeypatch.setitem(gpath._PREFIX_TO_BACKEND, "gs", Bucket(tmp_path))
    monkeypatch.setattr(gpath, "_is_tf_installed", lambda: False)
    return gpath._PREFIX_TO_BACKEND["gs"]


NAMES = {"manifest": "model.json", "names": ("model.json", "params")}


def test_in_an_object_store_nothing_is_renamed(tmp_path, bucket):
    with atomic_directory("gs://bucket/out", **NAMES) as directory:
        (directory / "params").mkdir()
        (directory / "model.json").write_text("whole")
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["model.json", "params"]
    assert not {"rename", "replace", "copy"} & {name for name, *_ in bucket.calls}


def test_in_an_object_store_what_a_killed_attempt_left_is_removed(tmp_path, bucket):
    killed = atomic_directory("gs://bucket/out", **NAMES)
    (killed.__enter__() / "params").mkdir()
    (tmp_path / "out" / "params" / "stale").write_text("half")
    with atomic_directory("gs://bucket/out", **NAMES) as directory:
        (directory / "model.json").write_text("whole")
    assert names(tmp_path / "out") == ["model.json"]


@pytest.mark.parametrize("held", ["model.json", "photographs"])
def test_in_an_object_store_nothing_else_is_removed(tmp_path, bucket, held):
    """Neither what is complete, nor what no attempt can have left."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / held).write_text("mine")
    with pytest.raises(UserError, match=r"^gs://bucket/out: exists already"):
        atomic_directory("gs://bucket/out", **NAMES).__enter__()
    assert names(tmp_path / "out") == [held]


def test_in_an_object_store_an_error_leaves_nothing(tmp_path, bucket):
    def half():
        with atomic_directory("gs://bucket/out", **NAMES) as directory:
            (directory / "params").mkdir()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        half()
    assert names(tmp_path) == []


def test_a_model_in_an_object_store_is_the_local_one_and_its_manifest_is_written_last(tmp_path, bucket):
    small.anchor(tmp_path / "local")
    bucket.calls.clear()
    small.anchor("gs://bucket/remote")
    assert small.files(tmp_path / "remote") == small.files(tmp_path / "local")
    opened = [str(arguments[0]) for name, *arguments in bucket.calls if name == "open"]
    assert opened.index("gs://bucket/remote/model.json") == len(opened) - 1
    assert read_model("gs://bucket/remote", strict=True) == read_model(tmp_path / "local")


def test_a_corpus_in_an_object_store_is_the_local_one_and_its_manifest_is_written_last(tmp_path, bucket):
    small.corpus(tmp_path / "source")
    source = Corpus.open(tmp_path / "source")
    copy_documents(source, [1, 2], tmp_path / "local")
    (tmp_path / "remote").mkdir()
    for name in ("tokens-00000.npy", "tokens-00001.npy", "tokenizer.json"):  # of an attempt that was killed
        (tmp_path / "remote" / name).write_text("half")
    bucket.calls.clear()
    copy_documents(source, [1, 2], "gs://bucket/remote")
    assert small.files(tmp_path / "remote") == small.files(tmp_path / "local")
    opened = [str(arguments[0]) for name, *arguments in bucket.calls if name == "open"]
    assert opened[-1] == "gs://bucket/remote/corpus.json"


def test_a_directory_without_its_manifest_is_no_model(tmp_path):
    small.anchor(tmp_path / "model")
    pathlib.Path(tmp_path / "model" / "model.json").unlink()
    with pytest.raises(UserError, match=r"has no model\.json"):
        read_model(tmp_path / "model")
