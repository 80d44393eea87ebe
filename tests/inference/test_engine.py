"""Decoding with a cache: against recomputed whole sequences, and requests that join, leave and end at any time."""

import dataclasses

import numpy as np
import pytest

import flexolmo_jax
from flexolmo_jax.checkpoint.manifests import ANCHOR_NAME, ExpertRecord, ModelManifest
from flexolmo_jax.combine.merge import merge
from flexolmo_jax.errors import UserError
from flexolmo_jax.inference import engine as engine_module
from flexolmo_jax.inference import model as model_module
from flexolmo_jax.inference import steps
from flexolmo_jax.inference.engine import Engine, bucket
from flexolmo_jax.inference.model import Model
from flexolmo_jax.inference.request import Request
from flexolmo_jax.model.decoder import separate_layers
from tests.support import golden, small
from tests.support.fast_engine import prompts_in_chunks

REQUESTS = [
    Request([256, *b"hello"], 12),
    Request([256], 5),
    Request([256, *b"a longer prompt than the others are"], 20, without=("code",)),
    Request([256, *b"drawn"], 9, temperature=1.0, seed=7),
    Request([256, *b"drawn"], 9, temperature=1.5, top_k=20, top_p=0.9, seed=8),
    Request([9, 8, 7], 17, without=("anchor", "news")),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    home = tmp_path_factory.mktemp("engine")
    small.anchor(home / "anchor")
    inputs = [small.contribution(home / name, home / "anchor", seed=i) for i, name in enumerate(["code", "news"], 1)]
    merge(home / "anchor", inputs, home / "merged", top_k=2)
    return flexolmo_jax.load(home / "merged")


def finish(engine, max_steps=8):
    """Steps until all have ended; returns {id: (continuation, streamed text, streamed tokens)}."""
    texts, tokens, done = {}, {}, {}
    while updates := engine.step(max_steps):
        for update in updates:
            texts[update.id] = texts.get(update.id, "") + update.text
            tokens[update.id] = tokens.get(update.id, []) + update.token_ids
            if update.continuation:
                done[update.id] = update.continuation
    return {id: (c, texts[id], tokens[id]) for id, c in done.items()}


@pytest.fixture(scope="module")
def alone(model):
    """What each request comes to when nothing else is in flight."""
    return [finish_one(model, request) for request in REQUESTS]


def assert_same(found, expected):
    assert found[:2] == expected[:2]
    assert found.finish_reason == expected.finish_reason
    np.testing.assert_allclose(found.layers, expected.layers, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "batches"),
    # One sequence and several have different implementations of experts.
    [(golden.DENSE, [slice(None)]), (golden.MIXTURE, [slice(1), slice(None)])],
    ids=[golden.DENSE, golden.MIXTURE],
)
def test_greedy_tokens_are_those_of_transformers(name, batches):
    architecture, layout, params, expected = golden.load(name)
    roster = [ANCHOR_NAME, "a", "b", "c"][: layout.num_experts]
    manifest = ModelManifest(
        architecture=dataclasses.asdict(architecture),
        experts=[ExpertRecord(name=expert, leaves={}, card={}) for expert in roster],
        shared={},
        top_k=layout.top_k,
        tokenizer_digest="",
        eos_id=2,
    )
    model = Model(manifest, separate_layers(params, architecture.num_layers))
    for batch in batches:
        prompts, generated = (np.tile(expected[key], (6, 1))[batch].tolist() for key in ("prompt", "generated"))
        for found, tokens in zip(model.generate(prompts, 16), generated, strict=True):
            assert found.token_ids == [*tokens, 2][: [*tokens, 2].index(2)]
            assert found.text == ""


