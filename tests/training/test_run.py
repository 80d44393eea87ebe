"""What a run refuses before it reads a weight: each time one line, which names the key."""

import re

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models

from flexolmo_jax.data.corpus import open_corpora
from flexolmo_jax.data.tokenization.tokenizer import Tokenizer, byte_tokenizer
from flexolmo_jax.errors import UserError
from flexolmo_jax.model.architecture import ANCHOR, PAIR
from flexolmo_jax.training.run import build_model, read_run
from tests.support import runs, small


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of a corpus and another with another tokenizer, an anchor, and a merge of it."""
    root = tmp_path_factory.mktemp("inputs")
    small.corpus(root / "corpus")
    backend = Backend(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    backend.add_special_tokens(["<|endoftext|>"])
    small.corpus(root / "foreign", tokenizer=Tokenizer(backend, eos_id=2))
    small.anchor(root / "anchor")
    small.contribution(root / "news", root / "anchor", seed=1)
    small.flexolmo("merge", f"--anchor={root}/anchor", f"--contribution={root}/news", f"--out={root}/merged")
    return root


def make(folder, name, **values):
    """A configuration whose values name directories of `folder` as {…}."""
    values = {key: value.format(folder) if isinstance(value, str) else value for key, value in values.items()}
    return runs.make_config(name, **{"data__train": f"{folder}/corpus", **values})


EXPERT = {"start_from": "{}/anchor", "expert": "news", "data__public": "{}/corpus"}
ANCHOR_REFUSALS = {
    "compute.dtype": ("float16", "must be one of float32, bfloat16"),
    "compute.frozen_dtype": ("int8", "must be one of float32, bfloat16"),
    "compute.attention": ("splash", "has kernels for tpu, and the devices are cpu"),
    "compute.dispatch": ("mosaic", "has kernels for hopper, and the devices are cpu"),
    "compute.remat": ("some", "must be one of none, dots, feed_forward, kernels, full"),
    "optimizer.schedule": ("linear", "must be one of cosine, wsd"),
    "data.sequence_length": (0, "must be at least 1"),
    "data.batch_size": (0, "must be at least 1"),
    "data.grad_accum_steps": (0, "must be at least 1"),
    "compute.unroll": (0, "must be at least 1"),
    "checkpoint.every": (0, "must be at least 1"),
    "checkpoint.keep": (0, "must be at least 1"),
    "log.every": (0, "must be at least 1"),
    "evaluation.every": (-1, "must be at least 0"),
    "evaluation.batches": (-1, "must be at least 0"),
    "publish.public_documents": (-1, "must be at least 0"),
    "publish.epsilon": (-1.0, "must be"),
    "publish.delta": (0.5, "must be"),
    "publish.clip": (0.0, "must be"),
    "seed": (-1, "must be at least 0"),
    "steps": (0, "must be at least 1"),
    "optimizer.no_decay": (("(bias",), "is not a regular expression"),
    "data.train": ("", "give a corpus directory"),
    "data.public_share": (1.0, "must be at least 0 and below 1"),
    "data.packing": ("first_fit", "must be one of concatenate, best_fit"),
    "data.prefetch": (-1, "must be at least 0"),
    "data.max_epochs": (1.5, "train has "),
    "data.phases": (((2, (("train", 1.0),)),), "needs config.data.mixture"),
    "data.mixture": ((("news", "corpus"),), "must hold triples"),
    "model.vocab_size": (256, "below the 257 of the tokenizer"),
    "partition": ((("embedding", "frozen"),), "no pattern matches the leaf"),
    "sharding_rules": (("batch",), "must hold pairs"),
}
OTHER_REFUSALS = {
    "micro-batches that do not divide": ("anchor", {"data__grad_accum_steps": 3}, "grad_accum_steps=3: must divide"),
    "no public data": ("pair", EXPERT | {"data__public": ""}, "give config.data.public=DIR, or a share of 0"),
    "an upper-case name": ("pair", EXPERT | {"expert": "News"}, "config.expert=News"),
    "the anchor's name": ("pair", EXPERT | {"expert": "anchor"}, "config.expert=anchor"),
    "an expert of nothing": (
        "pair",
        EXPERT | {"start_from": ""},
        "config.start_from: empty; an expert starts from an",
    ),
    "an expert of a merge": ("pair", EXPERT | {"start_from": "{}/merged"}, "config.start_from=.*merged model"),
    "an expert that trains the anchor": (
        "pair",
        EXPERT | {"partition": ((".*", "trainable"),)},
        "config.partition: trains blocks/.*freeze the rest",
    ),
    "a size of 0": ("anchor", {"model__num_layers": 0}, "num_layers is 0"),
    "a start that is no model": (
        "anchor",
        {"start_from": "{}/corpus"},
        "^.*/corpus: is a corpus directory; give a model",
    ),
    "a mixture beside data": ("anchor", {"data__mixture": (("a", "x", 1.0),)}, "config.data.train=.*give one of them"),
    "a source without a corpus": (
        "anchor",
        {"data__train": "", "data__mixture": (("a", "", 1.0),)},
        "mixture: a: empty",
    ),
    "two sources of a name": (
        "anchor",
        {"data__train": "", "data__mixture": (("a", "x", 1.0), ("a", "y", 1.0))},
        "config.data.mixture=.*'a' .*name each source differently",
    ),
    "a negative weight": (
        "anchor",
        {"data__train": "", "data__mixture": (("a", "x", 1.0), ("b", "y", -1.0))},
        r"config.data.mixture=\[1.0, -1.0\]: weights must be finite, at least 0",
    ),
    "a phase of an unknown source": (
        "anchor",
        {"data__train": "", "data__mixture": (("a", "x", 1.0),), "data__phases": ((5, (("b", 1.0),)),)},
        "config.data.phases=.*step 5: 'b' is not in config.data.mixture",
    ),
    "phases out of order": (
        "anchor",
        {
            "data__train": "",
            "data__mixture": (("a", "x", 1.0),),
            "data__phases": ((5, (("a", 1.0),)), (3, (("a", 1.0),))),
        },
        "config.data.phases=.*begins with step 3",
    ),
    "a phase without weights": (
        "anchor",
        {"data__train": "", "data__mixture": (("a", "x", 1.0),), "data__phases": ((5, (("a", 0.0),)),)},
        "config.data.phases=.*not all 0",
    ),
    "no such corpus": ("anchor", {"data__train": "{}/none"}, "none: no such directory"),
    "no such held-out corpus": ("anchor", {"evaluation__data": "{}/none"}, "none: no such directory"),
    "a held-out corpus of another tokenizer": (
        "anchor",
        {"evaluation__data": "{}/foreign"},
        "foreign: its tokenizer is not that of .*/corpus",
    ),
    "public data of another tokenizer": (
        "pair",
        EXPERT | {"data__public": "{}/foreign"},
        "foreign: its tokenizer is not that of config.start_from=.*/anchor",
    ),
    "a corpus of another tokenizer than the start's": (
        "router",
        {"start_from": "{}/merged", "data__train": "{}/foreign"},
        "foreign: its tokenizer is not that of config.start_from=.*/merged",
    ),
}


def refusal(config):
    with pytest.raises(UserError) as caught:
        read_run(config)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("key", ANCHOR_REFUSALS)
def test_a_value_that_makes_no_sense_is_refused_by_its_key(folder, key):
    value, reason = ANCHOR_REFUSALS[key]
    message = refusal(make(folder, "anchor", **{key.replace(".", "__"): value}))
    assert message.startswith(f"config.{key}")
    assert reason in message


@pytest.mark.parametrize("case", OTHER_REFUSALS)
def test_it_refuses(folder, case):
    name, values, pattern = OTHER_REFUSALS[case]
    assert re.search(pattern, refusal(make(folder, name, **values)))


def test_the_start_brings_the_architecture_and_its_roster(folder):
    fresh = read_run(make(folder, "anchor"))
    assert (fresh.start, fresh.publication.roster, fresh.program.model.layout) == (None, ["anchor"], ANCHOR)
    assert fresh.program.model.architecture.d_model == runs.TINY["model.d_model"]

    expert = read_run(make(folder, "pair", **EXPERT))
    assert expert.program.model.architecture == small.ARCHITECTURE
    assert (expert.program.model.layout, expert.roster) == (PAIR, ["anchor", "expert"])
    assert all(path.startswith("blocks/moe/expert/") for path in expert.program.trainable)

    router = read_run(make(folder, "router", start_from="{}/merged"))
    assert router.publication.roster == ["anchor", "news"]
    assert router.program.model.layout.num_experts == 2
    assert router.program.trainable == set(small.ROUTER)


def test_shares_of_sequences_go_to_own_and_public_data(folder):
    config = make(folder, "pair", **EXPERT | {"data__public_share": 0.25})
    config.data.train = f"{folder}/corpus, {folder}/corpus,"
    data = read_run(config).data
    assert [(source.label, len(source.corpora)) for source in data.sources] == [("train", 2), ("public", 1)]
    assert data.mixture.counts(1000) == [750, 250]
    assert data.corpora == data.sources[0].corpora


def mixed(folder, **values):
    mixture = (("a", f"{folder}/corpus", 3.0), ("b", f"{folder}/corpus,{folder}/corpus", 0.0))
    values = {"data__train": "", "data__mixture": mixture, "steps": 20, "data__batch_size": 8} | values
    return make(folder, "anchor", **values)


def test_phases_change_the_weights_from_a_step_on(folder):
    data = read_run(mixed(folder, data__phases=((11, (("b", 1.0), ("a", 3.0))), (16, (("b", 2.0),))))).data
    assert [(source.label, len(source.corpora)) for source in data.sources] == [("a", 1), ("b", 2)]
    counts = [data.mixture.counts(8 * steps) for steps in (10, 15, 20)]
    assert counts == [[80, 0], [80 + 30, 10], [80 + 30, 10 + 40]]
    assert data.corpora == data.training


def test_public_data_has_its_share_of_every_phase(folder):
    phases = ((11, (("b", 1.0),)),)
    values = {"data__public": f"{folder}/corpus", "data__public_share": 0.2, "data__phases": phases}
    data = read_run(mixed(folder, **values)).data
    assert [data.mixture.counts(8 * steps) for steps in (10, 20)] == [[64, 0, 16], [64, 64, 32]]
    assert data.corpora == data.training[:-1]


def test_a_source_may_not_be_repeated_more_often_than_allowed(folder):
    tokens = open_corpora([f"{folder}/corpus"])["corpus"].tokens
    length = tokens // 8
    values = {"data__sequence_length": length, "data__batch_size": 8, "steps": 20}
    assert read_run(make(folder, "anchor", **values, data__max_epochs=20.0))
    message = refusal(make(folder, "anchor", **values, data__max_epochs=19.0))
    taken = 20 * 8 * length
    assert message.startswith(f"config.data.max_epochs=19.0: train has {tokens:,} tokens, and the 20 steps would take")
    assert f"{taken:,}, {taken / tokens:.2f} epochs" in message


def test_the_sample_that_came_with_the_start_is_the_public_data(folder, tmp_path):
    small.anchor(tmp_path / "anchor")
    small.corpus(tmp_path / "anchor" / "public", texts=("one", "two"))
    config = make(folder, "pair", **EXPERT | {"start_from": f"{tmp_path}/anchor", "data__public": ""})
    assert read_run(config).data.sources[1].corpora[0].documents == 2


def test_computation_is_as_configured(folder):
    values = {"compute__dtype": "bfloat16", "compute__remat": "full", "compute__unroll": 2}
    compute = build_model(make(folder, "anchor", **values))[0].compute
    assert (compute.dtype, compute.remat, compute.unroll) == ("bfloat16", "full", 2)


def test_corpora_are_labelled_by_what_tells_them_apart(folder, tmp_path, monkeypatch):
    for name in ("a/train", "a/test", "b/test"):
        small.corpus(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert list(open_corpora([f"{tmp_path}/a/test/"])) == ["test"]
    assert list(open_corpora(["a/test", "a/train"])) == ["test", "train"]
    assert list(open_corpora(["a/test", f"{tmp_path}/b/test"])) == ["a/test", "b/test"]
    assert open_corpora([]) == {}


def test_the_tokenizers_of_the_tests_differ(folder):
    foreign = open_corpora([f"{folder}/foreign"])["foreign"]
    assert foreign.tokenizer_digest != byte_tokenizer().digest


def test_values_of_a_notebook_raise_what_python_programs_expect(folder):
    with pytest.raises(TypeError, match="config: a dict; give a ConfigDict"):
        read_run({"steps": 1})
    with pytest.raises(ValueError, match=r"config\.steps=0: must be at least 1"):
        read_run(make(folder, "anchor", steps=0))
    config = make(folder, "anchor")
    with config.unlocked():
        config.data.sequnce_length = 8
    with pytest.raises(ValueError, match=r"config\.data\.sequnce_length=8: no such key"):
        read_run(config)
    with config.unlocked():
        del config.data["sequnce_length"], config.data["batch_size"]
    with pytest.raises(ValueError, match=r"config\.data\.batch_size=None: is missing"):
        read_run(config)
