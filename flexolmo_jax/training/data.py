"""The data of a run, from its configuration: sources, how they are mixed, and what is held out."""

import math
import os
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from etils import epath
from ml_collections import ConfigDict

from configs.keys import pairs
from flexolmo_jax.checkpoint.model_directory import PUBLIC
from flexolmo_jax.data.batches.mixture import Mixture
from flexolmo_jax.data.batches.pipeline import Source, TrainingBatches
from flexolmo_jax.data.corpus import Corpus, open_corpora
from flexolmo_jax.errors import ArgumentError, UserError

TRAIN = "train"  # label of the source that config.data.train names


class Data(NamedTuple):
    """The corpora of a run, and how they are cut into batches.

    Attributes:
      sources: of training data.
      mixture: which source each sequence comes from.
      corpora: those that the output describes: all of training, without the public ones beside an owner's.
      held_out: {label: corpus} that are evaluated while training.
      sequence_length: tokens of a sequence.
      batch_size: sequences of a batch.
      seed: of the order of sequences.
      packing: how documents are put into sequences.
      prefetch: batches that are made ahead.
    """

    sources: list[Source]
    mixture: Mixture
    corpora: list[Corpus]
    held_out: dict[str, Corpus]
    sequence_length: int
    batch_size: int
    seed: int
    packing: str
    prefetch: int

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a batch."""
        return self.batch_size * self.sequence_length

    def batches(self) -> TrainingBatches:
        """The batches of training.

        Raises:
          UserError: two corpora have different tokenizers.
        """
        return TrainingBatches(
            self.sources, self.mixture, self.sequence_length, self.batch_size, self.seed, self.packing
        )

    @property
    def training(self) -> list[Corpus]:
        """The training corpora of all sources."""
        return [corpus for source in self.sources for corpus in source.corpora]


def open_data(config: ConfigDict) -> Data:
    """Opens the corpora, and checks what the steps take of them.

    Raises:
      ArgumentError: the value of a key makes no sense, alone or with another.
      UserError: a path names no corpus.
    """
    data = config.data
    _check_mixture(data)
    sources = _open_sources(data)
    corpora = [corpus for source in sources for corpus in source.corpora]
    if data.public_share:
        # The corpus that is named, or the sample that came with the start.
        public = data.public or os.path.join(config.start_from, PUBLIC)
        if not epath.Path(public).exists():
            problem = (
                f"{config.start_from or 'the start'} came without public data; give config.data.public=DIR, or a share "
                "of 0"
            )
            raise ArgumentError("config.data.public_share", data.public_share, problem)
        sources.append(Source(PUBLIC, [Corpus.open(public)]))
    mixture = Mixture(_phases(data))
    _check_epochs(config, sources, mixture)
    return Data(
        sources=sources,
        mixture=mixture,
        corpora=corpora,
        held_out=open_corpora(split_paths(config.evaluation.data)),
        sequence_length=data.sequence_length,
        batch_size=data.batch_size,
        seed=config.seed,
        packing=data.packing,
        prefetch=data.prefetch,
    )


def _open_sources(data: ConfigDict) -> list[Source]:
    """The sources that the configuration names, without public data."""
    named = [(name, f"config.data.mixture: {name}", paths) for name, paths, _ in data.mixture]
    sources = []
    for name, key, paths in named or [(TRAIN, "config.data.train", data.train)]:
        if not split_paths(paths):
            raise UserError(f"{key}: empty; give a corpus directory (`flexolmo tokenize` makes one)")
        sources.append(Source(name, [Corpus.open(path) for path in split_paths(paths)]))
    return sources


def _check_mixture(data: ConfigDict) -> None:
    """Sources have different names, phases name them and come in order, and weights make sense."""
    names = [name for name, _, _ in data.mixture]
    if names and data.train:
        raise ArgumentError("config.data.train", data.train, "config.data.mixture names the data too; give one of them")
    for name in names:
        if not isinstance(name, str) or not name or names.count(name) > 1 or (name == PUBLIC and data.public_share):
            problem = f"'{name}' is no name, or not the only source of that name; name each source differently"
            raise ArgumentError("config.data.mixture", names, problem)
    if data.phases and not names:
        raise ArgumentError("config.data.phases", data.phases, "needs config.data.mixture, whose sources it names")
    before = 1
    for step, weights in data.phases:
        if not isinstance(step, int) or step <= before:
            problem = f"begins with step {step}; phases begin with whole numbers, from 2 on, that rise"
            raise ArgumentError("config.data.phases", data.phases, problem)
        if problem := pairs(weights):
            raise ArgumentError("config.data.phases", data.phases, f"step {step}: {problem}")
        for name, _ in weights:
            if name not in names or [other for other, _ in weights].count(name) > 1:
                problem = f"step {step}: '{name}' is not in config.data.mixture ({', '.join(names)}), or is there twice"
                raise ArgumentError("config.data.phases", data.phases, problem)
        _check_weights("config.data.phases", [weight for _, weight in weights])
        before = step
    if names:
        _check_weights("config.data.mixture", [weight for _, _, weight in data.mixture])


def _check_weights(key: str, weights: Sequence[float]) -> None:
    if not all(isinstance(weight, int | float) and 0 <= weight < math.inf for weight in weights) or not any(weights):
        raise ArgumentError(key, list(weights), "weights must be finite, at least 0, and not all 0")


def _phases(data: ConfigDict) -> list[tuple[int, list[Fraction]]]:
    """(first sequence, weight of each source) of each phase; public data has its share of all of them."""
    names = [name for name, _, _ in data.mixture] or [TRAIN]
    weights = {name: weight for name, _, weight in data.mixture} or {TRAIN: 1.0}
    phases = [(1, weights), *((step, dict(weights)) for step, weights in data.phases)]
    public = Fraction(str(data.public_share))
    return [
        (
            (step - 1) * data.batch_size,
            [(1 - public) * Fraction(weights.get(name, 0)) / sum(map(Fraction, weights.values())) for name in names]
            + ([public] if public else []),
        )
        for step, weights in phases
    ]


def _check_epochs(config: ConfigDict, sources: Sequence[Source], mixture: Mixture) -> None:
    """Raises ArgumentError where the steps take a source more often than `data.max_epochs`."""
    counts = mixture.counts(config.steps * config.data.batch_size)
    for source, count in zip(sources, counts, strict=True):
        taken, limit = count * config.data.sequence_length, config.data.max_epochs
        if limit and taken > limit * source.tokens:
            problem = (
                f"{source.label} has {source.tokens:,} tokens, and the {config.steps:,} steps would take {taken:,}, "
                f"{taken / source.tokens:.2f} epochs; give it more data or a lower weight, or take fewer steps"
            )
            raise ArgumentError("config.data.max_epochs", limit, problem)


def split_paths(value: str) -> list[str]:
    """Splits a value that lists paths with commas between."""
    return [path.strip() for path in value.split(",") if path.strip()]