@pytest.mark.parametrize("slots", [2, 4])
def test_requests_that_join_as_slots_free_up_end_as_they_would_alone(model, alone, slots):
    engine, waiting, found, in_flight = Engine(model, slots), list(enumerate(REQUESTS)), {}, {}
    together = 0
    while waiting or in_flight:
        if waiting and engine.free:  # one at a time, so that they start at different steps
            index, request = waiting.pop(0)
            in_flight[engine.add([request])[0]] = index
        for update in engine.step(2):
            if update.continuation:
                found[in_flight.pop(update.id)] = update.continuation
        together = max(together, len(in_flight))
    assert together == min(slots, together) > 1
    for index, expected in enumerate(alone):
        assert_same(found[index], expected)


def test_requests_added_together_end_as_they_would_alone(model, alone):
    engine = Engine(model, slots=8)
    ids = engine.add(REQUESTS)
    found = finish(engine, max_steps=100)
    for id, expected in zip(ids, alone, strict=True):
        assert_same(found[id][0], expected)
        assert found[id][1:] == expected[:2]


def test_a_cache_that_grows_changes_nothing(model, monkeypatch):
    requests = [Request([256, *b"grow"], 200), Request([256, *b"me"], 90)]

    def run():
        engine = Engine(model, slots=2)
        ids = engine.add(requests)
        lengths, found = set(), {}
        while updates := engine.step(50):
            lengths.add(engine._length)
            found |= {u.id: u.continuation for u in updates if u.continuation}
        return lengths, [found[id] for id in ids]

    (length,), expected = run()
    monkeypatch.setattr(engine_module, "AHEAD", 1)
    lengths, found = run()
    assert len(lengths) > 2
    assert max(lengths) <= 2 * length
    for actual, other in zip(found, expected, strict=True):
        assert_same(actual, other)


def test_shares_are_the_weights_of_the_experts_that_computed_the_text(model):
    """Top-2 of 3, normalised, mean over all tokens but the last, which nothing was written after."""
    prompt = [256, *b"shares"]
    (found,) = model.generate([prompt], 10)
    read = prompt + found.token_ids[: 10 - 1]
    weights_LxSxE = np.float64(forward(model, read).router_weights_LxBxSxE[:, 0, : len(read)])
    lowest = weights_LxSxE.argmin(-1)[..., None]
    np.put_along_axis(weights_LxSxE, lowest, 0, axis=-1)
    expected_LxE = (weights_LxSxE / weights_LxSxE.sum(-1, keepdims=True)).mean(axis=1)
    np.testing.assert_allclose(found.layers, expected_LxE, atol=1e-5)
    np.testing.assert_allclose(list(found.experts.values()), expected_LxE.mean(axis=0), atol=1e-5)
    assert list(found.experts) == model.roster


@pytest.mark.parametrize("max_steps", [1, 3, 8])
def test_a_stop_string_ends_a_request_at_its_token_whatever_the_steps(model, max_steps):
    request = Request([256, *b"stop"], 40, temperature=1.0, seed=3)
    whole = finish_one(model, request)
    # Of whole characters, since half of one decodes to a replacement character until its other bytes come.
    pairs = (whole.text[i : i + 2] for i in range(3, len(whole.text) - 1))
    stop = next(pair for pair in pairs if pair.isascii())
    end = whole.text.index(stop)
    found = finish_one(model, dataclasses.replace(request, stop=("never seen", stop)), max_steps)
    assert found.text == whole.text[:end]
    assert found.finish_reason == "stop"
    assert found.token_ids == whole.token_ids[: len(found.token_ids)]
    assert stop in model.tokenizer.decode(found.token_ids)
    assert stop not in model.tokenizer.decode(found.token_ids[:-1])
    shorter = finish_one(model, dataclasses.replace(request, max_new_tokens=len(found.token_ids)))
    np.testing.assert_allclose(found.layers, shorter.layers, atol=1e-6)


def finish_one(model, request, max_steps=8):
    engine = Engine(model, slots=1)
    engine.add([request])
    ((continuation, text, tokens),) = finish(engine, max_steps).values()
    assert text == continuation.text
    assert tokens == continuation.token_ids
    return continuation


