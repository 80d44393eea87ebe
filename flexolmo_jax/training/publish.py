"""What a finished run leaves behind: a contribution, or a model directory."""

import dataclasses
from collections.abc import Mapping, Set
from typing import Any

import numpy as np
import tensorstore as ts
from etils import epath
from ml_collections import ConfigDict

from flexolmo_jax.checkpoint import directories
from flexolmo_jax.checkpoint.atomic import atomic_directory
from flexolmo_jax.checkpoint.roster import stored_digests
from flexolmo_jax.checkpoint.tree import Slice, write_tree
from flexolmo_jax.checkpoint.verify import check_digests, write_merged_router
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
    stored = directories.open_params(config.start_from) if inputs.manifest else {}
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
        # Of all rows, public ones included.
        "trained_tokens": config.steps * config.data.batch_size * config.data.sequence_length,
        "public_share": config.data.public_share,
    }


def _write_contribution(
    product: epath.Path, config: ConfigDict, inputs: Inputs, tree: Leaves, stored: Mapping[str, ts.TensorStore]
) -> epath.Path:
    slices = {}
    for path, leaf in sorted(tree.items()):
        dtype = stored[start_leaf(path)].dtype.numpy_dtype
        slices[directories.digest_name(path)] = Slice(leaf, None, f"the trained leaf {path}").as_dtype(dtype)
    with atomic_directory(product, flag="--workdir") as directory:
        digests = write_tree(directory / directories.PARAMS, slices, digest_name=lambda leaf: leaf)
        expert = directories.Expert(config.expert, dict(sorted(digests.items())), data_card(config, inputs))
        directories.Contribution(expert, inputs.manifest.anchor_digest, inputs.manifest.architecture).write(directory)
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
    shared, experts = directories.model_slices(tree, inputs.roster, "the trained model", dtypes)
    with atomic_directory(product, flag="--workdir") as directory:
        content = directories.model_leaves(shared, experts)
        digests = write_tree(directory / directories.PARAMS, content, directories.digest_name)
        shared_digests, expert_digests = directories.split_digests(digests, inputs.roster)
        before = inputs.manifest
        if before:
            found = dict(zip(inputs.roster, expert_digests, strict=True))
            manifest = _trained(before, inputs.trainable, shared, experts, shared_digests, found)
        else:
            manifest = directories.Model(
                architecture=dataclasses.asdict(inputs.model.architecture),
                experts=(directories.Expert(directories.ANCHOR_NAME, *expert_digests, data_card(config, inputs)),),
                shared=shared_digests,
                top_k=1,
                tokenizer_digest=inputs.corpora[0][0][0].tokenizer_digest,
                eos_id=inputs.corpora[0][0][0].eos_id,
            )
        if before and len(before.experts) > 1:
            write_merged_router(directory, directories.merged_router(config.start_from, before), before)
            trained = inputs.trainable | set(before.tuned["leaves"] if before.tuned else ())
            manifest = dataclasses.replace(manifest, tuned=before.tuned_in(trained, data_card(config, inputs)))
        manifest.write(directory)
        (inputs.corpora[0][0][0].path / directories.TOKENIZER_FILE).copy(directory / directories.TOKENIZER_FILE)
        if before:
            source = epath.Path(config.start_from)
            directories.copy_files(source / directories.TOKENIZER_FOLDER, directory / directories.TOKENIZER_FOLDER)
        if config.publish.public_documents:
            _publish_sample(config, inputs.corpora[0][0][0], directory / directories.PUBLIC)
    return product


def _trained(
    before: directories.Model,
    trainable: Set[str],
    shared: Mapping[str, Slice],
    experts: Mapping[str, Mapping[str, Slice]],
    found_shared: Mapping[str, str],
    found_experts: Mapping[str, Mapping[str, str]],
) -> directories.Model:
    """The manifest of a model after training: trained leaves have new digests, the others what they had.

    Raises:
      UserError: a leaf that was not trained is not what the manifest says.
    """

    def of(published, casts, slices, found, trained):
        check_digests({leaf: found[leaf] for leaf in found.keys() - trained}, stored_digests(published, casts), slices)
        digests = {leaf: found[leaf] if leaf in trained else digest for leaf, digest in published.items()}
        return digests, {leaf: cast for leaf, cast in casts.items() if leaf not in trained}

    own = {directories.digest_name(path) for path in trainable if path.startswith(directories.MOE)}
    roster = []
    for e in before.experts:
        leaves, casts = of(e.leaves, e.casts, experts[e.name], found_experts[e.name], own)
        roster.append(dataclasses.replace(e, leaves=leaves, casts=casts))
    leaves, casts = of(before.shared, before.casts, shared, found_shared, trainable)
    return dataclasses.replace(before, experts=tuple(roster), shared=leaves, casts=casts)


def _publish_sample(config: ConfigDict, corpus: Corpus, out: epath.Path) -> None:
    """Ships some of the public documents with the anchor, so that owners can mix them in."""
    count = min(config.publish.public_documents, len(corpus))
    chosen = np.random.default_rng(config.seed).choice(len(corpus), count, replace=False)
    copy_documents(corpus, sorted(chosen.tolist()), out)
