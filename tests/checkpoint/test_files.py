"""What a directory may hold besides weights: what systems leave behind, and nothing else; no link leads out."""

import json
import os
import pathlib
import shutil
import socket

import pytest

from flexolmo_jax.checkpoint import model_directory
from flexolmo_jax.checkpoint.copying import write_tree
from flexolmo_jax.checkpoint.files import check_files, is_system_file
from flexolmo_jax.checkpoint.manifests import MOE
from flexolmo_jax.checkpoint.params import Slice, open_tree
from flexolmo_jax.checkpoint.zarr import METADATA, tree_content
from flexolmo_jax.errors import UserError
from flexolmo_jax.interop import parity
from tests.support import small
from tests.support.small import assert_refused, flexolmo


@pytest.fixture(autouse=True)
def no_transformers(monkeypatch):
    """Nothing here is about logits."""
    monkeypatch.setattr(parity, "transformers_installed", lambda: False)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """An anchor with all that may lie beside its parameters, two contributions, a merge, and a tuned one."""
    home = tmp_path_factory.mktemp("files")
    small.corpus(home / "corpus")
    leaves = small.random_leaves(0)
    leaves[MOE + "anchor/router/bias"][:] = 0
    small.anchor(home / "anchor", leaves=leaves)
    small.corpus(home / "anchor" / "public")
    (home / "anchor" / "hugging_face").mkdir()
    (home / "anchor" / "hugging_face" / "tokenizer_config.json").write_text("{}")
    for seed, name in enumerate(["code", "news"], 1):
        leaves = small.expert_leaves(home / "anchor", seed)
        small.contribution(home / name, home / "anchor", leaves=leaves | {"router/bias": 0 * leaves["router/bias"]})
    assert run("merge", home, home, home / "merged").status == 0
    small.tuned(home / "tuned", home / "merged", home / "corpus", leaves=small.ROUTER[:1])
    return home


def run(command, anchor_home, news_home, out, model=None):
    arguments = {
        "merge": [
            f"--anchor={anchor_home}/anchor",
            f"--contribution={anchor_home}/code",
            f"--contribution={news_home}/news",
            f"--out={out}",
        ],
        "opt-out": [f"--model={model}", "--expert=news", f"--out={out}"],
        "inspect": [model],
        "export-hf": [f"--model={model}", f"--out={out}"],
    }
    return flexolmo(command, *arguments[command])


SYSTEM = [".DS_Store", "._model.json", "._c.0.0.0", "Thumbs.db", "THUMBS.DB", "desktop.ini", ".nfs000000012", "@eaDir"]
FOLDERS = {
    "anchor": ["", "params", "params/head", "params/blocks.moe.anchor.up", "hugging_face", "public"],
    "news": ["", "params", "params/up"],
    "tuned": ["", "params", "merged_router", "merged_router/blocks.moe.experts.router.weight"],
}


@pytest.mark.parametrize("name", [*SYSTEM, ".Trash-1000", "__MACOSX", "System Volume Information", "lost+found"])
def test_knows_what_systems_leave(name):
    assert is_system_file(name)


@pytest.mark.parametrize("name", ["model.json", "c.0.0", "notes.txt", "_METADATA", ".git", ".gitattributes", "found"])
def test_knows_nothing_else_for_theirs(name):
    assert not is_system_file(name)


def test_what_systems_leave_is_passed_over_and_not_copied(home, tmp_path):
    """In every folder: files, and folders with anything in them."""
    for kind, folders in FOLDERS.items():
        shutil.copytree(home / kind, tmp_path / kind)
        for folder in folders:
            for name in SYSTEM:
                (tmp_path / kind / folder / name).write_bytes(b"\x00junk")
            (tmp_path / kind / folder / "lost+found").mkdir()
            (tmp_path / kind / folder / "lost+found" / "#123").write_text("junk")
    shutil.copytree(home / "code", tmp_path / "code")
    result = run("merge", tmp_path, tmp_path, tmp_path / "merged")
    assert (result.status, result.err) == (0, "")
    assert small.files(tmp_path / "merged") == small.files(home / "merged")
    for kind in FOLDERS:
        result = run("inspect", home, home, None, tmp_path / kind)
        assert (result.status, result.err) == (0, "")
    for command in ("opt-out", "export-hf"):
        made = [
            run(command, home, home, tmp_path / f"{command}-{i}", p / "tuned") for i, p in enumerate((home, tmp_path))
        ]
        assert [result.status for result in made] == [0, 0]
        assert small.files(tmp_path / f"{command}-0") == small.files(tmp_path / f"{command}-1")