def test_why_a_request_ended(model):
    assert finish_one(model, REQUESTS[0]).finish_reason == "length"
    first = finish_one(model, REQUESTS[0]).token_ids[0]
    ending = Model(model.manifest.but(eos_id=first), model.params, model.tokenizer)
    found = finish_one(ending, REQUESTS[0])
    assert (found.token_ids, found.text, found.finish_reason) == ([], "", "stop")
    assert sum(found.experts.values()) == pytest.approx(1)
    # EOS is not kept, but was written after all tokens that are.
    second = finish_one(model, REQUESTS[2]).token_ids
    later = next(i for i in range(1, len(second)) if second[i] not in second[:i])
    ending = Model(model.manifest.but(eos_id=second[later]), model.params, model.tokenizer)
    found = finish_one(ending, REQUESTS[2])
    assert found.token_ids == second[:later]
    same_tokens_read = finish_one(model, dataclasses.replace(REQUESTS[2], max_new_tokens=later + 1))
    np.testing.assert_allclose(found.layers, same_tokens_read.layers, atol=1e-6)


def test_a_cancelled_request_frees_its_slot_and_disturbs_nobody(model, alone):
    engine = Engine(model, slots=2)
    dropped, kept = engine.add([REQUESTS[3], REQUESTS[0]])
    engine.step(2)
    engine.cancel(dropped)
    engine.cancel(dropped)
    assert engine.free == 1
    (late,) = engine.add([REQUESTS[5]])
    found = finish(engine)
    assert found.keys() == {kept, late}
    assert_same(found[kept][0], alone[0])
    assert_same(found[late][0], alone[5])


def test_lengths_of_one_bucket_share_a_compilation(model):
    model.generate([[1] * 33], 20)
    programs = (steps.prefill._cache_size(), steps.decode._cache_size())
    for length, count in ((34, 19), (40, 9), (48, 10)):
        model.generate([[1] * length], count)
    assert (steps.prefill._cache_size(), steps.decode._cache_size()) == programs


def test_an_engine_samples_from_the_first_request_on_that_does(model, monkeypatch):
    engine, samples = Engine(model, slots=2), []

    def decode(*args):
        samples.append(args[8] is not None)
        return steps.decode(*args)

    monkeypatch.setattr(engine_module, "decode", decode)
    for temperature in (0.0, 1.0, 0.0):
        engine.add([Request([1, 2], 4, temperature=temperature)])
        finish(engine)
    assert samples == [False, True, True]


@pytest.mark.parametrize(
    "option", [{"temperature": 0.5}, {"repetition_penalty": 1.1}, {"presence_penalty": -1}, {"frequency_penalty": 0.1}]
)
def test_a_request_is_greedy_without_temperature_and_penalties(option):
    assert Request([1], seed=3, top_k=2, top_p=0.5, min_p=0.1).is_greedy
    assert not Request([1], **option).is_greedy


def test_buckets_are_powers_of_two_and_three_quarters_of_them():
    assert [bucket(n, 16) for n in (1, 16, 17, 24, 25, 32, 33, 100, 4096)] == [16, 16, 24, 24, 32, 32, 48, 128, 4096]
    assert [bucket(n, 1) for n in range(1, 9)] == [1, 2, 3, 4, 6, 6, 8, 8]


def test_an_engine_refuses_what_it_cannot_hold(model):
    engine = Engine(model, slots=1, max_length=10)
    for request, message in (
        (Request([1] * 8, 3), "prompt of 8 tokens and max_new_tokens=3: 11 in all, .* context of 10;"),
        (Request([1], 1, stop_token_ids=(1, 260)), "stop_token_ids=260: not in the vocabulary"),
        (Request([1], 1, without=("nosuch",)), "nosuch: not on the roster"),
    ):
        with pytest.raises(UserError, match=message):
            engine.add([request])
    assert engine.free == 1
    engine.add([Request([1] * 8, 2)])
    with pytest.raises(ValueError, match="1 requests for 0 free slots"):
        engine.add([Request([1], 1)])
    with pytest.raises(UserError, match=r"stop=.*: the model has no tokenizer"):
        Engine(Model(model.manifest, model.params)).add([Request([1], 1, stop=("x",))])


