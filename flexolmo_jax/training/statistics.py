"""The statistics of an owner's corpora, in one pass over their documents."""

from collections.abc import Iterator, Sequence

import numpy as np

from flexolmo_jax.checkpoint.params import Slice
from flexolmo_jax.data.corpus import Corpus
from flexolmo_jax.model.architecture import Architecture
from flexolmo_jax.model.privacy import Privacy
from flexolmo_jax.model.selectors import Selector
from flexolmo_jax.progress import progress_bar


def collect_statistics(
    selector: Selector, corpora: Sequence[Corpus], architecture: Architecture, privacy: Privacy | None
) -> dict[str, Slice]:
    """What the selector needs of the documents of all corpora, {leaf: slice}; with `privacy`, noised."""
    with progress_bar() as progress:
        task = progress.add_task("statistics", total=sum(map(len, corpora)))

        def documents() -> Iterator[np.ndarray]:
            for corpus in corpora:
                for i in range(len(corpus)):
                    yield corpus[i]
                    progress.advance(task)

        eos_id = corpora[0].eos_id
        if privacy:
            statistics = selector.private_statistics(documents(), architecture, eos_id, privacy)
        else:
            statistics = selector.statistics(documents(), architecture, eos_id)
    return {leaf: Slice(values, None, f"the statistics leaf {leaf}") for leaf, values in statistics.items()}
