r"""Measures how fast batches are made from token files, on one core, and how many documents each packing cuts.

    python benchmarks/data.py
    python benchmarks/data.py --corpus=corpora/public/train --length=256

Without `--corpus` the token files are made up: random ids, in documents of geometrically distributed lengths.
"""

import argparse
import json
import pathlib
import tempfile
import time

import numpy as np

from flexolmo_jax.data.batches.mixture import Mixture
from flexolmo_jax.data.batches.packing import PACKINGS, packing_report
from flexolmo_jax.data.batches.pipeline import Source, TrainingBatches
from flexolmo_jax.data.corpus import Corpus
from flexolmo_jax.data.tokenization.tokenizer import byte_tokenizer
from flexolmo_jax.tables import plain_table, show


def make_corpus(directory: pathlib.Path, tokens: int, mean: int, dtype: str) -> Corpus:
    """Writes a corpus of random bytes, in documents of `mean` tokens."""
    tokenizer, rng = byte_tokenizer(), np.random.default_rng(0)
    ids = rng.integers(0, 256, tokens, dtype=np.uint16).astype(dtype)
    ids[rng.random(tokens) < 1 / mean] = tokenizer.eos_id
    ids[-1] = tokenizer.eos_id
    directory.mkdir()
    ids.tofile(directory / "tokens-00000.npy")
    tokenizer.save(directory / "tokenizer.json")
    description = {
        "format_version": 1,
        "tokenizer_digest": tokenizer.digest,
        "eos_id": tokenizer.eos_id,
        "dtype": dtype,
        "documents": int((ids == tokenizer.eos_id).sum()),
        "tokens": tokens,
        "bytes": tokens,
        "files": [{"name": "tokens-00000.npy", "tokens": tokens, "sha256": ""}],
    }
    (directory / "corpus.json").write_text(json.dumps(description))
    return Corpus.open(directory)


def tokens_per_second(batches: TrainingBatches, count: int) -> float:
    """Makes `count` batches after a first one, and returns the tokens of a second of this thread's time."""
    batches.batch(0)
    began = time.thread_time()
    for number in range(1, count + 1):
        batches.batch(number)
    return count * batches.batch_size * batches.length / (time.thread_time() - began)


def main() -> None:
    """Measures both packings, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", help="a corpus directory; made up where there is none")
    parser.add_argument("--tokens", type=int, default=1 << 26, help="tokens of the made-up corpus (default: 2**26)")
    parser.add_argument("--mean", type=int, default=500, help="mean tokens of its documents (default: 500)")
    parser.add_argument("--dtype", choices=("uint16", "uint32"), default="uint16", help="of its ids (default: uint16)")
    parser.add_argument("--length", type=int, default=4096, help="tokens of a sequence (default: 4096)")
    parser.add_argument("--batch_size", type=int, default=16, help="sequences of a batch (default: 16)")
    parser.add_argument("--batches", type=int, default=200, help="how many are made (default: 200)")
    options = parser.parse_args()
    table = plain_table("packing", ("tokens/s a core", "documents cut", "tokens in these", "padding"))
    with tempfile.TemporaryDirectory() as folder:
        if options.corpus:
            corpus = Corpus.open(options.corpus)
        else:
            corpus = make_corpus(pathlib.Path(folder) / "corpus", options.tokens, options.mean, options.dtype)
        corpus.document_ends(0, 1)  # finds them
        for packing in PACKINGS:
            source, mixture = Source("corpus", [corpus]), Mixture([(0, [1])])
            batches = TrainingBatches([source], mixture, options.length, options.batch_size, packing=packing)
            speed, report = (
                tokens_per_second(batches, options.batches),
                packing_report([corpus], options.length, packing),
            )
            cut, cut_tokens = report.cut_documents / report.documents, report.cut_tokens / report.tokens
            table.add_row(packing, f"{speed:,.0f}", f"{cut:.2%}", f"{cut_tokens:.2%}", f"{report.padding:.0%}")
    show(table)


if __name__ == "__main__":
    main()
