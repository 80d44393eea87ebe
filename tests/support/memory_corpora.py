"""Corpora that lie in memory, for tests that need many."""

import pathlib
from collections.abc import Sequence

import numpy as np

from flexolmo_jax.data.corpus import Corpus

EOS = 256


def memory_corpus(files: Sequence[Sequence[Sequence[int]]]) -> Corpus:
    """A corpus of files of documents, each a sequence of ids without EOS; it has the byte tokenizer's ids."""
    arrays = [np.array([token for document in file for token in (*document, EOS)], np.uint16) for file in files]
    sizes = [[len(document) + 1 for document in file] for file in files]
    corpus = Corpus(
        path=pathlib.Path("memory"),
        documents=sum(map(len, files)),
        tokens=sum(map(len, arrays)),
        bytes=0,
        eos_id=EOS,
        dtype=np.dtype("<u2"),
        tokenizer_digest="bytes",
        files=tuple({"name": str(i), "tokens": len(array), "sha256": ""} for i, array in enumerate(arrays)),
        card={},
    )
    # In place of what is read from disk when it is first asked for.
    corpus.__dict__.update(_arrays=arrays, _document_ends=[np.cumsum(of_file) for of_file in sizes], vocab_size=257)
    return corpus


def random_corpus(rng: np.random.Generator, sizes: Sequence[int], files: int = 1) -> Corpus:
    """A corpus of documents of these sizes, EOS included, which are spread over files."""
    documents = [rng.integers(0, 256, size - 1).tolist() for size in sizes]
    return memory_corpus([documents[i::files] for i in range(files) if documents[i::files]])
