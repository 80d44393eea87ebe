"""launch/check_vllm.sh refuses bad arguments; the parts of launch/check_vllm.py that need no vLLM."""

import importlib.util
import json
import pathlib
import subprocess

import numpy as np
import pytest

import flexolmo_jax
from tests.support import small

LAUNCH = pathlib.Path(__file__).parents[1] / "launch"
spec = importlib.util.spec_from_file_location("check_vllm", LAUNCH / "check_vllm.py")
check_vllm = importlib.util.module_from_spec(spec)
spec.loader.exec_module(check_vllm)


@pytest.mark.parametrize("argument", ["--modle=DIR", "--model", "--model=", "--model=absent"])
def test_a_bad_argument_is_refused_before_anything_is_installed(argument, tmp_path):
    script = ["bash", str(LAUNCH / "check_vllm.sh"), argument]
    result = subprocess.run(script, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (result.returncode, result.stdout) == (2, "")
    assert argument in result.stderr
    assert result.stderr.count("\n") == 1


def test_tokens_are_counted_that_have_the_largest_logit_or_tie_with_it():
    logits = np.array([[0.0, 2.0, 1.0], [3.0, 3.0001, 0.0], [1.0, 0.0, 0.0]], np.float32)
    tokens = [1, 0, 2]  # the largest, a tie with it, another
    log_p = np.log(np.exp(logits) / np.exp(logits).sum(1, keepdims=True))[range(3), tokens]
    greedy, difference = check_vllm.check(tokens, log_p, logits)
    assert greedy == 2
    assert difference < 1e-6
    assert check_vllm.check(tokens, log_p + np.array([0, 0.25, 0]), logits).difference == pytest.approx(0.25)
    with np.errstate(invalid="ignore"):
        assert np.isnan(check_vllm.check(tokens, log_p, np.full_like(logits, np.nan)).difference)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """The random mixture that the check exports."""
    path = tmp_path_factory.mktemp("check") / "model"
    check_vllm.make_model(str(path))
    return path


def test_the_default_model_has_what_the_check_is_about(path):
    model = flexolmo_jax.load(path)
    architecture = model.decoder.architecture
    assert architecture.d_model // architecture.num_heads >= check_vllm.MIN_HEAD_SIZE
    assert 1 < model.manifest.top_k < len(model.roster)
    assert all((bias != 0).all() for leaf, bias in small.read_params(path).items() if leaf.endswith("router/bias"))


def test_the_comparison_fails_for_another_token_and_another_probability(path, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(check_vllm, "TEXTS", ("The",))
    model = flexolmo_jax.load(path)
    prompt = model.encode("The")
    tokens = []
    for _ in range(3):
        logits = np.asarray(model.logits([[*prompt, *tokens, *[0] * (3 - len(tokens))]]))[0, len(prompt) - 1 : -1]
        tokens.append(int(logits[len(tokens)].argmax()))
    log_p = (logits - np.logaddexp.reduce(logits, -1, keepdims=True))[range(3), tokens].tolist()
    np.savez(tmp_path / "logits.npz", **{"0": logits})

    def status(**changes):
        sequence = {"prompt": prompt, "tokens": tokens, "log_p": log_p, **changes}
        (tmp_path / "continued.json").write_text(json.dumps({"texts": True, "sequences": [sequence]}))
        return check_vllm.compare(str(path), str(tmp_path / "continued.json"), str(tmp_path / "logits.npz"))

    assert status() == 0
    assert "agree" in capsys.readouterr().out
    assert status(tokens=[(tokens[0] + 1) % 260, *tokens[1:]]) == 1
    assert status(log_p=[p - 0.01 for p in log_p]) == 1
    assert "DIFFER" in capsys.readouterr().out
    assert status(prompt=[prompt[0], *b"THE"]) == 1
    assert "tokenizer" in capsys.readouterr().out
