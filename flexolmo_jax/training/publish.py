"""What a finished run leaves behind: a contribution, or a model directory."""

import dataclasses
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from flexolmo_jax.checkpoint import directories
from flexolmo_jax.checkpoint.atomic import atomic_directory
from flexolmo_jax.checkpoint.tree import Slice, write_tree
from flexolmo_jax.data.corpus import Corpus, copy_documents
from flexolmo_jax.training.inputs import EXPERT, PUBLIC, Inputs
from flexolmo_jax.training.step import Leaves


def publish(product: epath.Path, config: ConfigDict, inputs: Inputs, leaves: Leaves) -> epath.Path:
    """Writes the product of a run, whole or not at all, and returns its directory.

    A frozen leaf may be held in a shorter dtype than its source, so it is copied from there.

    Raises:
      UserError: a trained leaf is not finite.
    """
    if config.expert:
        own = {path: leaf for path, leaf in leaves.items() if path.startswith(EXPERT)}
        return _write_contribution(product, config, inputs, own)
    tree: dict[str, Any] = {path: leaves[path] for path in inputs.trainable}
    stored = directories.open_params(config.start_from) if inputs.manifest else leaves
    tree |= {path: stored[path] for path in leaves.keys() - inputs.trainable}
    return _write_model(product, config, inputs, tree)


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


def _write_contribution(product: epath.Path, config: ConfigDict, inputs: Inputs, tree: Leaves) -> epath.Path:
    slices = {
        directories.digest_name(path): Slice(leaf, None, f"the trained leaf {path}")
        for path, leaf in sorted(tree.items())
    }
    with atomic_directory(product, flag="--workdir") as directory:
        digests = write_tree(directory / directories.PARAMS, slices, digest_name=lambda leaf: leaf)
        expert = directories.Expert(config.expert, dict(sorted(digests.items())), data_card(config, inputs))
        directories.Contribution(expert, inputs.manifest.anchor_digest, inputs.manifest.architecture).write(directory)
    return product


def _write_model(product: epath.Path, config: ConfigDict, inputs: Inputs, tree: dict[str, Any]) -> epath.Path:
    shared, experts = directories.model_slices(tree, inputs.roster, "the trained model")
    with atomic_directory(product, flag="--workdir") as directory:
        content = directories.model_leaves(shared, experts)
        digests = write_tree(directory / directories.PARAMS, content, directories.digest_name)
        shared_digests, expert_digests = directories.split_digests(digests, inputs.roster)
        before = inputs.manifest
        cards = [expert.card for expert in before.experts] if before else [data_card(config, inputs)]
        tuned = None
        if before and len(before.experts) > 1:
            tuned = {
                "leaves": sorted(inputs.trainable | set(before.tuned["leaves"] if before.tuned else ())),
                "merged_router": directories.write_merged_router(
                    directory, directories.merged_router(config.start_from, before)
                ),
                "card": data_card(config, inputs),
            }
        members = zip(inputs.roster, expert_digests, cards, strict=True)
        directories.Model(
            architecture=dataclasses.asdict(inputs.model.architecture),
            experts=tuple(directories.Expert(name, leaves, card) for name, leaves, card in members),
            shared=shared_digests,
            top_k=before.top_k if before else 1,
            tokenizer_digest=inputs.corpora[0][0][0].tokenizer_digest,
            eos_id=inputs.corpora[0][0][0].eos_id,
            tuned=tuned,
        ).write(directory)
        (inputs.corpora[0][0][0].path / directories.TOKENIZER_FILE).copy(directory / directories.TOKENIZER_FILE)
        if before:
            source = epath.Path(config.start_from)
            directories.copy_files(source / directories.TOKENIZER_FOLDER, directory / directories.TOKENIZER_FOLDER)
        if config.publish.public_documents:
            _publish_sample(config, inputs.corpora[0][0][0], directory / PUBLIC)
    return product


def _publish_sample(config: ConfigDict, corpus: Corpus, out: epath.Path) -> None:
    """Ships some of the public documents with the anchor, so that owners can mix them in."""
    count = min(config.publish.public_documents, len(corpus))
    chosen = np.random.default_rng(config.seed).choice(len(corpus), count, replace=False)
    copy_documents(corpus, sorted(chosen.tolist()), out)
