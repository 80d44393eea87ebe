"""What a finished run leaves behind: a contribution, or a model directory."""

import dataclasses
from collections.abc import Mapping, Set
from typing import Any, NamedTuple

import numpy as np
import tensorstore as ts
from etils import epath

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
from flexolmo_jax.model.architecture import Architecture
from flexolmo_jax.training.state import EXPERT, Start, start_leaf
from flexolmo_jax.training.step import Leaves


class Publication(NamedTuple):
    """What the output of a run holds beside its trained leaves.

    Attributes:
      expert: name of the expert, for a contribution; "" for a model.
      card: what the weights say of their data.
      start: the model that the run started from, if any.
      architecture: of the model.
      roster: experts in the order of the router's logits.
      trainable: paths of the trained leaves.
      corpus: brings the tokenizer, and the documents of a public sample.
      public_documents: how many documents the sample has.
      seed: of the choice of these.
    """

    expert: str
    card: dict[str, Any]
    start: Start | None
    architecture: Architecture
    roster: list[str]
    trainable: frozenset[str]
    corpus: Corpus
    public_documents: int
    seed: int


def publish(output: epath.Path, leaves: Leaves, publication: Publication) -> epath.Path:
    """Writes the output of a run, whole or not at all, and returns its directory.

    A trained leaf is rounded to the dtype of the leaf that it started from, an expert's to that of the anchor's
    (docs/formats.md). A frozen leaf may be held in a shorter dtype than its source, so it is copied from there.

    Raises:
      UserError: a trained leaf is not finite, or too large for its dtype; or the start has changed since.
    """
    start = publication.start
    stored = open_params(start.path) if start else {}
    if start and publication.expert:
        expert = {path: leaf for path, leaf in leaves.items() if path.startswith(EXPERT)}
        return _write_contribution(output, expert, stored, start.manifest, publication)
    trained = {path: leaves[path] for path in publication.trainable}
    frozen = {path: (stored or leaves)[path] for path in leaves.keys() - publication.trainable}
    return _write_model(output, trained | frozen, stored, publication)


def _write_contribution(
    output: epath.Path,
    leaves: Leaves,
    stored: Mapping[str, ts.TensorStore],
    anchor: ModelManifest,
    publication: Publication,
) -> epath.Path:
    slices = {}
    for path, leaf in sorted(leaves.items()):
        dtype = stored[start_leaf(path)].dtype.numpy_dtype
        slices[digest_name(path)] = Slice(leaf, None, f"the trained leaf {path}").as_dtype(dtype)
    manifest = ContributionManifest(
        name=publication.expert,
        anchor_digest=anchor.anchor_digest,
        architecture=anchor.architecture,
        card=publication.card,
        leaves={},
    )
    write_contribution(output, manifest, slices)
    return output


def _write_model(
    output: epath.Path,
    leaves: Mapping[str, Any],
    stored: Mapping[str, ts.TensorStore],
    publication: Publication,
) -> epath.Path:
    """Writes a model of the leaves; `stored` are those that it started from, none where they were fresh."""
    dtypes = {path: leaf.dtype.numpy_dtype for path, leaf in stored.items()}
    start, corpus = publication.start, publication.corpus
    if start:
        before = start.manifest
        manifest = _without_leaves(before, publication.trainable)
        if len(before.experts) > 1:
            trained = publication.trainable | set(before.tuned.leaves if before.tuned else ())
            manifest = manifest.but(tuned=before.tuned_in(trained, publication.card))
    else:
        manifest = ModelManifest(
            architecture=dataclasses.asdict(publication.architecture),
            experts=[ExpertRecord(name=ANCHOR_NAME, leaves={}, card=publication.card)],
            shared={},
            top_k=1,
            tokenizer_digest=corpus.tokenizer_digest,
            eos_id=corpus.eos_id,
        )

    def complete(directory: epath.Path, written: ModelManifest) -> None:
        (corpus.path / TOKENIZER_FILE).copy(directory / TOKENIZER_FILE)
        if start:
            copy_files(start.path / TOKENIZER_FOLDER, directory / TOKENIZER_FOLDER)
        if publication.public_documents:
            _publish_sample(corpus, publication.public_documents, publication.seed, directory / PUBLIC)

    shared, experts = split_experts(leaves, publication.roster, "the trained model", dtypes)
    write_model(
        output,
        manifest,
        shared,
        experts,
        statistics=open_statistics(start.path, start.manifest) if start else None,
        merged_router=open_merged_router(start.path, start.manifest) if start else None,
        complete=complete,
    )
    return output


def _without_leaves(manifest: ModelManifest, trained: Set[str]) -> ModelManifest:
    """The manifest before trained leaves are written: it names neither digests nor casts of them."""
    of_experts = {digest_name(path) for path in trained if path.startswith(MOE)}

    def rest(values: Mapping[str, Any], leaves: Set[str]) -> dict[str, Any]:
        return {leaf: value for leaf, value in values.items() if leaf not in leaves}

    experts = [e.but(leaves=rest(e.leaves, of_experts), casts=rest(e.casts, of_experts)) for e in manifest.experts]
    return manifest.but(experts=experts, shared=rest(manifest.shared, trained), casts=rest(manifest.casts, trained))


def _publish_sample(corpus: Corpus, count: int, seed: int, out: epath.Path) -> None:
    """Ships some of the public documents with the anchor, so that owners can mix them in."""
    chosen = np.random.default_rng(seed).choice(len(corpus), min(count, len(corpus)), replace=False)
    copy_documents(corpus, sorted(chosen.tolist()), out)
