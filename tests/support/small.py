"""Tiny corpora, anchors, contributions and models with random weights, written as the project writes them.

Nothing here trains or compiles. `flexolmo` runs a command line in this process.
"""

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import pathlib
import sys
from typing import NamedTuple
from unittest import mock

import numpy as np
from absl.testing import flagsaver
from etils import epath

from flexolmo_jax import cli
from flexolmo_jax.checkpoint import manifests
from flexolmo_jax.checkpoint.digests import document_digest
from flexolmo_jax.checkpoint.model_directory import (
    TOKENIZER_FILE,
    open_params,
    read_model,
    split_experts,
    write_contribution,
    write_model,
)
from flexolmo_jax.checkpoint.params import Slice, read_block
from flexolmo_jax.data.corpus import Corpus
from flexolmo_jax.data.corpus_writer import write_corpus
from flexolmo_jax.data.tokenization.tokenizer import byte_tokenizer
from flexolmo_jax.model.architecture import ANCHOR, Architecture
from flexolmo_jax.model.decoder import Decoder
from flexolmo_jax.model.selectors import BUCKETS
from flexolmo_jax.training.publish import Publication, publish
from flexolmo_jax.training.state import Start

ARCHITECTURE = Architecture(
    vocab_size=260, num_layers=2, d_model=16, num_heads=2, num_kv_heads=1, d_ff=24, rope_theta=10_000.0, norm_eps=1e-6
)
TEXTS = ("the first document", "a second one", "naïve", "and the last of them, which is longer than a pen")
ROUTER = tuple(f"{manifests.MOE}experts/router/{leaf}" for leaf in ("weight", "bias"))


class Result(NamedTuple):
    """What a run of the command line left: exit status, standard output and standard error."""

    status: int
    out: str
    err: str


def flexolmo(*arguments):
    """Runs the command line in this process, as if it were the first time; returns a `Result`."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    commands = [f"{cli.__name__}.{command.replace('-', '_')}" for command in cli.COMMANDS]
    for module in (*commands, "config_config"):  # the last is what ml_collections makes of --config=FILE
        sys.modules.pop(module, None)
    arguments = [str(argument) for argument in arguments]
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        flagsaver.flagsaver(),  # commands define their flags when imported; it forgets them again
        mock.patch.object(sys, "argv", ["flexolmo", *arguments]),  # where ml_collections looks for overrides
    ):
        try:
            cli.main(arguments)
        except SystemExit as exit_:
            status = exit_.code
    return Result(status, out.getvalue(), err.getvalue())


def with_defaults(arguments, *defaults):
    """These arguments, and the defaults of the flags that are not among them."""
    named = {flag.partition("=")[0] for flag in arguments}
    return [*arguments, *(flag for flag in defaults if flag.partition("=")[0] not in named)]


def assert_refused(result, command, *words):
    """Exit status 2, and one line on standard error that begins with the command and holds all the words."""
    assert result.status == 2, result
    assert result.out == ""
    assert result.err.startswith(f"flexolmo {command}: ")
    assert result.err.count("\n") == 1
    assert result.err.endswith("\n")
    assert "Traceback" not in result.err
    for word in words:
        assert str(word) in result.err


def corpus(path, texts=TEXTS, tokenizer=None):
    """Writes a corpus of bytes; returns its directory."""
    write_corpus(path, texts, tokenizer or byte_tokenizer())
    return path


@functools.cache
def shapes(architecture=ARCHITECTURE, layout=ANCHOR):
    """{path: shape} of a model's leaves."""
    return {path: leaf.shape for path, leaf in Decoder(architecture, layout).abstract().items()}


def random_leaves(seed, architecture=ARCHITECTURE, dtype=np.float32):
    """{path: array} of an anchor: norm scales about 1, all else spread widely enough that logits differ."""
    rng = np.random.default_rng(seed)
    return {
        path: (path.endswith("scale") + 0.3 * rng.standard_normal(shape)).astype(dtype)
        for path, shape in shapes(architecture).items()
    }


def anchor(path, seed=0, architecture=ARCHITECTURE, leaves=None, statistics=None):
    """Writes an anchor; returns its directory."""
    leaves = random_leaves(seed, architecture) if leaves is None else leaves
    shared, experts = split_experts(leaves, [manifests.ANCHOR_NAME], "the test")
    manifest = manifests.ModelManifest(
        architecture=dataclasses.asdict(architecture),
        experts=[manifests.ExpertRecord(name=manifests.ANCHOR_NAME, leaves={}, card={"tokens": 1000})],
        shared={},
        top_k=1,
        tokenizer_digest=byte_tokenizer().digest,
        eos_id=byte_tokenizer().eos_id,
    )
    statistics = {manifests.ANCHOR_NAME: slices(statistics or {})}
    write_model(path, manifest, shared, experts, statistics=statistics, complete=save_tokenizer)
    return path


