"""What a run would take of its data: how much of each source, what packing cuts, and its first sequences."""

import itertools
from typing import Any

from ml_collections import ConfigDict
from rich.table import Table

from flexolmo_jax.data.batches.packing import packing_report
from flexolmo_jax.data.batches.pipeline import TrainingBatches
from flexolmo_jax.data.curation.summary import beginning
from flexolmo_jax.tables import plain_table
from flexolmo_jax.training.data import Data, open_data
from flexolmo_jax.training.run import ANY_PLATFORM, check_values

_REPORTED_TOKENS = 1 << 24  # of each source that are packed for the report


def describe_data(config: ConfigDict, num_samples: int = 0) -> tuple[dict[str, Any], Table]:
    """Describes the training data of a run; no model is read.

    Args:
      config: of the run.
      num_samples: how many of its first sequences to show.

    Returns:
      ({fact: value}, a table of what each phase takes of each source).

    Raises:
      TypeError: the configuration is no `ConfigDict`.
      ArgumentError: the value of a key makes no sense, alone or with another.
      UserError: a path names no corpus, or corpora have different tokenizers.
    """
    check_values(config, ANY_PLATFORM)
    data = open_data(config)
    batches = data.batches()
    facts = {
        "steps": f"{config.steps:,} of {data.batch_size:,} sequences of {data.sequence_length:,} tokens",
        "tokens": f"{config.steps * data.tokens_per_step:,}",
        "packing": data.packing,
        "tokenizer": data.training[0].tokenizer_digest,
    }
    return facts | _samples(data, batches, num_samples), _table(data, batches, config.steps)


def _table(data: Data, batches: TrainingBatches, steps: int) -> Table:
    """A line for each phase and source that it takes something of."""
    table = plain_table("steps", ["source", "documents", "tokens", "taken", "share", "epochs so far", "documents cut"])
    reports = {
        source.label: packing_report(source.corpora, data.sequence_length, data.packing, _REPORTED_TOKENS)
        for source in data.sources
    }
    firsts = [first // data.batch_size for first in data.mixture.firsts]
    for first, last in itertools.pairwise([*(first for first in firsts if first < steps), steps]):
        before, after = batches.taken(first), batches.taken(last)
        for source in data.sources:
            tokens, epochs = after[source.label]
            taken = tokens - before[source.label][0]
            if not taken:
                continue
            report = reports[source.label]
            table.add_row(
                f"{first + 1:,} to {last:,}",
                source.label,
                f"{sum(corpus.documents for corpus in source.corpora):,}",
                f"{source.tokens:,}",
                f"{taken:,}",
                f"{taken / ((last - first) * data.tokens_per_step):.1%}",
                f"{epochs:.2f}",
                f"{report.cut_documents / max(1, report.documents):.1%}",
            )
    return table


def _samples(data: Data, batches: TrainingBatches, count: int) -> dict[str, str]:
    """The beginnings of the first sequences of the run: {"sequence 1 (web)": its text}."""
    tokenizer = data.training[0].tokenizer()
    sequences = batches.sequences(range(count))["targets"]
    labels = [data.sources[data.mixture.locate(number)[0]].label for number in range(count)]
    return {
        f"sequence {number} ({label})": beginning(sequence, tokenizer)
        for number, (label, sequence) in enumerate(zip(labels, sequences, strict=True), 1)
    }
