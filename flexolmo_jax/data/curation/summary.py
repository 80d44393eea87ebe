"""What `flexolmo inspect` tells of a corpus: lengths of documents, exact duplicates, and samples."""

import numpy as np
from rich.table import Table
from rich.text import Text

from flexolmo_jax.data.corpus import Corpus
from flexolmo_jax.data.curation.duplicates import DIGEST, document_digest
from flexolmo_jax.data.tokenization.tokenizer import Tokenizer
from flexolmo_jax.progress import progress_bar
from flexolmo_jax.tables import plain_table, printable

_CHUNK_TOKENS = 1 << 24  # whose documents are counted together
_BAR = 40  # characters
_SAMPLE_TOKENS, _SAMPLE_CHARACTERS = 256, 160


def count_lengths(corpus: Corpus) -> tuple[np.ndarray, np.ndarray]:
    """Counts documents by length, which the index tells: no token is read.

    Returns:
      The number of documents, and of their tokens, of lengths from 2^i to 2^(i+1) - 1, EOS included: int64 [64] each.
    """
    documents, tokens = np.zeros(64, np.int64), np.zeros(64, np.int64)
    last = 0
    for start in range(0, corpus.tokens, _CHUNK_TOKENS):
        ends = corpus.document_ends(start, min(start + _CHUNK_TOKENS, corpus.tokens))
        lengths = np.diff(ends, prepend=last)
        last = ends[-1] if ends.size else last
        powers = np.frexp(lengths)[1] - 1
        documents += np.bincount(powers, minlength=64)
        np.add.at(tokens, powers, lengths)
    return documents, tokens


def length_table(corpus: Corpus) -> Table:
    """A histogram of the lengths of documents, with bars."""
    documents, tokens = count_lengths(corpus)
    filled = np.flatnonzero(documents)
    table = plain_table("tokens of a document", ["documents", "of all", "tokens", "of all"])
    table.add_column(Text("documents"), no_wrap=True)
    for power in range(filled[0], filled[-1] + 1):
        count, total = int(documents[power]), int(tokens[power])
        shares = f"{count / corpus.documents:.1%}", f"{total / corpus.tokens:.1%}"
        bar = "#" * -(-_BAR * count // int(documents.max()))
        name = f"{1 << power:,} to {(2 << power) - 1:,}" if power else "1"
        table.add_row(name, f"{count:,}", shares[0], f"{total:,}", shares[1], bar)
    return table


def count_duplicates(corpus: Corpus) -> int:
    """Counts the documents whose tokens are those of an earlier one, by digests; keeps 16 bytes for each."""
    digests = np.empty(corpus.documents, DIGEST)
    with progress_bar() as bar:
        for index in bar.track(range(corpus.documents), description="Duplicates"):
            digests[index] = document_digest(corpus[index])
    return corpus.documents - len(np.unique(digests))


def samples(corpus: Corpus, count: int) -> dict[str, str]:
    """The beginnings of documents at equal distances, each on a line: {"document 17": its text}."""
    tokenizer = corpus.tokenizer()
    indices = dict.fromkeys(np.linspace(0, corpus.documents - 1, count).round().astype(int).tolist())
    return {f"document {index}": beginning(corpus[index], tokenizer) for index in indices}


def beginning(ids: np.ndarray, tokenizer: Tokenizer) -> str:
    """The text of the first ids [tokens], on a line."""
    text = tokenizer.decode(ids[:_SAMPLE_TOKENS])
    line = printable(" ".join(text.split()))
    return line if len(line) <= _SAMPLE_CHARACTERS else f"{line[:_SAMPLE_CHARACTERS]}..."