def test_prompts_read_in_chunks_give_the_same(model):
    """Of 2 prompts, the longer takes several chunks, and the shorter ends within one of them."""
    prompts = [[256, *b"a long prompt, which is read in several parts " * 2], [256, *b"a shorter one " * 2]]
    expected = model.generate(prompts, 5)
    with prompts_in_chunks(64):  # of 32: the bucket is 96
        engine = Engine(model, slots=2)
        for _ in range(2):
            ids = engine.add([Request(prompt, 5) for prompt in prompts])
            found = finish(engine)
            for id, other in zip(ids, expected, strict=True):
                assert_same(found[id][0], other)
        # A new state and that of earlier steps have the same program.
        assert engine_module.prefill._cache_size() == 1


def test_streams_are_handed_to_their_prompts(model):
    streams = {}

    def on_text(index, text):
        streams[index] = streams.get(index, "") + text

    prompts = ["one", "two"]
    found = model.generate(prompts, 20, temperature=1.0, seed=1, on_text=on_text)
    assert [streams.get(i, "") for i in range(2)] == [continuation.text for continuation in found]
    assert [c[:2] for c in found] == [c[:2] for c in model.generate(prompts, 20, temperature=1.0, seed=1)]
    assert model.generate(["one", "one"], 20, temperature=1.0)[0] != model.generate(["one"], 20)[0]


@pytest.mark.parametrize("without", [(), ("news",)])
def test_scores_are_those_of_the_logits(model, without):
    tokens = np.array([[256, *b"scores"], [256, *b"of two"]])
    scores = model.score(tokens, without)
    expected = np.stack([log_probabilities(model, ids, without) for ids in tokens])
    picked = np.take_along_axis(expected[:, :-1], tokens[:, 1:, None], axis=-1)[..., 0]
    np.testing.assert_allclose(scores.log_likelihood_BxS[:, 1:], picked, atol=1e-4)
    np.testing.assert_array_equal(scores.log_likelihood_BxS[:, 0], 0)
    np.testing.assert_array_equal(scores.greedy_BxS[:, 1:], expected[:, :-1].argmax(-1) == tokens[:, 1:])
    assert scores.greedy_BxS[:, 0].all()


LENGTH = 64


def forward(model, ids, without=()):
    """The output for a sequence without a cache; padded, for one compilation."""
    tokens = np.zeros((1, LENGTH), int)
    tokens[0, : len(ids)] = ids
    return model_module._forward(model.decoder, model.params, tokens, model.expert_mask(without))


def log_probabilities(model, ids, without=()):
    """float64 [tokens, vocab] of what comes after each token."""
    logits = np.float64(forward(model, ids, without).logits_BxSxV)[0, : len(ids)]
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def assert_logprobs(logprobs, ids, first, model, count, without=()):
    """The log probabilities of `ids[first:]` are those of the whole sequence computed anew."""
    assert logprobs.token_ids == list(ids[first:])
    expected = log_probabilities(model, ids, without)
    assert logprobs.top_ids_NxK.shape == logprobs.top_NxK.shape == (len(ids) - first, count)
    for i, token in enumerate(ids[first:]):
        if first + i == 0:
            assert np.isnan(logprobs.chosen_N[i])
            continue
        logits = expected[first + i - 1]
        np.testing.assert_allclose(logprobs.chosen_N[i], logits[token], atol=1e-4)
        np.testing.assert_allclose(logprobs.top_NxK[i], np.sort(logits)[::-1][:count], atol=1e-4)
        np.testing.assert_allclose(logits[logprobs.top_ids_NxK[i]], logprobs.top_NxK[i], atol=1e-4)


