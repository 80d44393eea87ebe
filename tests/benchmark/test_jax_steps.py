"""The steps of this program: a training step trains its leaves alone, and decoding writes half of each sequence."""

import numpy as np
import pytest

from configs import benchmark as config_file
from flexolmo_jax.benchmark.jax_steps import Decoding, TrainStep
from flexolmo_jax.benchmark.run import prepared
from flexolmo_jax.benchmark.worker import Spec
from flexolmo_jax.model.flops import decode_step_bytes

SIZES = {
    "model.num_layers": 1,
    "model.d_model": 32,
    "model.num_heads": 2,
    "model.num_kv_heads": 2,
    "model.d_ff": 24,
    "data.sequence_length": 16,
    "data.batch_size": 8,
    "data.grad_accum_steps": 1,
    "compute.frozen_dtype": "bfloat16",
}
# Paths that a step trains. The bias of a fresh expert is 0, where |b| has no gradient.
TRAINED = {
    "anchor": lambda path: not path.endswith(("/router/weight", "/router/bias")),
    "solo": lambda path: "/expert/" in path and "router" not in path,
    "pair": lambda path: "/expert/" in path,
    "joint": lambda path: True,
    "router": lambda path: path.endswith(("/router/weight", "/router/bias")),
}


def spec(step, **overrides):
    config = config_file.get_config("64")
    config.update_from_flattened_dict({**SIZES, **overrides})
    return Spec("flexolmo", step, prepared(config, step))


@pytest.mark.parametrize("step", TRAINED)
def test_a_step_trains_the_leaves_of_its_kind(step):
    subject = TrainStep(spec(step))
    assert subject.build()["tokens"] == 8 * 16
    trainable, frozen = subject._state.trainable, subject._frozen
    assert all(map(TRAINED[step], trainable))
    assert not any(map(TRAINED[step], frozen))
    assert {leaf.dtype.name for leaf in trainable.values()} == {"float32"}
    # What an expert ships is float32, though frozen.
    assert {leaf.dtype.name for path, leaf in frozen.items() if "/expert/" not in path} <= {"bfloat16"}
    before = {path: np.array(leaf) for path, leaf in trainable.items()}
    for _ in range(2):
        subject.step()
    subject.wait()
    assert int(subject._state.step) == 2
    still = {path for path, leaf in subject._state.trainable.items() if np.array_equal(leaf, before[path])}
    assert all(path.endswith("/router/bias") for path in still)


@pytest.fixture(scope="module")
def decoding():
    subject = Decoding(spec("decode", **{"data.batch_size": 2}))
    return subject, subject.build()


def test_decoding_writes_half_of_each_sequence(decoding, monkeypatch):
    subject, built = decoding
    assert built["tokens"] == 2 * 8
    written = []
    started = subject._started

    def watched():
        engine = started()
        step = engine.step
        engine.step = lambda count: written.extend(len(update.token_ids) for update in step(count))
        return engine

    monkeypatch.setattr(subject, "_started", watched)
    subject.step()
    assert written == [8] * 2
    written.clear()
    assert subject.token() > 0
    assert written == [2] * 2 + [6] * 2


def test_a_model_with_a_selector_decodes_with_more_than_one_expert():
    overrides = {"data.batch_size": 2, "moe.num_experts": 6, "moe.top_k": 1}
    subject = Decoding(spec("decode", **overrides)._replace(selection="ngram"))
    assert subject.build()["experts"] == 6
    engine = subject._started()
    engine.step(7)
    assert engine._state is not None
    posterior_BxTxLxE = np.asarray(engine._state.routing_BxTxLxE[:, :14])  # of the tokens that were read
    assert len(np.unique(posterior_BxTxLxE.argmax(-1))) > 2
    np.testing.assert_allclose(posterior_BxTxLxE.sum(-1), 1, rtol=1e-5)


def test_decoding_counts_the_positions_that_timed_tokens_see(decoding):
    subject, built = decoding
    # The last six of eight new tokens are timed: they see 13 positions on average.
    decoder, params = subject._model.decoder, subject._model.params
    assert built["bytes"] == decode_step_bytes(decoder.architecture, decoder.layout, params, 2, 13.0)
