"""`flexolmo_jax.load`: logits and generation, against a plain loop."""

import dataclasses
import json
import os
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

import flexolmo_jax
from flexolmo_jax.combine.merge import merge
from flexolmo_jax.errors import UserError
from flexolmo_jax.inference import model as model_module
from flexolmo_jax.inference.model import Model
from flexolmo_jax.model.decoder import separate_layers
from tests.support import kinds, small
from tests.support.small import assert_refused, flexolmo

PROMPTS = ["", "hello", "naïve", "a prompt that is a little longer than the others"]
NEW, EOS, PADDED = 14, 256, 64


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("api")
    small.anchor(home / "anchor")
    inputs = [small.contribution(home / name, home / "anchor", seed=i) for i, name in enumerate(["code", "news"], 1)]
    merge(home / "anchor", inputs, home / "merged", top_k=2)
    return home


@pytest.fixture(scope="module")
def model(home):
    return flexolmo_jax.load(home / "merged")


def padded(sequences):
    """Tokens [len(PROMPTS), PADDED] with these sequences, so that one compilation serves all."""
    tokens = np.zeros((len(PROMPTS), PADDED), int)
    for tokens_S, sequence in zip(tokens, sequences, strict=False):
        tokens_S[: len(sequence)] = sequence
    return tokens


def plain_greedy(model, prompts, count, without=()):
    """Token by token."""
    sequences = [[EOS, *prompt.encode()] for prompt in prompts]
    starts, ended = [len(sequence) for sequence in sequences], [False] * len(sequences)
    for _ in range(count):
        logits = np.asarray(model.logits(padded(sequences), without=without))
        for i, sequence in enumerate(sequences):
            best = int(logits[i, len(sequence) - 1].argmax())
            ended[i] = ended[i] or best == EOS
            if not ended[i]:
                sequence.append(best)
    return [sequence[start:] for sequence, start in zip(sequences, starts, strict=True)]


def test_roster_and_parameters(home):
    model = flexolmo_jax.load(home / "merged")
    assert model.roster == ["anchor", "code", "news"]
    stored = small.read_params(home / "merged")
    for path, leaf in separate_layers(stored, small.ARCHITECTURE.num_layers).items():
        np.testing.assert_array_equal(model.params.pop(path), leaf)
    assert not model.params
    short = flexolmo_jax.load(home / "merged", dtype="bfloat16")
    assert {leaf.dtype for leaf in short.params.values()} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize("without", [(), ("code",)])
def test_greedy_generation_equals_a_plain_loop(model, without):
    expected = plain_greedy(model, PROMPTS, NEW, without)
    assert len(set(map(tuple, expected))) == len(PROMPTS)
    found = model.generate(PROMPTS, NEW, without=without)
    assert [continuation.token_ids for continuation in found] == expected
    for continuation, ids in zip(found, expected, strict=True):
        assert continuation.text == bytes(i for i in ids if i < 256).decode(errors="replace")
        assert sum(continuation.experts.values()) == pytest.approx(1)
        assert [name for name, share in continuation.experts.items() if share == 0] == list(without)


def test_experts_change_what_is_generated(model):
    assert plain_greedy(model, PROMPTS, NEW) != plain_greedy(model, PROMPTS, NEW, ["code"])


def test_the_end_of_a_document_stops_its_sequence_alone(model):
    """The column of a token that comes after a few steps is handed to EOS, a little larger."""
    before = plain_greedy(model, PROMPTS, NEW)
    token = before[1][3]
    head = model.params["head"].at[:, EOS].set(model.params["head"][:, token] * 1.001)
    ending = Model(model.manifest, model.params | {"head": head}, model.tokenizer)
    expected = plain_greedy(ending, PROMPTS, NEW)
    lengths = [len(ids) for ids in expected]
    assert lengths[1] < NEW
    assert max(lengths) == NEW
    assert [continuation.token_ids for continuation in ending.generate(PROMPTS, NEW)] == expected


def test_sequences_may_fill_the_whole_length(model):
    """A prompt and its continuation of just the 64 tokens to which lengths are rounded up."""
    prompt = "x" * (PADDED - 1 - NEW)
    (full,) = model.generate([prompt], NEW)
    assert [full.token_ids] == plain_greedy(model, [prompt], NEW)
    assert len(full.token_ids) == NEW


