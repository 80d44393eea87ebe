"""What a finished run leaves behind: a contribution, or a model directory."""

import dataclasses
from collections.abc import Mapping, Set
from typing import Any

import numpy as np
import tensorstore as ts
from etils import epath
from ml_collections import ConfigDict

from flexolmo_jax.checkpoint.manifests import (
    ANCHOR_NAME,
    MOE,
    ContributionManifest,
    ExpertRecord,
    ModelManifest,
    digest_name,
)
from flexolmo_jax.checkpoint.model_directory import (
    PUBLIC,
    TOKENIZER_FILE,
    TOKENIZER_FOLDER,
    copy_files,
    open_merged_router,
    open_params,
    open_statistics,
    split_experts,
    write_contribution,
    write_model,
)
from flexolmo_jax.checkpoint.params import Slice
from flexolmo_jax.data.corpus import Corpus, copy_documents
from flexolmo_jax.training.inputs import EXPERT, Inputs
from flexolmo_jax.training.state import start_leaf
from flexolmo_jax.training.step import Leaves


def publish(product: epath.Path, config: ConfigDict, inputs: Inputs, leaves: Leaves) -> epath.Path:
    """Writes the product of a run, whole or not at all, and returns its directory.

    A trained leaf is rounded to the dtype of the leaf that it started from, an expert's to that of the anchor's
    (docs/formats.md). A frozen leaf may be held in a shorter dtype than its source, so it is copied from there.

    Raises:
      UserError: a trained leaf is not finite, or too large for its dtype; or the start has changed since.
    """
    stored = open_params(config.start_from) if inputs.manifest else {}
    if config.expert:
        own = {path: leaf for path, leaf in leaves.items() if path.startswith(EXPERT)}
        return _write_contribution(product, config, inputs, own, stored)
    frozen = {path: (stored or leaves)[path] for path in leaves.keys() - inputs.trainable}
    return _write_model(product, config, inputs, {path: leaves[path] for path in inputs.trainable} | frozen, stored)


def data_card(config: ConfigDict, inputs: Inputs) -> dict[str, Any]:
    """What the weights say of their data: the owner's words, counts, and how long they were trained on it."""
    own = inputs.corpora[0][0]
    return {
        **config.card.to_dict(),
        "documents": sum(corpus.documents for corpus in own),
        "tokens": sum(corpus.tokens for corpus in own),
        "sequence_length": config.data.sequence_length,
        # Of all sequences, public ones included.
        "trained_tokens": config.steps * config.data.batch_size * config.data.sequence_length,
        "public_share": config.data.public_share,
    }


def _write_contribution(
    product: epath.Path, config: ConfigDict, inputs: Inputs, tree: Leaves, stored: Mapping[str, ts.TensorStore]
) -> epath.Path:
    slices = {}
    for path, leaf in sorted(tree.items()):
        dtype = stored[start_leaf(path)].dtype.numpy_dtype
        slices[digest_name(path)] = Slice(leaf, None, f"the trained leaf {path}").as_dtype(dtype)
    manifest = ContributionManifest(
        name=config.expert,
        anchor_digest=inputs.manifest.anchor_digest,
        architecture=inputs.manifest.architecture,
        card=data_card(config, inputs),
        leaves={},
    )
    write_contribution(product, manifest, slices)
    return product


def _write_model(
    product: epath.Path,
    config: ConfigDict,
    inputs: Inputs,
    tree: Mapping[str, Any],
    stored: Mapping[str, ts.TensorStore],
) -> epath.Path:
    """Writes a model of the leaves in `tree`; `stored` are those it started from, none where they were fresh."""
    dtypes = {path: leaf.dtype.numpy_dtype for path, leaf in stored.items()}
    before, corpus = inputs.manifest, inputs.corpora[0][0][0]
    if before:
        manifest = _without_leaves(before, inputs.trainable)
        if len(before.experts) > 1:
            trained = inputs.trainable | set(before.tuned.leaves if before.tuned else ())
            manifest = manifest.but(tuned=before.tuned_in(trained, data_card(config, inputs)))
    else:
        manifest = ModelManifest(
            architecture=dataclasses.asdict(inputs.model.architecture),
            experts=[ExpertRecord(name=ANCHOR_NAME, leaves={}, card=data_card(config, inputs))],
            shared={},
            top_k=1,
            tokenizer_digest=corpus.tokenizer_digest,
            eos_id=corpus.eos_id,
        )

    def complete(directory: epath.Path, written: ModelManifest) -> None:
        (corpus.path / TOKENIZER_FILE).copy(directory / TOKENIZER_FILE)
        if before:
            copy_files(epath.Path(config.start_from) / TOKENIZER_FOLDER, directory / TOKENIZER_FOLDER)
        if config.publish.public_documents:
            _publish_sample(config, corpus, directory / PUBLIC)

    shared, experts = split_experts(tree, inputs.roster, "the trained model", dtypes)
    write_model(
        product,
        manifest,
        shared,
        experts,
        statistics=open_statistics(config.start_from, before) if before else None,
        merged_router=open_merged_router(config.start_from, before) if before else None,
        complete=complete,
    )
    return product


def _without_leaves(manifest: ModelManifest, trained: Set[str]) -> ModelManifest:
    """The manifest before trained leaves are written: it names neither digests nor casts of them."""
    own = {digest_name(path) for path in trained if path.startswith(MOE)}

    def rest(values: Mapping[str, Any], leaves: Set[str]) -> dict[str, Any]:
        return {leaf: value for leaf, value in values.items() if leaf not in leaves}

    experts = [e.but(leaves=rest(e.leaves, own), casts=rest(e.casts, own)) for e in manifest.experts]
    return manifest.but(experts=experts, shared=rest(manifest.shared, trained), casts=rest(manifest.casts, trained))


def _publish_sample(config: ConfigDict, corpus: Corpus, out: epath.Path) -> None:
    """Ships some of the public documents with the anchor, so that owners can mix them in."""
    count = min(config.publish.public_documents, len(corpus))
    chosen = np.random.default_rng(config.seed).choice(len(corpus), count, replace=False)
    copy_documents(corpus, sorted(chosen.tolist()), out)