def save_tokenizer(directory, manifest):
    """Saves the tokenizer of bytes into a model directory that is being written."""
    byte_tokenizer().save(directory / TOKENIZER_FILE)


def ngram_statistics(seed, documents=5):
    """{leaf: array} of an owner's text, random, for the selector "ngram"; every bucket occurs, for short texts."""
    counts = np.random.default_rng(seed).geometric(0.02, BUCKETS)
    return {"ngram/counts": counts, "ngram/documents": np.array(documents)}


def slices(leaves):
    """{leaf: array} as what is to be written."""
    return {leaf: Slice(array, None, leaf) for leaf, array in leaves.items()}


def expert_leaves(anchor_path, seed=None):
    """{leaf: array} of an expert of that anchor: random, or the anchor's own where there is no seed."""
    leaves = {
        manifests.digest_name(path): leaf
        for path, leaf in read_params(anchor_path).items()
        if path.startswith(manifests.MOE)
    }
    if seed is None:
        return leaves
    rng = np.random.default_rng(seed)
    return {leaf: (0.3 * rng.standard_normal(x.shape)).astype(x.dtype) for leaf, x in sorted(leaves.items())}


def contribution(path, anchor_path, name=None, seed=None, leaves=None, statistics=None, card=None):
    """Writes a contribution for that anchor; returns its directory."""
    name = epath.Path(path).name if name is None else name
    leaves = expert_leaves(anchor_path, seed) if leaves is None else leaves
    before = read_model(anchor_path)
    manifest = manifests.ContributionManifest(
        name=name,
        anchor_digest=before.anchor_digest,
        architecture=before.architecture,
        card={"description": f"data of {name}", "license": "none", "tokens": 10, "trained_tokens": 20} | (card or {}),
        leaves={},
    )
    write_contribution(path, manifest, slices(leaves), statistics=slices(statistics or {}))
    return path


def reseal(file, change=lambda document: None):
    """Changes a manifest (the function may return another) and gives it, and the owners' in it, matching digests."""
    document = json.loads(file.read_text())
    document = change(document) or document
    for record in document.get("experts", []) if isinstance(document.get("experts"), list) else []:
        if isinstance(record, dict) and isinstance(record.get("contribution"), dict):
            record["contribution"]["digest"] = document_digest(record["contribution"])
    document["digest"] = document_digest(document)
    file.write_text(json.dumps(document))


def tuned(path, model, corpus_path, leaves=ROUTER, seed=9):
    """Publishes `model` as a run that trained `leaves` of it would: with random values there; returns `path`."""
    manifest, data = read_model(model), Corpus.open(corpus_path)
    publication = Publication(
        expert="",
        card={"description": "", "license": "", "documents": data.documents, "tokens": data.tokens},
        start=Start(epath.Path(model), manifest),
        architecture=ARCHITECTURE,
        roster=manifest.roster,
        trainable=frozenset(leaves),
        corpora=[data],
        selector="",
        privacy=None,
        public_documents=0,
        seed=0,
    )
    rng = np.random.default_rng(seed)
    values = read_params(model)
    for leaf in sorted(leaves):
        values[leaf] = np.asarray(0.3 * rng.standard_normal(values[leaf].shape), np.float32)
    publish(epath.Path(path), values, publication)
    return path


def read_params(directory):
    """{path: array} of a model or a contribution."""
    stored = open_params(directory)
    return {path: read_block(leaf, (slice(None),) * len(leaf.shape), path) for path, leaf in stored.items()}


def assert_same_leaves(found, expected):
    """Two {path: array} have the same paths, dtypes, shapes and bytes."""
    assert found.keys() == expected.keys()
    for path, leaf in expected.items():
        assert (found[path].dtype, found[path].shape) == (leaf.dtype, leaf.shape), path
        assert found[path].tobytes() == leaf.tobytes(), path


def files(directory):
    """{relative path: SHA-256 of the file} of everything in a directory."""
    root = pathlib.Path(directory)
    return {
        str(file.relative_to(root)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(root.rglob("*"))
        if file.is_file()
    }