def test_sampling_is_reproducible_by_its_seed(model):
    def sample(seed, temperature=1.0):
        return [continuation.token_ids for continuation in model.generate(PROMPTS, NEW, (), temperature, seed)]

    assert sample(3) == sample(3)
    assert sample(3) != sample(4)
    greedy = [continuation.token_ids for continuation in model.generate(PROMPTS, NEW)]
    assert sample(3) != greedy
    assert sample(3, temperature=1e-4) == greedy


def test_sampling_follows_the_model_at_its_temperature(model, monkeypatch):
    """The first tokens of many sequences are distributed as the softmax of logits / temperature."""
    monkeypatch.setattr(model_module, "MAX_SLOTS", len(PROMPTS))  # shares the programs of other tests
    count, temperature = 512, 2.0
    first = [continuation.token_ids[:1] for continuation in model.generate(["hello"] * count, 1, (), temperature, 1)]
    counts = np.bincount([ids[0] if ids else EOS for ids in first], minlength=small.ARCHITECTURE.vocab_size)
    prompt = [EOS, *b"hello"]
    logits = np.asarray(model.logits(padded([prompt])), np.float64)[0, len(prompt) - 1] / temperature
    expected = count * np.exp(logits) / np.exp(logits).sum()
    # Pearson's statistic has as many degrees of freedom as there are other tokens.
    freedom = len(expected) - 1
    assert ((counts - expected) ** 2 / expected).sum() < freedom + 6 * np.sqrt(2 * freedom)


def test_top_k_of_a_request(home, model):
    tokens = padded([[EOS, *b"hello"]])
    every = np.asarray(model.logits(tokens, top_k=3))
    assert np.abs(every - np.asarray(model.logits(tokens))).max() > 1e-3
    np.testing.assert_array_equal(every, np.asarray(model.logits(tokens, top_k=99)))
    with pytest.raises(UserError, match="top_k=0: it must be at least 1"):
        model.logits(tokens, top_k=0)


def test_bad_requests_are_refused(home, model):
    refused = (["nosuch"], "nosuch: not on the roster"), (model.roster, "no expert would be left"), ("code", "list of")
    for names, message in refused:
        with pytest.raises(UserError, match=message):
            model.logits([[1]], without=names)
    bad = {
        "max_new_tokens": (-1, 1.5, "1", 2**31),
        "temperature": (-1, np.nan, None, "1"),
        "top_k": (-1, 2**31, 1.0),
        "top_p": (0.0, 1.1, None),
        "seed": (-1, 2**32, None),
        "stop": ([""], "word", None, [1]),
        "without": ("code", None),
        "min_p": (-0.1, 1.1, None, np.nan),
        "repetition_penalty": (0, -1, np.inf, np.nan, None),
        "presence_penalty": (np.inf, "1"),
        "frequency_penalty": (-101, None),
        "stop_token_ids": ([-1], 5, [1.0], list(range(33))),
        "ignore_eos": (1, None),
        "logprobs": (-1, 21, True),
        "prompt_logprobs": (True, 1),
        "max_length": (0, 1.5, "64", -4),
    }
    for name, values in bad.items():
        for value in values:
            with pytest.raises(UserError, match=f"{name}=.*: it must be"):
                model.generate(["x"], **{name: value})
    prompts = (
        ([], "at least one token"),
        ([260], "token_ids=260: not in the vocabulary"),
        ([-1], "must be"),
        ([1.5], "must be"),
        ("\ud83d", "UTF-8"),
    )
    for prompt, message in prompts:
        with pytest.raises(UserError, match=message):
            model.generate([prompt])
    with pytest.raises(UserError, match="prompts='ab': is one text"):
        model.generate("ab")
    for tokens in ([1, 2], [[1.5]], [[260]], [[-1]]):
        with pytest.raises(UserError, match="token_ids="):
            model.logits(tokens)
    with pytest.raises(UserError, match="dtype=float16: it must be one of float32, bfloat16"):
        flexolmo_jax.load(home / "merged", dtype="float16")
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        Model(model.manifest, model.params).generate(["x"])
    assert model.generate([]) == []


