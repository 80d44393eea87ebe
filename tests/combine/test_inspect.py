"""`flexolmo inspect` says what a directory is, and finds what was altered."""

import shutil

import pytest

from tests.support import small
from tests.support.small import assert_refused, flexolmo


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("inspect")
    small.corpus(home / "corpus")
    small.anchor(home / "anchor")
    small.contribution(home / "news", home / "anchor", seed=1)
    flexolmo("merge", f"--anchor={home}/anchor", f"--contribution={home}/news", f"--out={home}/merged")
    small.tuned(home / "tuned", home / "merged", home / "corpus")
    return home


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("anchor", ["a model", "d_model 16", "1 of 1", "anchor", "2,338"]),
        ("merged", ["a model", "2 of 2", "news", "data of news; none", "tuned since nothing"]),
        ("tuned", ["a model", "tuned since blocks/moe/experts/router/bias, blocks/moe/experts/router/weight"]),
        ("news", ["a contribution", "news", "2,338", "20"]),
        ("corpus", ["a corpus", "documents 4 ", "tokens 88 ", "bytes of text 84 "]),
    ],
)
def test_says_what_a_directory_is(home, name, words):
    result = flexolmo("inspect", home / name)
    assert (result.status, result.err) == (0, "")
    for word in [*words, f"{home / name}: ", "hold"]:
        assert word in " ".join(result.out.split())
    assert "not checked" in flexolmo("inspect", home / name, "--nocheck").out


def test_a_card_cannot_control_the_terminal(home, tmp_path):
    card = {"description": "a\x1b]0;title\x07 b\u202ec\x9b2J", "license": "none"}
    small.contribution(tmp_path / "law", home / "anchor", name="law", card=card)
    result = flexolmo("inspect", tmp_path / "law")
    assert result.status == 0
    assert "a\ufffd]0;title\ufffd b\ufffdc\ufffd2J; none" in " ".join(result.out.split())


def test_an_error_that_quotes_a_manifest_cannot_control_the_terminal(home, tmp_path):
    def reseal(document):
        document["architecture"]["e\x1b[31mvil"] = 1

    small.contribution(tmp_path / "evil", home / "anchor", name="evil", seed=4)
    small.reseal(tmp_path / "evil" / "contribution.json", reseal)
    inputs = (f"--anchor={home}/anchor", f"--contribution={tmp_path}/evil", f"--out={tmp_path}/out")
    result = flexolmo("merge", *inputs)
    assert_refused(result, "merge", "e\ufffd[31mvil differ")
    assert "\x1b" not in result.err


def test_describes_several_directories(home):
    result = flexolmo("inspect", home / "news", home / "corpus")
    assert "a contribution" in result.out
    assert "a corpus" in result.out


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("merged", "params/blocks.moe.experts.up/c.0.1.0.0"),
        ("merged", "params/head/c.0.0"),
        ("news", "params/down/c.0.0.0"),
        ("corpus", "tokens-00000.npy"),
        ("tuned", "merged_router/blocks.moe.experts.router.weight/c.0.0.0"),
    ],
)
def test_finds_one_altered_byte(home, name, file):
    data = (home / name / file).read_bytes()
    try:
        (home / name / file).write_bytes(bytes([data[0] ^ 1]) + data[1:])
        result = flexolmo("inspect", home / name)
        assert_refused(result, "inspect", home / name, "again")
    finally:
        (home / name / file).write_bytes(data)


def test_finds_another_tokenizer(home, tmp_path):
    shutil.copytree(home / "corpus", tmp_path / "corpus")
    shutil.copytree(home / "anchor", tmp_path / "anchor")
    (tmp_path / "anchor" / "tokenizer.json").write_text(
        (home / "corpus" / "tokenizer.json")
        .read_text()
        .replace('"add_prefix_space": false', '"add_prefix_space": true')
    )
    assert_refused(flexolmo("inspect", tmp_path / "anchor"), "inspect", "tokenizer.json", "not the tokenizer")


def test_a_data_card_is_text_and_no_markup(home, tmp_path):
    """An owner's words can neither break the table nor style it."""
    small.contribution(tmp_path / "odd", home / "anchor", seed=1)
    file = tmp_path / "odd" / "contribution.json"
    file.write_text(
        file.read_text()
        .replace('"data of odd"', '"[/b] [red]"')
        .replace('"trained_tokens": 20', '"trained_tokens": "many"')
    )
    small.reseal(file)
    result = flexolmo("inspect", tmp_path / "odd")
    assert result.status == 0
    assert "[/b] [red]" in result.out


def test_refuses_what_is_none_of_ours(home, tmp_path):
    assert_refused(flexolmo("inspect"), "inspect", "no directory given")
    assert_refused(flexolmo("inspect", tmp_path), "inspect", tmp_path, "neither a model, a contribution nor a corpus")
    assert_refused(flexolmo("inspect", tmp_path / "nosuch"), "inspect", tmp_path / "nosuch", "no such directory")
    (tmp_path / "file").write_text("")
    assert_refused(flexolmo("inspect", tmp_path / "file"), "inspect", tmp_path / "file", "is a file", "directory")
