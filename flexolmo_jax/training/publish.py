"""What a finished run leaves behind: a contribution, or a model directory."""

import dataclasses
from collections.abc import Mapping, Set
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from flexolmo_jax import distributed
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
    split_experts,
    write_contribution,
    write_model,
)
from flexolmo_jax.checkpoint.params import Slice
from flexolmo_jax.data.corpus import Corpus
from flexolmo_jax.data.corpus_writer import copy_documents
from flexolmo_jax.model.architecture import Architecture
from flexolmo_jax.model.privacy import Privacy
from flexolmo_jax.model.selectors import SELECTORS, is_derived
from flexolmo_jax.training.state import EXPERT, Start, interpolated, start_leaf
from flexolmo_jax.training.statistics import collect_statistics
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
      corpora: those trained on, but for public ones of an owner; the first brings the tokenizer, and the documents of
        a public sample.
      selector: whose statistics of the corpora are shipped, or "".
      privacy: of these statistics; None: they are exact.
      public_documents: how many documents the sample has.
      seed: of the choice of these.
      interpolation: weight of what was trained in an expert's feed-forward; the rest is the anchor's.
    """

    expert: str
    card: dict[str, Any]
    start: Start | None
    architecture: Architecture
    roster: list[str]
    trainable: frozenset[str]
    corpora: list[Corpus]
    selector: str
    privacy: Privacy | None
    public_documents: int
    seed: int
    interpolation: float = 1.0


def publish(output: epath.Path, leaves: Leaves, publication: Publication) -> epath.Path:
    """Writes the output of a run, whole or not at all, and returns its directory.

    A trained leaf is rounded to the dtype of the leaf that it started from, an expert's to that of the anchor's
    (docs/formats.md). A frozen leaf may be held in a shorter dtype than its source, so it is copied from there.

    Raises:
      UserError: a trained leaf is not finite, or too large for its dtype; or the start has changed since.
    """
    start, corpus = publication.start, publication.corpora[0]
    manifest = _manifest(publication)
    new = leaves.keys()
    if start:
        new = {path for path in leaves if path.startswith(EXPERT)} if publication.expert else publication.trainable
    trained = {path: leaves[path] for path in sorted(new)}
    if start and publication.expert:
        trained = interpolated(trained, start, publication.interpolation)
    slices = {path: Slice(leaf, None, f"the trained leaf {path}") for path, leaf in trained.items()}
    if start:
        dtypes = {path: start.params[start_leaf(path)].dtype.numpy_dtype for path in slices}
        slices = {path: part.as_dtype(dtypes[path]) for path, part in slices.items()}

    def complete(directory: epath.Path, written: ModelManifest) -> None:
        (corpus.path / TOKENIZER_FILE).copy(directory / TOKENIZER_FILE)
        if start:
            copy_files(start.path / TOKENIZER_FOLDER, directory / TOKENIZER_FOLDER)
        if publication.public_documents:  # owners can mix them in
            count = min(len(corpus), publication.public_documents)
            chosen = np.random.default_rng(publication.seed).choice(len(corpus), count, replace=False)
            copy_documents(corpus, sorted(chosen.tolist()), directory / PUBLIC)

    statistics = (
        start.statistics if start and start.is_merged else {publication.expert or ANCHOR_NAME: _collect(publication)}
    )
    if isinstance(manifest, ContributionManifest):
        parts = {digest_name(path): part for path, part in slices.items()}
        write_contribution(output, manifest, parts, statistics=statistics[publication.expert])
        return output
    stored = {path for path in leaves if not is_derived(path)}
    frozen = {path: start.params[path] for path in stored - slices.keys()} if start else {}
    source = f"config.start_from={start.path}" if start else "fresh weights"
    shared, experts = split_experts(frozen | slices, publication.roster, source)
    write_model(
        output,
        manifest,
        shared,
        experts,
        complete=complete,
        statistics=statistics,
        merged_router=start.merged_router if start else None,
    )
    return output


def _collect(publication: Publication) -> dict[str, Slice]:
    """The statistics of the corpora that were trained on, if any are to be shipped.

    Process 0 computes and writes them; others know their shapes.
    """
    if not publication.selector:
        return {}
    collected: dict[str, Slice] = {}

    def collect() -> dict[str, tuple[list[int], str]]:
        selector, corpora = SELECTORS[publication.selector], publication.corpora
        collected.update(collect_statistics(selector, corpora, publication.architecture, publication.privacy))
        return {leaf: (list(part.shape), part.dtype.name) for leaf, part in collected.items()}

    shapes = distributed.from_primary("statistics", collect)
    return collected or {leaf: Slice(jax.ShapeDtypeStruct(*like), None, leaf) for leaf, like in shapes.items()}


def _manifest(publication: Publication) -> ContributionManifest | ModelManifest:
    """The manifest of the output before its trained leaves are written: it names neither digests nor casts of them."""
    trained, card = publication.trainable, publication.card
    if publication.start is None:
        return ModelManifest(
            architecture=dataclasses.asdict(publication.architecture),
            experts=[ExpertRecord(name=ANCHOR_NAME, leaves={}, card=card)],
            shared={},
            top_k=1,
            tokenizer_digest=publication.corpora[0].tokenizer_digest,
            eos_id=publication.corpora[0].eos_id,
        )
    before = publication.start.manifest
    if publication.expert:
        return ContributionManifest(
            name=publication.expert,
            anchor_digest=before.anchor_digest,
            architecture=before.architecture,
            card=card,
            leaves={},
        )

    def rest(values: Mapping[str, Any], leaves: Set[str]) -> dict[str, Any]:
        return {leaf: value for leaf, value in values.items() if leaf not in leaves}

    of_experts = {digest_name(path) for path in trained if path.startswith(MOE)}
    experts = [e.but(leaves=rest(e.leaves, of_experts), casts=rest(e.casts, of_experts)) for e in before.experts]
    manifest = before.but(experts=experts, shared=rest(before.shared, trained), casts=rest(before.casts, trained))
    if len(before.experts) == 1:
        return manifest
    since_merge = trained | set(before.tuned.leaves if before.tuned else ())
    return manifest.but(tuned=before.tuned_in(since_merge, card))
