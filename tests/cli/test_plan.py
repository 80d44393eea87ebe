"""What `flexolmo plan` refuses before anything is compiled."""

import importlib.util

import pytest

from tests.support.small import assert_refused, flexolmo

# ml_collections loads configuration files by a method that Python is about to lose.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

CONFIG = "--config=configs/expert.py:tiny"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((CONFIG,), "--topology"),
        (("--topology=v5e:2x4",), "--config"),
        ((CONFIG, "--topology=v5e"), "--topology=v5e: not a chip and the shape of its slice"),
        ((CONFIG, "--topology=v9:2x4"), "no chip v9 is known; use one of v4, v5e"),
        ((CONFIG, "--topology=v5p:2x4"), "a slice of v5p has 3 sizes above 0"),
        ((CONFIG, "--topology=h200:9"), "--topology=h200:9: a node has 1 to 8 GPUs, as in h200:8"),
        (("--config=configs/expert.py:huge", "--topology=v5e:2x4"), "unknown size 'huge'"),
    ],
)
def test_refuses_in_one_line(arguments, words):
    assert_refused(flexolmo("plan", *arguments), "plan", words)


@pytest.mark.parametrize(
    ("topology", "module", "words"),
    [
        (
            "v5e:2x4",
            "libtpu",
            "needs libtpu, the TPU compiler, which is not installed; pip install 'flexolmo-jax[plan]'",
        ),
        ("h200:8", "jax_cuda", "needs JAX's plugin for GPUs, which is not installed; pip install 'flexolmo-jax[cuda]'"),
    ],
)
def test_says_how_to_get_the_compiler(monkeypatch, topology, module, words):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name.startswith(module) else find(name, *rest)
    )
    refused = flexolmo("plan", CONFIG, f"--topology={topology}")
    assert_refused(refused, "plan", f"--topology={topology}: {words}")