def test_a_model_whose_leaves_are_not_its_architectures_is_refused(home, tmp_path):
    shutil.copytree(home / "merged", tmp_path / "bad")
    index = tmp_path / "bad" / "params" / "_METADATA"
    index.write_text(index.read_text().replace('"head"', '"tail"').replace("'head'", "'tail'"))
    (tmp_path / "bad/params/head").rename(tmp_path / "bad/params/tail")
    with pytest.raises(UserError, match=r"bad: leaf head is missing"):
        flexolmo_jax.load(tmp_path / "bad")
    small.anchor(tmp_path / "odd", architecture=small.ARCHITECTURE)
    file = tmp_path / "odd" / "model.json"
    wide = dataclasses.replace(small.ARCHITECTURE, d_ff=32)
    file.write_text(file.read_text().replace(f'"d_ff": {small.ARCHITECTURE.d_ff}', f'"d_ff": {wide.d_ff}'))
    small.reseal(file)
    with pytest.raises(UserError, match="missing or misshapen"):
        flexolmo_jax.load(tmp_path / "odd")


def test_the_command_prints_each_continuation_and_its_shares(home, model):
    arguments = [f"--model={home}/merged", "--prompt=hello", "--prompt=naïve", "--without=code", "--max_new_tokens=3"]
    result = flexolmo("generate", *arguments)
    assert (result.status, result.err) == (0, "")
    expected = ""
    for prompt, continuation in zip(["hello", "naïve"], model.generate(["hello", "naïve"], 3, ["code"]), strict=True):
        anchor, _, news = continuation.experts.values()
        expected += f"{prompt}{continuation.text}\n[anchor {anchor:.0%}, news {news:.0%}]\n\n"
    assert result.out == expected


def test_the_command_takes_every_way_to_choose_tokens(home, model):
    options = {"min_p": 0.05, "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.25}
    flags = [f"--{name}={value}" for name, value in options.items()]
    flags += ["--stop_token_ids=1", "--stop_token_ids=2", "--ignore_eos", "--temperature=1", "--max_new_tokens=40"]
    result = flexolmo("generate", f"--model={home}/merged", "--prompt=hello", *flags)
    options |= {"stop_token_ids": [1, 2], "ignore_eos": True, "temperature": 1.0}
    (expected,) = model.generate(["hello"], 40, **options)
    assert result.out.startswith(f"hello{expected.text}\n[")
    assert expected.token_ids != model.generate(["hello"], 40, temperature=1.0)[0].token_ids


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["--prompt", "none given"]),
        (["--prompt=x", "--max_new_tokens=0"], ["--max_new_tokens=0"]),
        (["--prompt=x", "--temperature=-1"], ["--temperature=-1"]),
        (["--prompt=x", "--temperature=nan"], ["temperature", "finite"]),
        (["--prompt=x", "--top_k=99999999999"], ["top_k", "99999999999"]),
        (["--prompt=x", "--max_new_tokens=99999999999"], ["max_new_tokens", "99999999999"]),
        (["--prompt=\udcff"], ["UTF-8"]),
        (["--prompt=x", "--seed=1", "--seed=2"], ["--seed", "given 2 times"]),
        (["--prompt=x", "--top_p=0"], ["top_p", "above 0"]),
        (["--prompt=x", "--min_p=2"], ["min_p", "from 0 to 1"]),
        (["--prompt=x", "--repetition_penalty=0"], ["repetition_penalty", "from 0.001"]),
        (["--prompt=x", "--stop_token_ids=999"], ["stop_token_ids", "999"]),
        (["--prompt=x", "--max_length=1"], ["--max_length=1"]),
        (["--prompt=x", "--stop="], ["stop", "none of them empty"]),
        (["--prompt=x", "--seed=-1"], ["--seed=-1"]),
        (["--prompt=x", "--seed=99999999999999999999"], ["--seed=9"]),
        (["--prompt=x", "--without=nosuch"], ["--without=nosuch", "anchor, code, news"]),
    ],
)
def test_the_command_refuses_bad_values(home, arguments, words):
    assert_refused(flexolmo("generate", f"--model={home}/merged", *arguments), "generate", *words)


