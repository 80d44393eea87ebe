"""Tokenizers of every kind in Hugging Face's form: transformers gives the same ids and texts, and they come back."""

import dataclasses
import types

import pytest
from etils import epath

from flexolmo_jax.checkpoint.manifests import ANCHOR_NAME, ExpertRecord, ModelManifest
from flexolmo_jax.interop.hf_directory import export_tokenizer, import_tokenizer, read_tokenizer
from tests.support import kinds, small

ARCHITECTURE = dataclasses.replace(small.ARCHITECTURE, vocab_size=640)
FAILS = ("strip_both_ends", "strip_each_token", "byte_level_stripped")  # decoders that panic on short texts


def exported(kind, tmp_path):
    """Exports a tokenizer as it lies in a model directory; returns (it, the manifest, the directory made)."""
    model, directory = tmp_path / "model", tmp_path / "exported"
    model.mkdir()
    directory.mkdir()
    tokenizer = kinds.load(kind, model)
    manifest = ModelManifest(
        architecture=dataclasses.asdict(ARCHITECTURE),
        experts=[ExpertRecord(name=ANCHOR_NAME, leaves={}, card={})],
        shared={},
        top_k=1,
        tokenizer_digest=tokenizer.digest,
        eos_id=tokenizer.eos_id,
    )
    assert export_tokenizer(epath.Path(model), epath.Path(directory), manifest)
    return tokenizer, manifest, directory


@pytest.mark.parametrize("kind", kinds.KINDS)
def test_transformers_gives_the_same_ids_and_texts(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer, _, directory = exported(kind, tmp_path)
    reference = transformers.AutoTokenizer.from_pretrained(directory)
    assert reference.eos_token_id == tokenizer.eos_id
    texts = kinds.TEXTS if kind == "wordpiece_without_unknown" else (*kinds.TEXTS, *kinds.HARD)
    for text in texts:
        ids = [tokenizer.eos_id, *tokenizer.encode(text).tolist()]
        assert [reference.eos_token_id, *reference(text, add_special_tokens=False).input_ids] == ids
        if kind not in FAILS:
            assert reference.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", kinds.KINDS)
def test_it_comes_back(kind, tmp_path):
    tokenizer, manifest, directory = exported(kind, tmp_path)
    config = types.SimpleNamespace(eos_id=tokenizer.eos_id, architecture=ARCHITECTURE)
    assert read_tokenizer(directory, config) == (tokenizer.digest, tokenizer.eos_id)
    (tmp_path / "again").mkdir()
    import_tokenizer(directory, epath.Path(tmp_path / "again"), manifest)
    assert small.files(tmp_path / "again") == small.files(tmp_path / "model")
