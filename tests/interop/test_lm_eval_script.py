"""The script `lm_eval` where the harness is not installed."""

import sys

import pytest

from flexolmo_jax.interop.lm_eval_script import main


def test_it_names_the_extra_in_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "flexolmo_jax.interop.lm_eval", raising=False)
    monkeypatch.delattr("flexolmo_jax.interop.lm_eval", raising=False)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    message = "lm_eval: lm_eval is missing; pip install 'flexolmo-jax[eval]'\n"
    assert capsys.readouterr() == ("", message)