def short_context(home, path):
    """Writes a model that was trained on sequences of 20 tokens."""
    shutil.copytree(home / "anchor", path)
    manifest = json.loads((path / "model.json").read_text())
    manifest["experts"][0]["card"]["sequence_length"] = 20
    (path / "model.json").write_text(json.dumps(manifest))
    small.reseal(path / "model.json")
    return path


def test_prompt_and_continuation_stay_within_the_context(home, tmp_path):
    """What was not asked for is cut; what was is refused, unless `max_length` allows more."""
    short = short_context(home, tmp_path / "short")
    model = flexolmo_jax.load(short)
    (cut,) = model.generate(["x" * 14], ignore_eos=True)
    assert len(cut.token_ids) == 5
    (longer,) = model.generate(["x" * 14], 6, max_length=21, ignore_eos=True)
    assert longer.token_ids[:5] == cut.token_ids
    with pytest.raises(
        UserError, match=r"prompt of 15 tokens and max_new_tokens=6: 21 in all, .* context of 20; .*max_length"
    ):
        model.generate(["x" * 14], 6)
    with pytest.raises(
        UserError, match=r"prompt of 20 tokens: leaves no room in the model's context of 20; .*max_length"
    ):
        model.generate(["x", "x" * 19])
    assert_refused(
        flexolmo("generate", f"--model={short}", f"--prompt={'x' * 14}", "--max_new_tokens=6"),
        *("generate", "15 tokens", "max_new_tokens=6", "20", "--max_length"),
    )
    result = flexolmo("generate", f"--model={short}", f"--prompt={'x' * 14}", "--ignore_eos")
    assert result.out.startswith("x" * 14 + cut.text)
    allowed = ["--max_new_tokens=6", "--max_length=21", "--ignore_eos"]
    result = flexolmo("generate", f"--model={short}", f"--prompt={'x' * 14}", *allowed)
    assert result.out.startswith("x" * 14 + longer.text)


def test_a_model_knows_the_token_that_closes_its_documents(home, tmp_path):
    shutil.copytree(home / "anchor", tmp_path / "model")
    manifest = tmp_path / "model" / "model.json"
    manifest.write_text(manifest.read_text().replace('"eos_id": 256', '"eos_id": 10'))
    small.reseal(manifest)
    assert flexolmo_jax.load(tmp_path / "model").tokenizer.eos_id == 10


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A model whose vocabulary is larger than that of any tokenizer of `kinds`: it writes ids without a token too."""
    architecture = dataclasses.replace(small.ARCHITECTURE, vocab_size=640)
    return flexolmo_jax.load(small.anchor(tmp_path_factory.mktemp("wide") / "anchor", architecture=architecture))


@pytest.mark.parametrize("kind", kinds.KINDS)
def test_text_is_what_all_tokens_decode_to_without_the_prompts(kind, wide, tmp_path):
    tokenizer = kinds.load(kind, tmp_path)
    model = Model(wide.manifest.but(eos_id=tokenizer.eos_id), wide.params, tokenizer)
    known = "the quick" if kind == "wordpiece_without_unknown" else "A naïve café, 日本"
    prompts = ["", "the quick", kinds.ids(tokenizer, kinds.TEXTS[3])[:-1][:40] or [5], known]
    chunks = {index: "" for index in range(len(prompts))}

    def on_text(index, text):
        chunks[index] += text

    sampling = {"temperature": 1.0, "seed": 1}
    found = model.generate(prompts, NEW, on_text=on_text, **sampling)
    for index, (prompt, continuation) in enumerate(zip(prompts, found, strict=True)):
        ids = model.encode(prompt)
        before, whole = tokenizer.decode(ids), tokenizer.decode([*ids, *continuation.token_ids])
        # New bytes may break the characters at the end of a prompt, and new text change all of it.
        assert whole.startswith(before) or kind in kinds.WHOLE or "\ufffd" in whole
        assert continuation.text == whole[len(os.path.commonprefix([before, whole])) :]  # noqa: RUF071
        assert continuation.text == chunks[index]
    stop = [continuation.text[5:8] for continuation in found if continuation.text[5:8]][:2]
    stopped = model.generate(prompts, NEW, stop=stop, **sampling)
    for whole, continuation in zip(found, stopped, strict=True):
        ends = [whole.text.find(text) for text in stop if text in whole.text]
        assert continuation.text == whole.text[: min(ends, default=len(whole.text))]
