"""Error messages: one line for what a user can fix, and one for bugs."""

import errno
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from flexolmo_jax import distributed
from flexolmo_jax.cli.failures import describe
from flexolmo_jax.errors import UserError
from tests.support import small


def raised(error):
    try:
        raise error
    except BaseException as caught:
        return caught


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "no space left on the device; make room"),
        (errno.EDQUOT, "quota"),
        (errno.EROFS, "read-only"),
        (errno.EACCES, "permission denied"),
        (errno.ENAMETOOLONG, "too long"),
        (errno.EMFILE, "ulimit -n"),
        (errno.ENOTDIR, "a part of this path is a file"),
        (errno.EISDIR, "is a directory"),
        (errno.EIO, "fails to read or write"),
        (errno.ESTALE, "run the command again"),
    ],
)
def test_errors_of_the_system_name_file_problem_and_remedy_in_one_line(number, words):
    line, status = describe(raised(OSError(number, "as the system says", "some/file")))
    assert status == 2
    assert line.startswith("some/file: ")
    assert words in line
    assert "; " in line


def test_a_write_error_without_a_file_names_the_destination():
    error = OSError(errno.ENOSPC, "No space left on device")
    assert describe(error, "--out=model").line.startswith("--out=model: no space left")
    assert describe(error).line.startswith("standard output: no space left")
    within = OSError(errno.ENOSPC, "No space left on device", "work/checkpoints/2/part")
    assert describe(within, "--workdir=work").line.startswith("--workdir=work: no space left")
    assert describe(within, "--workdir=other").line.startswith("work/checkpoints/2/part: no space left")


@pytest.mark.parametrize(
    "error",
    [
        jax.errors.JaxRuntimeError("INTERNAL: a collective failed"),
        ValueError("UNKNOWN: Gloo AllGather failed: Read error [127.0.0.1]:63701: Connection reset by peer"),
        TimeoutError("Timed out while waiting for async_write_complete barrier."),
    ],
)
def test_an_error_of_communication_says_that_a_process_is_lost(error, monkeypatch):
    assert describe(raised(error)).status == 1  # in a run of one process, it is none
    monkeypatch.setattr(distributed, "count", lambda: 2)
    line, status = describe(raised(error))
    assert status == distributed.LOST
    assert line.startswith("another process of the run has ended, or cannot be reached (")
    assert describe(raised(ValueError("x"))).status == 1
    assert describe(raised(TimeoutError(errno.ETIMEDOUT, "the disk"))).status == 2


@pytest.mark.parametrize(
    "error",
    [OSError("no number"), OSError(errno.EDOM, "odd"), ValueError("a\nb"), KeyError("x"), RuntimeError("x")],
)
def test_other_errors_are_bugs_of_the_program(error):
    line, status = describe(raised(error))
    assert status == 1
    assert line.startswith(type(error).__name__)
    assert "test_failures.py:" in line  # no frame of the package: the innermost
    assert "--traceback" in line
    assert "\n" not in line


def test_out_of_memory_is_one_line_with_the_remedy():
    with pytest.raises(MemoryError) as caught:
        np.empty(2**50, np.uint8)
    line, status = describe(caught.value, memory_remedy="lower --slots")
    assert (line, status) == ("out of memory (1.00 PiB could not be had); lower --slots", 2)
    error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 444052642280 bytes.")
    assert describe(error, memory_remedy="lower --slots").line.startswith("out of memory (444052642280 bytes could not")
    assert describe(jax.errors.JaxRuntimeError("INTERNAL: odd")).status == 1


TENSORSTORE = """
import sys, tensorstore as ts, numpy as np
from flexolmo_jax.cli.failures import describe
spec = {"driver": "zarr3", "kvstore": f"file://{sys.argv[1]}/w/array/"}
spec["metadata"] = {"shape": [2**20], "data_type": "int8"}
try:
    ts.open(spec, create=True).result().write(np.ones(2**20, np.int8)).result()
except ValueError as error:
    print(describe(error, f"--workdir={sys.argv[1]}/w").line)
"""


def in_a_small_disk(directory, size, command):
    """Runs a command of bash with a file system of `size` mounted at `directory`; skips where none may be."""
    directory.mkdir()
    mount = f"mount -t tmpfs -o size={size} tmpfs {directory}"
    for trial in ("true", mount):
        unshare = shutil.which("unshare")
        if not unshare or subprocess.run([unshare, "-rm", "bash", "-c", trial], capture_output=True).returncode:
            pytest.skip("file systems cannot be mounted here")
    done = subprocess.run([unshare, "-rm", "bash", "-c", f"{mount} && {command}"], capture_output=True, text=True)
    return done.stdout, done.stderr


def test_tensorstore_on_a_full_disk(tmp_path):
    (tmp_path / "script.py").write_text(TENSORSTORE)
    disk = tmp_path / "disk"
    out, err = in_a_small_disk(disk, "64k", f"{sys.executable} {tmp_path}/script.py {disk}")
    assert (out, err) == (
        f"--workdir={disk}/w: no space left on the device; make room there, or name a place with more\n",
        "",
    )


@pytest.mark.parametrize("size", ["4k", "16k", "32k"])
def test_a_merge_on_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, size):
    small.anchor(tmp_path / "anchor")
    small.contribution(tmp_path / "news", tmp_path / "anchor", seed=1)
    disk = tmp_path / "disk"
    flags = f"--anchor={tmp_path}/anchor --contribution={tmp_path}/news --out={disk}/model"
    command = f"{sys.executable} -m flexolmo_jax merge {flags}; echo $?; ls -A {disk}"
    out, err = in_a_small_disk(disk, size, command)
    assert out == "2\n"
    assert err.startswith(f"flexolmo merge: --out={disk}/model: no space left on the device; ")
    assert err.count("\n") == 1


def test_a_user_error_is_its_own_line():
    assert describe(UserError("--a=b: wrong;\n write c")) == ("--a=b: wrong; write c", 2)
