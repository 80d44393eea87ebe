"""How well the n-gram selector knows owners' text by noised statistics, for several epsilons.

    python benchmarks/privacy.py --public=corpora/public --owner=corpora/news --owner=corpora/code --epsilon 1 2 4 8

Each corpus folder holds two corpora, `train` and `validation`; all have one tokenizer. Statistics are those of `train`,
noised but for public text. For each token of `validation` the expert with the most evidence is chosen, as at top-1. The
table has the share of tokens for which it is the right one, and the smallest of the owners; means over the seeds of
noise. With `--chunk`, texts are cut into documents of so many tokens: the same text as more documents. Epsilon 0 is no
noise. Needs dp-accounting.
"""

import argparse
import json
import pathlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from flexolmo_jax.data.corpus import Corpus
from flexolmo_jax.model import privacy
from flexolmo_jax.model.architecture import Architecture
from flexolmo_jax.model.privacy import Privacy, make_privacy
from flexolmo_jax.model.selectors import SELECTORS, Statistics, advance, new_state

SELECTOR = SELECTORS["ngram"]
_ADVANCE = jax.jit(advance, static_argnums=0)


def main() -> None:
    """Measures every epsilon, prints a table, and writes the results to a file if asked."""
    options = _options()
    folders = [pathlib.Path(folder) for folder in (options.public, *options.owner)]
    train = [Corpus.open(folder / "train") for folder in folders]
    architecture = Architecture(max(corpus.vocab_size for corpus in train), 1, 2, 1, 1, 1, 1.0, 1e-6)
    texts = _texts(folders)
    public = SELECTOR.statistics(_documents(train[0], 0), architecture, train[0].eos_id)
    results = []
    for chunk in options.chunk:
        documents = [sum(1 for _ in _documents(corpus, chunk)) for corpus in train]
        for epsilon in options.epsilon:
            for clip in options.clip if epsilon else [0.0]:
                guarantee = make_privacy(epsilon, options.delta, clip, max(documents[1:]))
                runs = []
                for seed in range(options.seeds if guarantee else 1):
                    # Noise of a seed, so that a measurement can be repeated; statistics that are shipped have none.
                    privacy.GAUSS = np.random.default_rng(seed).normal
                    owners = [_statistics(corpus, chunk, architecture, guarantee) for corpus in train[1:]]
                    runs.append(_accuracy([public, *owners], texts, architecture))
                shares = np.mean(runs, axis=0)
                results.append(
                    {
                        "documents": [min(documents[1:]), max(documents[1:])],
                        "chunk": chunk,
                        "epsilon": epsilon,
                        "clip": clip,
                        "share": {folder.name: float(share) for folder, share in zip(folders, shares, strict=True)},
                    }
                )
    _show(results)
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps(results, indent=2) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--public", required=True)
    parser.add_argument("--owner", action="append", required=True)
    parser.add_argument("--epsilon", type=float, nargs="+", default=[0, 16, 8, 4, 2, 1])
    parser.add_argument("--delta", type=float, default=1e-6)
    parser.add_argument("--clip", type=float, nargs="+", default=[8])
    parser.add_argument("--chunk", type=int, nargs="+", default=[0], help="tokens of a document; 0: as they are")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", help="file for the results")
    return parser.parse_args()


def _documents(corpus: Corpus, chunk: int) -> Iterator[np.ndarray]:
    """The documents of a corpus, cut into chunks if asked."""
    for i in range(len(corpus)):
        document = corpus[i]
        for start in range(0, len(document), chunk or len(document)):
            yield document[start : start + (chunk or len(document))]


def _statistics(corpus: Corpus, chunk: int, architecture: Architecture, guarantee: Privacy | None) -> Statistics:
    if guarantee is None:
        return SELECTOR.statistics(_documents(corpus, 0), architecture, corpus.eos_id)
    return SELECTOR.private_statistics(_documents(corpus, chunk), architecture, corpus.eos_id, guarantee)


def _texts(folders: list[pathlib.Path]) -> dict[str, np.ndarray]:
    """Arrays [folders, tokens]: token ids and positions within the documents of `validation`; which are tokens."""
    texts = []
    for folder in folders:
        corpus = Corpus.open(folder / "validation")
        texts.append([np.concatenate([[corpus.eos_id], document]) for document in corpus])
    shape = len(folders), max(sum(map(len, documents)) for documents in texts)
    arrays = {
        "tokens": np.zeros(shape, np.int32),
        "positions": np.zeros(shape, np.int32),
        "is_token": np.zeros(shape, bool),
    }
    for i, documents in enumerate(texts):
        tokens, positions = np.concatenate(documents), np.concatenate([np.arange(len(d)) for d in documents])
        arrays["tokens"][i, : len(tokens)] = tokens
        arrays["positions"][i, : len(tokens)] = positions
        arrays["is_token"][i, : len(tokens)] = True
    return arrays


def _accuracy(statistics: list[Statistics], texts: dict[str, np.ndarray], architecture: Architecture) -> np.ndarray:
    """Of the text of each expert, the share of tokens for which it has the most evidence."""
    tables, experts = SELECTOR.tables(statistics), len(statistics)
    evidence, _ = _ADVANCE(
        SELECTOR,
        tables,
        new_state(SELECTOR, architecture, experts, experts),
        *(jnp.asarray(texts[name]) for name in texts),
    )
    is_right = np.argmax(np.asarray(evidence), axis=-1) == np.arange(experts)[:, None]
    counted = texts["is_token"] & (texts["positions"] > 0)  # not the EOS before a document
    return np.sum(is_right & counted, axis=1) / np.sum(counted, axis=1)


def _show(results: list[dict]) -> None:
    table = Table("documents", "epsilon", "clip", "public", "owners, mean", "owners, least")
    for r in results:
        public, *owners = r["share"].values()
        shares = [f"{100 * share:.0f}%" for share in (public, np.mean(owners), min(owners))]
        fewest, most = r["documents"]
        table.add_row(f"{fewest} to {most}", f"{r['epsilon']:g}" if r["epsilon"] else "-", f"{r['clip']:g}", *shares)
    Console().print(table)


if __name__ == "__main__":
    main()
