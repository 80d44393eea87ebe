"""How much memory is left, and what is refused for want of it."""

import jax
import psutil
import pytest

from flexolmo_jax import memory
from flexolmo_jax.errors import UserError
from tests.support import small
from tests.support.small import assert_refused, flexolmo


def test_memory_of_the_host_is_what_a_container_may_still_take(tmp_path, monkeypatch):
    (tmp_path / "memory.max").write_text("3000000\n")
    (tmp_path / "memory.current").write_text("1000000\n")
    names = [str(tmp_path / name) for name in ("memory.max", "memory.current", "memory.stat")]
    monkeypatch.setattr(memory, "_CONTAINER", [[*names, memory._CONTAINER[0][-1]]])
    assert memory.available_bytes(jax.devices()[0]) == 2_000_000
    # Files that were read make room.
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 300000\nactive_file 100000\nworkingset_file 7\n")
    assert memory.available_bytes(jax.devices()[0]) == 2_400_000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available_bytes(jax.devices()[0]) == pytest.approx(psutil.virtual_memory().available, rel=0.2)


def test_what_does_not_fit_is_refused(monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda _: 2**30)
    memory.check_fits(2**30, "--x=1: it", "lower it")
    with pytest.raises(UserError, match=r"^--x=1: it takes 3.0 GiB of memory, and 1.0 are free; lower it$"):
        memory.check_fits(3 * 2**30, "--x=1: it", "lower it")


def test_a_model_that_does_not_fit_is_refused_before_it_is_read(tmp_path, monkeypatch):
    small.anchor(tmp_path / "anchor")
    monkeypatch.setattr(memory, "available_bytes", lambda _: 1000)
    result = flexolmo("generate", f"--model={tmp_path}/anchor", "--prompt=a")
    assert_refused(result, "generate", f"--model={tmp_path}/anchor", "float32", "GiB of memory", "bfloat16")