def test_log_probabilities_are_those_of_the_model_whatever_is_drawn(model, alone):
    """Prompts are read in chunks, and scored a few places at a time; those who do not ask are told nothing."""
    asking = [
        dataclasses.replace(REQUESTS[2], logprobs=3, prompt_logprobs=True),
        dataclasses.replace(REQUESTS[4], logprobs=0, repetition_penalty=1.3),
        dataclasses.replace(REQUESTS[1], max_new_tokens=0, logprobs=1, prompt_logprobs=True),
        dataclasses.replace(REQUESTS[0], max_new_tokens=0, logprobs=2, prompt_logprobs=True),
    ]
    engine, streamed, done = Engine(model, slots=8), {}, {}
    with prompts_in_chunks(16, score_batch=5):
        ids = engine.add([*asking, REQUESTS[5]])
    while updates := engine.step(3):
        for update in updates:
            if update.logprobs:
                streamed.setdefault(update.id, []).append(update.logprobs)
            if update.continuation:
                done[update.id] = update.continuation
    for id, request in zip(ids, asking, strict=False):
        found, first = done[id], 0 if request.prompt_logprobs else len(request.token_ids)
        sequence = [*request.token_ids, *found.token_ids]
        assert_logprobs(found.logprobs, sequence, first, model, request.logprobs, request.without)
        for whole, *parts in zip(found.logprobs, *streamed[id], strict=True):
            np.testing.assert_array_equal(np.concatenate(parts), whole)
    assert_same(done[ids[0]], alone[2])
    assert_same(done[ids[4]], alone[5])
    assert done[ids[4]].logprobs is None
    assert (done[ids[3]].text, done[ids[3]].finish_reason) == ("", "length")
    assert set(done[ids[2]].experts.values()) == {0.0}  # a single token, after which nothing is written
    # Who comes later, when nobody asks any more, is served by the program that scores nothing.
    (id,) = engine.add([REQUESTS[0]])
    assert engine._state.scored is None
    assert_same(finish(engine)[id][0], alone[0])


def test_a_token_that_ends_the_text_is_told_too_but_not_kept(model, alone):
    """EOS, or one of the stop tokens; without it, `ignore_eos` writes on."""
    tokens = alone[2].token_ids
    later = next(i for i in range(1, len(tokens)) if tokens[i] not in tokens[:i])
    stopping = dataclasses.replace(REQUESTS[2], stop_token_ids=(259, tokens[later]), logprobs=1)
    ending = Model(model.manifest.but(eos_id=tokens[later]), model.params, model.tokenizer)
    by_token, by_eos = finish_one(model, stopping), finish_one(ending, dataclasses.replace(REQUESTS[2], logprobs=1))
    for found in (by_token, by_eos):
        assert (found.token_ids, found.finish_reason) == (tokens[:later], "stop")
        ids = [*REQUESTS[2].token_ids, *tokens[: later + 1]]
        assert_logprobs(found.logprobs, ids, len(REQUESTS[2].token_ids), model, 1, REQUESTS[2].without)
    going_on = finish_one(ending, dataclasses.replace(REQUESTS[2], ignore_eos=True))
    assert (going_on.token_ids, going_on.finish_reason) == (tokens, "length")


def test_penalties_follow_what_each_request_wrote(model):
    """Greedy, beside a request without penalties, against a plain loop."""
    prompt, new = [256, *b"again and again"], 15
    plain, penalties = (
        Request(prompt, new),
        {"repetition_penalty": 1.4, "presence_penalty": 0.5, "frequency_penalty": 1.0},
    )
    engine = Engine(model, slots=2)
    ids = engine.add([plain, dataclasses.replace(plain, **penalties)])
    found = finish(engine)
    written = []
    for _ in range(new):
        read = [*prompt, *written]
        logits = np.float64(forward(model, read).logits_BxSxV)[0, len(read) - 1]
        for token in {*prompt, *written}:
            logits[token] = logits[token] / 1.4 if logits[token] > 0 else logits[token] * 1.4
        for token in set(written):
            logits[token] -= 0.5 + written.count(token)
        written.append(int(logits.argmax()))
    assert found[ids[1]][0].token_ids == written
    assert found[ids[0]][0].token_ids == finish_one(model, plain).token_ids != written
