"""The model of lm-evaluation-harness: its metrics, texts and tokens are those of the harness's own `hf`."""

import functools
import json
import sys

import numpy as np
import pytest

from tests.support import harness_tasks, small

pytest.importorskip("lm_eval")

import lm_eval.__main__
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

import flexolmo_jax
from flexolmo_jax.errors import UserError
from flexolmo_jax.inference import engine
from flexolmo_jax.interop import lm_eval as program
from flexolmo_jax.interop import parity
from flexolmo_jax.interop.harness import FlexOlmoLM

EOS, MAX_LENGTH, NEW = 256, 64, 12
BATCH = 3  # divides the number of most requests, so that few shapes are compiled
MIN_BUCKET = engine.MIN_BUCKET
HELLO = "hello, this is a text"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("harness")
    harness_tasks.write_models(home)
    with harness_tasks.offline(home / "cache"):
        yield home


@pytest.fixture(scope="module")
def model(home):
    return flexolmo_jax.load(home / "merged")


@pytest.fixture(scope="module")
def hf(home):
    """Makes the harness's own model of an exported directory, whose logits were not compared yet."""
    for package in ("torch", "transformers", "accelerate"):
        pytest.importorskip(package)
    from lm_eval.models.huggingface import HFLM

    def make(name, **options):
        directory = home / f"hf-{name}"
        if not directory.exists():
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(parity, "transformers_installed", lambda: False)
                result = small.flexolmo("export-hf", f"--model={home / name}", f"--out={directory}")
            assert result.status == 0, result.err
        # Its sums of log probabilities would be rounded more coarsely than what is to be compared.
        options = {"device": "cpu", "dtype": "float32", "softmax_dtype": "float64", "batch_size": BATCH} | options
        return HFLM(str(directory), **options)

    return make


def evaluate(lm, tasks=harness_tasks.NAMES):
    manager = TaskManager(include_path=str(harness_tasks.TASKS), include_defaults=False)
    return simple_evaluate(lm, tasks=list(tasks), task_manager=manager, bootstrap_iters=100)


def assert_equal_results(found, expected):
    """All metrics and reference standard errors, to 1e-6."""
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-6)), key


def requests(kind, *arguments):
    return [Instance(request_type=kind, doc={}, arguments=each, idx=0) for each in arguments]


@pytest.mark.parametrize("without", [None, "news"])
def test_metrics_and_texts_equal_those_of_hf_on_the_exported_model(model, hf, without):
    """With an expert left out, the exported model is the merge that never had it."""
    lm = FlexOlmoLM(model, without=without or "", batch_size=BATCH, max_length=MAX_LENGTH)
    found, expected = evaluate(lm), evaluate(hf(f"without-{without}" if without else "merged", max_length=MAX_LENGTH))
    for task in harness_tasks.NAMES:
        assert_equal_results(found["results"][task], expected["results"][task])
        for sample, reference in zip(found["samples"][task], expected["samples"][task], strict=True):
            assert sample["arguments"] == reference["arguments"]
            if task == "local_generate":
                assert sample["resps"] == reference["resps"]
            elif task == "local_rolling":
                assert sample["resps"][0] == pytest.approx(reference["resps"][0], rel=1e-6)
            else:
                for (answer,), (expected_answer,) in zip(sample["resps"], reference["resps"], strict=True):
                    assert answer == (pytest.approx(expected_answer[0], rel=1e-6), expected_answer[1])
    assert (found["config"]["experts"], found["config"]["without"]) == (lm.model.roster, [without] if without else [])
    # The results tell something: answers differ, and texts end at a stop string, EOS and the last token.
    answers = [answer[0][0] for sample in found["samples"]["local_choice"] for answer in sample["resps"]]
    assert np.ptp(answers) > 10
    lengths = {len(sample["resps"][0][0]) for sample in found["samples"]["local_generate"]}
    assert len(lengths) > 2


TEXTS = ["", HELLO, " leading", "trailing  ", "naïve 🙂", "<|endoftext|>again", "in<|endoftext|>between"]


