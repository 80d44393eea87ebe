"""Decoding a model with a selector: against whole sequences, for prompts in chunks and requests that join."""

import numpy as np
import pytest

import flexolmo_jax
from flexolmo_jax.combine.merge import merge
from flexolmo_jax.inference import model as model_module
from flexolmo_jax.inference.engine import Engine
from flexolmo_jax.inference.request import Request
from flexolmo_jax.model.selectors import SELECTORS
from tests.support import small
from tests.support.fast_engine import prompts_in_chunks

EOS, LENGTH, CHUNK = 256, 96, 16
ALPHABETS = {"anchor": b"abcdefgh", "code": b"(){};=+-", "news": b"ABCDEFGH"}
REQUESTS = [
    Request([EOS, *b"(;)(;){}"], 12),
    Request([EOS], 5),
    Request([EOS, *b"ABCAB(;){}(;){}(;){}ABCABDHEADBEEFABABABAA"], 20, without=("code",)),
    Request([EOS, *b"ADHEADBEEF (;){};", EOS, *b"ABBA"], 9),
    Request([9, 8, 7], 17, without=("anchor", "news")),
    Request([EOS, *b"abcdefghABCD"], 3),
]


def text_of(name, length, seed=0):
    """Random text of an owner's letters."""
    return np.random.default_rng(seed).choice(list(ALPHABETS[name]), length)


@pytest.fixture(scope="module")
def model(request, tmp_path_factory):
    """A merge of owners, each of whom writes random text of eight letters of its own."""
    home, statistics = tmp_path_factory.mktemp("selection"), {}
    for name in ALPHABETS:
        documents = [np.append(text_of(name, 300, seed), EOS).astype(np.uint16) for seed in range(1, 9)]
        statistics[name] = SELECTORS["ngram"].statistics(documents, small.ARCHITECTURE, EOS)
    small.anchor(home / "anchor", statistics=statistics["anchor"])
    for seed, name in enumerate(["code", "news"], 1):
        small.contribution(home / name, home / "anchor", seed=seed, statistics=statistics[name])
    merge(home / "anchor", [home / "code", home / "news"], home / "merged", selection=request.param)
    return flexolmo_jax.load(home / "merged")


def forward(model, ids, without=()):
    """The output for a sequence without a cache; padded, for one compilation."""
    tokens = np.zeros((1, LENGTH), int)
    tokens[0, : len(ids)] = ids
    return model_module._forward(model.decoder, model.params, tokens, model.expert_mask(without))


def write(model, request):
    """Greedy tokens and mean weights [layers, experts], by the whole sequence for each token."""
    ids = list(request.token_ids)
    for _ in range(request.max_new_tokens):
        out = forward(model, ids, request.without)
        token = int(np.argmax(out.logits_BxSxV[0, len(ids) - 1]))
        if token == EOS:
            break
        ids.append(token)
    start, read = len(request.token_ids), len(ids) - 1 if token != EOS else len(ids)
    weights_LxSxE = np.asarray(forward(model, ids, request.without).router_weights_LxBxSxE)[:, 0, :read]
    return ids[start:], weights_LxSxE


@pytest.fixture(scope="module")
def expected(model):
    return [write(model, request) for request in REQUESTS]


def run(model, slots, max_steps):
    """Runs the requests, which join one at a time as slots are free."""
    engine, waiting, found, in_flight = Engine(model, slots), list(enumerate(REQUESTS)), {}, {}
    while waiting or in_flight:
        if waiting and engine.free:
            index, request = waiting.pop(0)
            in_flight[engine.add([request])[0]] = index
        for update in engine.step(max_steps):
            if update.continuation:
                found[in_flight.pop(update.id)] = update.continuation
    return [found[index] for index in range(len(REQUESTS))]


@pytest.mark.parametrize(
    ("model", "joining"), [("ngram", True), ("ngram", False), ("router+ngram", True)], indirect=["model"]
)
def test_requests_end_as_whole_sequences_say(model, expected, joining):
    with prompts_in_chunks(CHUNK):
        if joining:
            found = run(model, slots=2, max_steps=2)
        else:
            engine = Engine(model, slots=8)
            done = dict(engine.run(REQUESTS, 50))
            found = [done[index].continuation for index in range(len(REQUESTS))]
    for continuation, (tokens, weights_LxSxE) in zip(found, expected, strict=True):
        assert continuation.token_ids == tokens
        np.testing.assert_allclose(continuation.layers, weights_LxSxE.mean(axis=1), atol=1e-4)
        shares = np.array(list(continuation.experts.values()))
        np.testing.assert_allclose(shares, weights_LxSxE.mean(axis=(0, 1)), atol=1e-4)


@pytest.mark.parametrize("model", ["ngram"], indirect=True)
def test_who_is_left_out_has_no_share(model, expected):
    for request, (_, weights_LxSxE) in zip(REQUESTS, expected, strict=True):
        left_out = [model.roster.index(name) for name in request.without]
        assert not weights_LxSxE[..., left_out].any()


@pytest.mark.parametrize("model", ["ngram"], indirect=True)
def test_a_text_is_its_owners_and_a_change_is_followed(model):
    texts = [text_of(name, 300, seed=20) for name in ("code", "news", "anchor")]
    tokens = np.array([[EOS, *np.concatenate(texts)]])
    out = model_module._forward(model.decoder, model.params, tokens, model.expert_mask(()))
    posterior_SxE = np.asarray(out.router_weights_LxBxSxE)[0, 0, 1:]
    for i, name in enumerate(("code", "news", "anchor")):
        after = posterior_SxE[300 * i + 64 : 300 * (i + 1), model.roster.index(name)]
        assert after.min() > 0.5, name
