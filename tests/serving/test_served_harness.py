"""A served model, scored by the harness's own `local-completions`, has the metrics of the model in this process."""

import pytest

from tests.support import harness_tasks, small

pytest.importorskip("lm_eval")
pytest.importorskip("transformers")
pytest.importorskip("aiohttp")
pytest.importorskip("tenacity")

from lm_eval import simple_evaluate
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.tasks import TaskManager

import flexolmo_jax
from flexolmo_jax.inference.engine import Engine
from flexolmo_jax.interop import parity
from flexolmo_jax.interop.harness import FlexOlmoLM
from flexolmo_jax.serving.logprobs import TokenStrings

MAX_LENGTH, KEY = 64, "a-key"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("served")
    harness_tasks.write_models(home)
    with pytest.MonkeyPatch.context() as patch:  # the client reads only the tokenizer
        patch.setattr(parity, "transformers_installed", lambda: False)
        result = small.flexolmo("export-hf", f"--model={home}/merged", f"--out={home}/hf")
    assert result.status == 0, result.err
    with harness_tasks.offline(home / "cache"):
        yield home


@pytest.fixture(scope="module")
def model(home):
    """A model that sometimes ends a text at once: the token that the client counts on is EOS then."""
    loaded = flexolmo_jax.load(home / "merged")
    eos = loaded.manifest.eos_id
    head = loaded.params["head"].at[:, eos].set(loaded.params["head"][:, ord("e")] * 3)
    return flexolmo_jax.Model(loaded.manifest, loaded.params | {"head": head}, loaded.tokenizer)


@pytest.fixture(scope="module")
def served(running, model):
    """The address of a server."""
    options = {
        "names": ("merged",),
        "roster": tuple(model.roster),
        "encode": model.encode,
        "decode": model.tokenizer.decode,
        "strings": TokenStrings(model.tokenizer),
        "max_length": MAX_LENGTH,
        "keys": [KEY],
    }
    with running(lambda: Engine(model, 1, MAX_LENGTH), queue=16, **options) as (url, _):
        yield url


class Client(LocalCompletionsAPI):
    """The harness's own, which counts the texts that ended at once."""

    ended = 0

    @staticmethod
    def parse_logprobs(outputs, **arguments):
        """Looks at the last token of each choice, which the server wrote."""
        choices = [choice for output in outputs for choice in output["choices"]]
        Client.ended += sum(choice["logprobs"]["tokens"][-1] == "<|endoftext|>" for choice in choices)
        return LocalCompletionsAPI.parse_logprobs(outputs, **arguments)


@pytest.mark.slow
def test_metrics_are_those_of_the_model_in_this_process(home, model, served, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    client = Client(
        base_url=f"{served}/v1/completions",
        model="merged",
        tokenizer=str(home / "hf"),
        tokenizer_backend="huggingface",
        max_length=MAX_LENGTH,
        batch_size=3,
    )
    from_client = evaluate(client)
    # The client keeps one token of the length for what the server must write, and another that precedes a text.
    in_process = evaluate(FlexOlmoLM(model, max_length=MAX_LENGTH - 2))
    compared = 0
    for task in harness_tasks.NAMES:
        for our, their in zip(in_process["samples"][task], from_client["samples"][task], strict=True):
            if task == "local_generate":
                if len(our["doc"]["text"]) + 16 < MAX_LENGTH - 2:  # else they cut in different places
                    assert our["resps"] == their["resps"]
                    compared += 1
            elif task == "local_rolling":
                assert their["resps"][0] == pytest.approx(our["resps"][0], abs=1e-4)
            else:
                for (our_answer,), (their_answer,) in zip(our["resps"], their["resps"], strict=True):
                    assert their_answer == (pytest.approx(our_answer[0], abs=1e-4), our_answer[1])
    assert compared
    assert Client.ended


def evaluate(lm):
    manager = TaskManager(include_path=str(harness_tasks.TASKS), include_defaults=False)
    return simple_evaluate(lm, tasks=list(harness_tasks.NAMES), task_manager=manager, bootstrap_iters=100)
