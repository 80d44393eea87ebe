"""A process of the command line: libraries are silent, and every failure is one line."""

import json
import os
import subprocess
import sys

import pytest

from tests.support import small

TOKENIZER = {
    "version": "1.0",
    "added_tokens": [
        dict(id=1, content="</s>", special=True, single_word=False, lstrip=False, rstrip=False, normalized=False)
    ],
    "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"},
}
PANICS = {
    "loads": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    "encodes": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "unknown": {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "no such"}},
}


def run(*arguments, **options):
    command = [sys.executable, "-m", "flexolmo_jax", *map(str, arguments)]
    return subprocess.run(
        command, stderr=subprocess.PIPE, text=True, check=False, **{"stdout": subprocess.PIPE, **options}
    )


@pytest.mark.parametrize("name", PANICS)
def test_a_panic_of_the_tokenizer_is_one_line(tmp_path, name):
    (tmp_path / "t.json").write_text(json.dumps(TOKENIZER | PANICS[name]))
    (tmp_path / "a.txt").write_text("a b")
    flags = [f"--input={tmp_path}/a.txt", f"--tokenizer={tmp_path}/t.json", f"--out={tmp_path}/corpus"]
    done = run("tokenize", *flags)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("flexolmo tokenize: ")
    assert "tokenizer" in done.stderr
    assert sorted(os.listdir(tmp_path)) == ["a.txt", "t.json"]


def test_with_traceback_a_panic_shows_all(tmp_path):
    (tmp_path / "t.json").write_text(json.dumps(TOKENIZER | PANICS["encodes"]))
    (tmp_path / "a.txt").write_text("a b")
    flags = [f"--input={tmp_path}/a.txt", f"--tokenizer={tmp_path}/t.json", f"--out={tmp_path}/corpus"]
    done = run("tokenize", *flags, "--traceback")
    assert done.returncode == 2
    assert "panicked at" in done.stderr  # as Rust writes it
    assert "PanicException" in done.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device that is always full")
def test_output_that_cannot_be_written_is_one_line(tmp_path):
    small.corpus(tmp_path / "corpus")
    with open("/dev/full", "w") as full:
        done = run("inspect", tmp_path / "corpus", stdout=full)
    assert done.returncode == 2
    assert done.stderr.startswith("flexolmo inspect: standard output: no space left on the device; ")
    assert done.stderr.count("\n") == 1


NOISE = """
import logging, os, sys, threading, warnings
from flexolmo_jax.cli.process import quiet_libraries
quiet_libraries("flexolmo x")
warnings.warn("deprecated", FutureWarning)
logging.getLogger("orbax").error("of a library")
from absl import logging as absl_logging
absl_logging.error("of a library")
def fail(): raise KeyError("odd")
thread = threading.Thread(target=fail)
thread.start(); thread.join()
try:
    fail()
except KeyError as error:
    logging.getLogger("flexolmo_jax.part").error("ours", exc_info=error)
class Unraisable:
    def __del__(self): fail()
Unraisable()
"""


def test_libraries_log_nothing_and_this_package_a_line_each():
    done = subprocess.run([sys.executable, "-c", NOISE], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    thread, logged = done.stderr.splitlines()
    assert thread.startswith("flexolmo x: KeyError: 'odd' (<string>:")
    assert logged.startswith("flexolmo x: ours: KeyError: 'odd' (<string>:")