@pytest.mark.parametrize("add_bos_token", [None, True, False])
def test_tokens_equal_those_of_hf(model, hf, add_bos_token):
    found, expected = FlexOlmoLM(model, add_bos_token=add_bos_token), hf("merged", add_bos_token=add_bos_token)
    for name in ("prefix_token_id", "eot_token_id", "max_length", "max_gen_toks"):
        assert getattr(found, name) == getattr(expected, name)
    for text in TEXTS:
        assert found.tok_encode(text) == expected.tok_encode(text)
        assert found.tok_encode(text, add_special_tokens=False) == expected.tok_encode(text, add_special_tokens=False)
        if text:
            assert found._encode_pair(text, " more") == expected._encode_pair(text, " more")


def plain_score(model, context, continuation, without=()):
    """One sequence at a time, from logits, in float64; the padding is for one compilation."""
    tokens = np.zeros((1, MAX_LENGTH + 1), int)
    tokens[0, : len(context) + len(continuation)] = [*context, *continuation]
    logits_SxV = np.asarray(model.logits(tokens, without=without), np.float64)[0]
    log_probability_SxV = logits_SxV - np.log(np.exp(logits_SxV).sum(axis=-1, keepdims=True))
    before_S = range(len(context) - 1, len(context) + len(continuation) - 1)
    score = sum(log_probability_SxV[s, token] for s, token in zip(before_S, continuation, strict=True))
    return score, all(logits_SxV[s].argmax() == token for s, token in zip(before_S, continuation, strict=True))


@pytest.mark.parametrize("batch_size", [1, BATCH, 16])
@pytest.mark.parametrize("without", [(), ("anchor", "news")])
def test_loglikelihood_equals_a_plain_loop_whatever_the_batch(model, batch_size, without):
    """Contexts: none, white space, one that ends in spaces, one that is too long; answers in the order of requests."""
    prompt, long = [EOS, *b"say "], "x" * 50 + "y" * 30
    greedy = model.generate([prompt], 3, without=without)[0]
    assert len(greedy.token_ids) == 3
    lm = FlexOlmoLM(model, without=without, batch_size=batch_size, max_length=MAX_LENGTH)
    pairs = [("a", " b"), ("", HELLO), ("  ", "x"), (long, " the end"), ("ends in  ", "spaces"), ("a", "\tc")]
    found = lm.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    cut = (long + " the end")[-(MAX_LENGTH + 1) : -len(" the end")].encode()
    plain = [(b"a", b" b"), ([EOS], HELLO.encode()), ([EOS], b"  x"), (cut, b" the end"), (b"ends in", b"  spaces")]
    for answer, tokens in zip(found, [*plain, (b"a", b"\tc")], strict=True):
        expected = plain_score(model, *tokens, without)
        assert answer == (pytest.approx(expected[0], rel=1e-6), expected[1])
    assert len({round(score, 3) for score, _ in found}) == len(found)
    written = (None, prompt, greedy.token_ids)
    assert [is_greedy for _, is_greedy in lm._loglikelihood_tokens([written, (None, prompt, [*b"no"])])] == [
        True,
        False,
    ]


@pytest.mark.parametrize("batch_size", [1, BATCH])
def test_rolling_windows_score_each_token_once(model, batch_size):
    """A window is full, its first token the last one of the window before; the last window reaches back."""
    lm = FlexOlmoLM(model, batch_size=batch_size, max_length=MAX_LENGTH)
    long = ("abcdefghi " * 20)[:150].encode()
    texts = [(HELLO,), (long.decode(),), ("",), ("z",)]
    found = lm.loglikelihood_rolling(requests("loglikelihood_rolling", *texts), disable_tqdm=True)
    windows = [([EOS], long[:64]), (long[63:64], long[64:128]), (long[85:128], long[128:])]
    plain = [plain_score(model, *window)[0] for window in windows]
    expected = [plain_score(model, [EOS], HELLO.encode())[0], sum(plain), 0.0, plain_score(model, [EOS], b"z")[0]]
    assert found == pytest.approx(expected, rel=1e-6)