def extra(name, content=b"payload"):
    def add(directory):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)

    return add


def link(name, target):
    """Replaces what is there by a link, or adds one."""

    def add(directory):
        path = directory / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        path.symlink_to(str(target).format(home=directory.parent.parent, here=directory))

    return add


def moved_out(name):
    """Puts a file or folder outside, and a link to it in its place."""

    def add(directory):
        outside = directory.parent / "outside"
        (directory / name).rename(outside)
        (directory / name).symlink_to(outside)

    return add


def listen(directory):
    before = os.getcwd()
    os.chdir(directory)  # a socket's path is short
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("talk")
    finally:
        os.chdir(before)


def by_way_of_outside(directory):
    """A link out of the directory, to a link into it again."""
    (directory.parent / "way").symlink_to(directory / "contribution.json.real")
    (directory / "contribution.json").rename(directory / "contribution.json.real")
    (directory / "contribution.json").symlink_to("../way")


CHUNK = "params/up/c.0.0.0"
PAYLOADS = {
    "a note": (extra("notes.txt"), ["holds notes.txt", "no part of it"]),
    "a pickle": (extra("params.pkl"), ["holds params.pkl"]),
    "a hidden file": (extra(".payload"), ["holds .payload"]),
    "a folder": (extra("code/run.py"), ["holds code"]),
    "an empty folder": (lambda d: (d / "empty").mkdir(), ["holds empty"]),
    "second parameters": (lambda d: shutil.copytree(d / "params", d / "params2"), ["holds params2"]),
    "a model's manifest": (extra("model.json"), ["no part of it"]),
    "a file among leaves": (extra("params/x.bin"), ["holds params/x.bin"]),
    "a leaf that no index names": (extra("params/more/zarr.json"), ["holds params/more"]),
    "a file in a leaf": (extra("params/up/x.bin"), ["holds params/up/x.bin"]),
    "a chunk too many": (extra("params/up/c.0.0.1"), ["holds params/up/c.0.0.1"]),
    "a chunk by another name": (extra("params/up/c.00.0.0"), ["holds params/up/c.00.0.0"]),
    "a chunk with a longer name": (extra("params/up/c.0.0.0.0"), ["holds params/up/c.0.0.0.0"]),
    "a folder in a leaf": (extra("params/up/c/0/0/0"), ["holds params/up/c"]),
    "an unprintable name": (extra("a\x1b[2J\n"), [r"holds 'a\x1b[2J\n'"]),
    "a file for a folder": (
        lambda d: (shutil.rmtree(d / "params"), extra("params")(d)),
        ["holds params", "a file where a folder belongs"],
    ),
    "a folder for a file": (
        lambda d: ((d / CHUNK).unlink(), (d / CHUNK).mkdir()),
        [f"holds {CHUNK}", "a folder where a file belongs"],
    ),
    "a pipe": (lambda d: os.mkfifo(d / "pipe"), ["pipe is neither a file nor a folder"]),
    "a pipe for the manifest": (
        lambda d: ((d / "contribution.json").unlink(), os.mkfifo(d / "contribution.json")),
        ["contribution.json is neither"],
    ),
    "a pipe for the index": (
        lambda d: ((d / "params/_METADATA").unlink(), os.mkfifo(d / "params/_METADATA")),
        ["params/_METADATA is neither"],
    ),
    "a pipe for a chunk": (lambda d: ((d / CHUNK).unlink(), os.mkfifo(d / CHUNK)), [f"{CHUNK} is neither"]),
    "a socket": (listen, ["talk is neither"]),
    "a device": (link(CHUNK, "/dev/zero"), [CHUNK, "leads out", "/dev/zero"]),
    "a chunk outside": (moved_out(CHUNK), [CHUNK, "leads out", "cp -rL"]),
    "a leaf outside": (moved_out("params/up"), ["params/up", "leads out"]),
    "parameters outside": (moved_out("params"), ["params", "leads out"]),
    "an index outside": (moved_out("params/_METADATA"), ["params/_METADATA", "leads out"]),
    "a leaf's metadata outside": (moved_out("params/up/zarr.json"), ["params/up/zarr.json", "leads out"]),
    "a manifest outside": (moved_out("contribution.json"), ["contribution.json", "leads out"]),
    "an absolute link": (link("contribution.json", "/etc/hostname"), ["contribution.json", "leads out"]),
    "a link out that no one reads": (link("notes", "/etc"), ["notes", "leads out"]),
    "a link out called as systems do": (link(".DS_Store", "/etc/hostname"), [".DS_Store", "leads out"]),
    "a link to the parent": (link("params", ".."), ["params", "leads out"]),
    "a link to the directory itself": (link("params/up", ".."), ["params", "up"]),
    "a link in a circle": (link(CHUNK, "c.0.0.0"), [CHUNK, "in a circle"]),
    "two links in a circle": (
        lambda d: (link(CHUNK, "zarr.json")(d), link("params/up/zarr.json", "c.0.0.0")(d)),
        ["params/up", "in a circle"],
    ),
    "a link to nothing": (link(CHUNK, "c.9"), [CHUNK, "leads nowhere"]),
    "a link out and in again": (by_way_of_outside, ["contribution.json", "leads out"]),
    "a folder of links": (
        lambda d: (shutil.rmtree(d / "params/up"), (d / "params/up").mkdir(), link("params/up/c", ".")(d)),
        [],
    ),
}