def test_few_shapes_are_compiled(model, monkeypatch):
    """Sequences of every length from 2 to 300 tokens in batches of 8."""
    shapes = set()

    def score(token_ids, without):
        shapes.add(token_ids.shape)
        return original(np.zeros((1, 2), int))._replace(
            log_likelihood_BxS=np.zeros(token_ids.shape), greedy_BxS=np.ones(token_ids.shape, bool)
        )

    original = model.score
    monkeypatch.setattr(model, "score", score)
    monkeypatch.setattr(engine, "MIN_BUCKET", MIN_BUCKET)
    lm = FlexOlmoLM(model, batch_size=8, max_length=256)
    lm._loglikelihood_tokens([(None, [1], [2] * n) for n in range(1, 257)], disable_tqdm=True)
    assert max(shapes) == (8, 257)
    for few in range(1, 8):
        lm._loglikelihood_tokens([(None, [1], [2])] * few, disable_tqdm=True)
    assert {batch for batch, _ in shapes} == {1, 2, 3, 4, 6, 8}
    assert len(shapes) <= 15


@pytest.mark.parametrize("batch_size", [1, BATCH])
def test_texts_end_at_the_first_stop_string_whatever_the_batch(model, batch_size):
    lm = FlexOlmoLM(model, without="news", batch_size=batch_size, max_length=MAX_LENGTH, max_gen_toks=NEW)
    contexts = ["a", HELLO, "", "x" * 60 + "y" * 40, "another one", "<|endoftext|>and on", "1234"]
    prompts = [[*text.encode()] for text in contexts]
    prompts[2], prompts[5] = [EOS], [EOS, *b"and on"]

    def plain(count):
        cut = [prompt[-(MAX_LENGTH - count) :] for prompt in prompts]
        return [model.generate([prompt], count, without=["news"])[0].text for prompt in cut]

    whole, shorter = plain(NEW), plain(6)
    assert min(map(len, whole[:2])) > 3
    stops = [whole[0][2:4], whole[1][1], "never"]
    kinds = [{"until": stops}, {"until": stops[:1], "max_gen_toks": 6, "num_beams": 1}, {"until": "\0\0\0"}]
    todo = [(context, kinds[i % len(kinds)]) for i, context in enumerate(contexts * 2)]
    found = lm.generate_until(requests("generate_until", *todo), disable_tqdm=True)
    for i, text in enumerate(found):
        expected = (shorter if i % len(kinds) == 1 else whole)[i % len(contexts)]
        cuts = [expected.find(stop) for stop in kinds[i % len(kinds)]["until"] if stop in expected]
        assert text == expected[: min(cuts, default=None)]
    assert len(found[0]) < len(whole[0])


def test_sampling_depends_on_the_seed_alone(model):
    """Repeats of a request differ, the batch changes nothing, and only a task that asks for it is sampled."""

    def sample(batch_size=BATCH, seed=0, **kwargs):
        lm = FlexOlmoLM(model, batch_size=batch_size, seed=seed, max_length=MAX_LENGTH, max_gen_toks=NEW)
        kwargs = {"until": [], "do_sample": True, "temperature": 1.0} | kwargs
        return lm.generate_until(requests("generate_until", *[(HELLO, kwargs)] * 4), disable_tqdm=True)

    first = sample()
    assert len(set(first)) == 4
    assert first == sample(batch_size=1)
    assert first != sample(seed=1)
    greedy = model.generate([[*HELLO.encode()]], NEW)[0].text
    for kwargs in ({"do_sample": False}, {"top_k": 1}, {"top_p": 1e-6}, {"temperature": 0.0}):
        assert sample(**kwargs) == [greedy] * 4


def test_answers_are_handed_to_the_cache_of_the_harness(model):
    """As soon as they are known, with the arguments of reference requests; windows of a text are no requests."""

    class Hook:
        def add_partial(self, *entry):
            kept.append(entry)

    lm, kept, expected = FlexOlmoLM(model, batch_size=2, max_length=MAX_LENGTH), [], []
    lm.set_cache_hook(Hook())
    asked = {
        "loglikelihood": [("longer", "b"), ("", "c")],
        "loglikelihood_rolling": [("x" * 100,)],
        "generate_until": [("a", {"until": ["\n"], "max_gen_toks": 4})],
    }
    for kind, arguments in asked.items():
        answers = getattr(lm, kind)(requests(kind, *arguments), disable_tqdm=True)
        expected += [(kind, each, answer) for each, answer in zip(arguments, answers, strict=True)]
    assert kept == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"without": "news+nosuch"}, "nosuch: not on the roster"),
        ({"without": ["anchor", "code", "news"]}, "no expert would be left"),
        ({"batch_size": "auto"}, "batch_size=auto: must be a whole number"),
        ({"max_length": 0}, "max_length=0: must be a whole number, at least 1"),
        ({"seed": -1}, "seed=-1: must be a whole number, at least 0"),
        ({"dtype": "float16"}, "dtype=float16: must be float32 or bfloat16"),
        ({"prefix_token_id": 999}, "prefix_token_id=999: the tokenizer has no such token"),
    ],
)
def test_bad_arguments_are_refused(model, arguments, message):
    with pytest.raises(UserError, match=message):
        FlexOlmoLM(model, **arguments)


def test_bad_requests_are_refused(model, home):
    lm = FlexOlmoLM(model, max_length=8)
    with pytest.raises(UserError, match="max_length=8: a task's continuation has 9 tokens"):
        lm.loglikelihood(requests("loglikelihood", ("a", "123456789")))
    with pytest.raises(UserError, match="max_length=8: must be above the 8 tokens of max_gen_toks"):
        lm.generate_until(requests("generate_until", ("a", {"until": [], "max_gen_toks": 8})))
    with pytest.raises(UserError, match="num_beams=4 is not offered"):
        lm.generate_until(requests("generate_until", ("a", {"until": [], "max_gen_toks": 4, "num_beams": 4})))
    without_tokenizer = flexolmo_jax.Model(model.manifest, model.params)
    with pytest.raises(UserError, match=r"has no tokenizer\.json"):
        FlexOlmoLM(without_tokenizer)
    with pytest.raises(UserError, match="no such directory"):
        FlexOlmoLM(home / "nosuch")


def test_several_experts_may_be_left_out(model):
    pairs = requests("loglikelihood", ("a", HELLO))
    found, same, other = (
        FlexOlmoLM(model, without=names, max_length=MAX_LENGTH).loglikelihood(pairs)
        for names in ("code+news", ["news", "code"], "news")
    )
    assert found == same
    assert found != other


@pytest.fixture
def run_program(monkeypatch, capsys):
    """Runs the command line in this process; returns its exit status and standard error."""

    def run(*arguments):
        tasks = ["--include_path", harness_tasks.TASKS, "--tasks", "local_choice"]
        monkeypatch.setattr(sys, "argv", ["lm_eval", "--model", "flexolmo", *map(str, [*tasks, *arguments])])
        status = 0
        try:
            program.main()
        except SystemExit as exit_:
            status = exit_.code
        return status, capsys.readouterr().err

    # The harness's own tasks take half a minute to list.
    without_defaults = functools.partialmethod(TaskManager.__init__, include_defaults=False)
    monkeypatch.setattr(TaskManager, "__init__", without_defaults)
    monkeypatch.setattr(lm_eval.__main__, "setup_logging", lambda: None)  # it would outlive the test
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # which the harness sets
    return run


def test_as_a_program(home, model, tmp_path, run_program):
    """The flags are those of `lm_eval`."""
    model_args = f"path={home}/merged,without=code+news,max_length={MAX_LENGTH}"
    status, err = run_program("--model_args", model_args, "--batch_size", f"{BATCH}", "--output_path", tmp_path / "out")
    assert status == 0, err
    (file,) = (tmp_path / "out").rglob("results_*.json")
    written = json.loads(file.read_text())
    lm = FlexOlmoLM(model, without="code+news", batch_size=BATCH, max_length=MAX_LENGTH)
    expected = evaluate(lm, ["local_choice"])
    assert_equal_results(written["results"]["local_choice"], expected["results"]["local_choice"])
    assert written["config"]["without"] == ["code", "news"]


def test_as_a_program_it_ends_with_status_2(home, run_program):
    status, err = run_program("--model_args", f"path={home}/nosuch")
    assert status == 2
    assert err.strip().splitlines()[-1].startswith("lm_eval: ")
    assert "Traceback" not in err