@pytest.fixture
def news(home, tmp_path):
    shutil.copytree(home / "news", tmp_path / "in" / "news")
    return tmp_path / "in" / "news"


@pytest.mark.parametrize("command", ["merge", "inspect"])
@pytest.mark.parametrize("payload", PAYLOADS)
def test_a_contribution_holds_nothing_else(home, tmp_path, news, payload, command):
    add, words = PAYLOADS[payload]
    add(news)
    assert_refused(run(command, home, news.parent, tmp_path / "out", news), command, news, *words)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("command", ["opt-out", "inspect", "export-hf"])
@pytest.mark.parametrize(
    ("add", "word"),
    [
        (extra("notes.txt"), "notes.txt"),
        (extra("public/notes.txt"), "public/notes.txt"),
        (extra("hugging_face/model.py"), "hugging_face/model.py"),
        (extra("merged_router/x"), "merged_router/x"),
        (link("tokenizer.json", "/etc/passwd"), "tokenizer.json"),
        (link("hugging_face/chat_template.jinja", "/etc/passwd"), "hugging_face/chat_template.jinja"),
        (moved_out("merged_router/blocks.moe.experts.router.weight"), "merged_router/blocks.moe.experts.router.weight"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_model_holds_nothing_else(home, tmp_path, add, word, command):
    shutil.copytree(home / "tuned", tmp_path / "in" / "model")
    shutil.copytree(home / "corpus", tmp_path / "in" / "model" / "public")
    add(tmp_path / "in" / "model")
    result = run(command, home, home, tmp_path / "out", tmp_path / "in" / "model")
    assert_refused(result, command, tmp_path / "in" / "model", word)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_an_anchor_holds_nothing_else(home, tmp_path):
    shutil.copytree(home, tmp_path / "home")
    (tmp_path / "home" / "anchor" / "notes.txt").write_text("")
    assert_refused(run("merge", tmp_path / "home", home, tmp_path / "out"), "merge", "--anchor=", "holds notes.txt")


def test_links_within_a_directory_are_followed(home, tmp_path, news):
    """To a file elsewhere in it that belongs there, relative or absolute, and to the directory itself."""
    shutil.copytree(home / "anchor", tmp_path / "in" / "anchor")
    (tmp_path / "in/anchor/public/tokenizer.json").unlink()
    (tmp_path / "in/anchor/public/tokenizer.json").symlink_to("../tokenizer.json")
    assert small.read_params(news)["gate"].tobytes() != small.read_params(news)["up"].tobytes()
    leaves = small.read_params(news)
    small.contribution(tmp_path / "in" / "same", home / "anchor", name="news", leaves=leaves | {"up": leaves["gate"]})
    chunk = tmp_path / "in/same" / CHUNK
    chunk.unlink()
    chunk.symlink_to(tmp_path / "in/same/params/gate/c.0.0.0")
    for name in ("anchor", "same"):
        (tmp_path / name).symlink_to(tmp_path / "in" / name)
        result = flexolmo("inspect", tmp_path / name)
        assert (result.status, result.err) == (0, "")
    arguments = [f"--anchor={tmp_path}/anchor", f"--contribution={tmp_path}/same", f"--out={tmp_path}/out"]
    assert flexolmo("merge", *arguments).status == 0


@pytest.mark.parametrize("key", ["..", ".", "../news", "a/../../b", "", "/etc", "%2e%2e", "a\x00b", "a\nb", "-x", "é"])
def test_the_index_cannot_name_a_leaf_outside(tmp_path, key):
    write_tree(tmp_path / "tree", {"x": Slice(small.random_leaves(0)["head"], None, "x")}, str)
    index = json.loads((tmp_path / "tree" / METADATA).read_text())
    (entry,) = index["tree_metadata"].values()
    entry["key_metadata"][0]["key"] = key
    (tmp_path / "tree" / METADATA).write_text(json.dumps(index))
    with pytest.raises(UserError, match="_METADATA: damaged"):
        open_tree(tmp_path / "tree")


@pytest.mark.parametrize("folder", ["50% off", "a#b", "a?b", "ü b", "a%20b"])
def test_a_directory_may_have_any_name(home, tmp_path, folder):
    shutil.copytree(home / "news", tmp_path / folder / "news")
    result = flexolmo("inspect", tmp_path / folder / "news")
    assert (result.status, result.err) == (0, "")


@pytest.mark.parametrize(
    ("shape", "right", "wrong"),
    [
        ([], ["c"], ["c.0", "0", "c/0"]),
        (
            [5, 3],
            ["c.0.0", "c.2.1"],
            ["c.3.0", "c.0.2", "c.0", "0.0", "c.0.0.0", "c.x.0", "c/0/0", "c.00.0", "c.\u0660.0"],
        ),
    ],
    ids=str,
)
def test_chunks_have_the_names_that_zarr_gives_them(tmp_path, shape, right, wrong):
    grid = {"name": "regular", "configuration": {"chunk_shape": [2] * len(shape)}}
    document = {"shape": shape, "chunk_grid": grid}
    write_tree(tmp_path / "tree", {"x": Slice(small.random_leaves(0)["head"], None, "x")}, str)
    folder = tmp_path / "tree" / "x"

    def refused(name):
        shutil.rmtree(folder)
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text("")
        (folder / "zarr.json").write_text(json.dumps(document))
        try:
            check_files(tmp_path / "tree", tree_content, "the test")
        except UserError:
            return True
        return False

    assert [name for name in right if refused(name)] == []
    assert [name for name in wrong if not refused(name)] == []


def test_every_file_that_is_written_is_declared(home, tmp_path):
    """The list and what the project makes agree."""
    for kind in ("anchor", "news", "code", "merged", "tuned"):
        holds = model_directory.CONTRIBUTION if kind in ("news", "code") else model_directory.MODEL
        check_files(pathlib.Path(home / kind), holds.content, kind)
