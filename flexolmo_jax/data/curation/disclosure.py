"""What a list of proxies tells a stranger about the owner's text.

It is computed from that text, so it stays with the owner.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text
from scipy import sparse

from flexolmo_jax.data.corpus import Corpus
from flexolmo_jax.data.curation.document_features import Matrix
from flexolmo_jax.data.curation.proxies import Accuracy, Sample, Selection, fit, measure, read_documents
from flexolmo_jax.tables import MISSING, plain_table, printable

COPY = 0.95  # cosine from which documents count as near copies
_TERMS, _PAIRS = 20, 10  # in the report
_LIST, _COMPARED = 1000, 5000  # documents of the list, and of either corpus, that are compared
_BATCH = 64
_WORD = re.compile(r"[^\W\d_]{2,}")


def disclosure(selection: Selection) -> dict[str, Any]:
    """Measures what the list of chosen documents reveals.

    Returns:
      A JSON object:
      - `classifier`: accuracy and AUC of the owner's classifier.
      - `stranger`: the same of one that who has the list can train: to tell its documents from other public ones, here
        tested on the owner's documents and public ones. None: no other public documents are left.
      - `terms`: words that are in more documents of the list than of other public ones, with both shares.
      - `nearest`: pairs of a document of the list and the owner's document that is nearest to it, by cosine; its median
        for the list, and for other public documents; and how many documents of the list are near copies of the owner's.
    """
    public, sample = selection.public, selection.public_sample
    listed = _spread(np.array(selection.documents), _LIST)
    others = _keep(sample, ~np.isin(sample.indices_N, selection.documents))
    stranger = _stranger(selection, listed, others)
    return {
        "classifier": selection.accuracy._asdict(),
        "stranger": None if stranger is None else stranger._asdict(),
        "terms": _terms(public, listed, _spread(others.indices_N, _COMPARED)),
        "nearest": _nearest(selection, listed, others),
    }


def disclosure_tables(report: Mapping[str, Any]) -> list[Table]:
    """The report as tables: who can tell the owner's documents; terms; and the nearest documents."""
    told = plain_table("the owner's documents can be told by", ["accuracy", "ROC AUC"])
    for name, label in (("classifier", "the owner"), ("stranger", "a stranger with the list")):
        values = report[name] and [f"{report[name]['accuracy']:.1%}", f"{report[name]['auc']:.3f}"]
        told.add_row(label, *(values or [MISSING, MISSING]))
    terms = plain_table("term", ["of the list", "of other public documents"])
    for term in report["terms"]:
        terms.add_row(Text(printable(term["term"])), f"{term['list']:.1%}", f"{term['public']:.1%}")
    nearest = plain_table("public document", ["nearest document of the owner", "cosine"])
    for pair in report["nearest"]["pairs"]:
        nearest.add_row(str(pair["public"]), str(pair["private"]), f"{pair['cosine']:.3f}")
    for name, label in (("median", "median of the list"), ("median_of_others", "median of other public documents")):
        value = report["nearest"][name]
        nearest.add_row(label, "", MISSING if value is None else f"{value:.3f}")
    return [told, terms, nearest]


def _stranger(selection: Selection, listed: np.ndarray, others: Sample) -> Accuracy | None:
    """How well a classifier that has learned from the list tells the owner's documents from unseen public ones."""
    unseen = others.folds_N == 0
    if unseen.all() or not unseen.any():
        return None
    learned = selection.features(read_documents(selection.public, listed))
    classifier = fit(learned, others.features_NxF[~unseen])
    tested = (selection.private_sample.features_NxF, others.features_NxF[unseen])
    return measure(*map(classifier.decision_function, tested))


def _terms(public: Corpus, listed: np.ndarray, others: np.ndarray) -> list[dict[str, Any]]:
    """Words by the z-score of the log odds ratio that a document of the list has them, and another has not."""
    counts, other_counts = (_document_frequencies(public, indices) for indices in (listed, others))
    scores = {
        term: _z_score(count, len(listed), other_counts[term], len(others)) for term, count in sorted(counts.items())
    }
    best = sorted(filter(lambda term: scores[term] > 0, scores), key=lambda term: -scores[term])[:_TERMS]
    return [
        {"term": term, "list": counts[term] / len(listed), "public": other_counts[term] / max(1, len(others))}
        for term in best
    ]


def _document_frequencies(corpus: Corpus, indices: Iterable[int]) -> Counter[str]:
    """In how many documents each word is."""
    tokenizer = corpus.tokenizer()
    texts = (tokenizer.decode(ids) for index in indices for ids in read_documents(corpus, [index]))
    return Counter(word for text in texts for word in set(_WORD.findall(text.lower())))


def _z_score(count: int, total: int, other_count: int, other_total: int) -> float:
    """Of the log odds ratio of two shares, with half a document added to each number (Haldane and Anscombe)."""
    cells = [count + 0.5, total - count + 0.5, other_count + 0.5, other_total - other_count + 0.5]
    log_ratio = math.log(cells[0] / cells[1]) - math.log(cells[2] / cells[3])
    return log_ratio / math.sqrt(sum(1 / cell for cell in cells))


def _nearest(selection: Selection, listed: np.ndarray, others: Sample) -> dict[str, Any]:
    private = _keep(selection.private_sample, _spread(np.arange(len(selection.private_sample.indices_N)), _COMPARED))
    compared = _keep(others, _spread(np.arange(len(others.indices_N)), _LIST))
    documents = read_documents(selection.public, listed)
    cosine_N, place_N = _nearest_cosines(selection.features(documents), private.features_NxF)
    other_cosine_N, _ = _nearest_cosines(compared.features_NxF, private.features_NxF)
    pairs = [
        {
            "public": int(listed[place]),
            "private": int(private.indices_N[place_N[place]]),
            "cosine": float(cosine_N[place]),
        }
        for place in np.argsort(-cosine_N, kind="stable")[:_PAIRS]
    ]
    return {
        "pairs": pairs,
        "median": float(np.median(cosine_N)),
        "median_of_others": float(np.median(other_cosine_N)) if other_cosine_N.size else None,
        "near_copies": int(np.count_nonzero(cosine_N >= COPY)),
    }


def _nearest_cosines(features_NxF: Matrix, others_MxF: Matrix) -> tuple[np.ndarray, np.ndarray]:
    """Of each vector the highest cosine with another set's, and its place there."""
    cosines, places = [np.empty(0, np.float32)], [np.empty(0, np.int64)]
    for start in range(0, features_NxF.shape[0], _BATCH):
        block = features_NxF[start : start + _BATCH] @ others_MxF.T
        block = block.toarray() if sparse.issparse(block) else block
        cosines.append(block.max(axis=1))
        places.append(block.argmax(axis=1))
    return np.concatenate(cosines), np.concatenate(places)


def _keep(sample: Sample, kept: Sequence[int] | np.ndarray) -> Sample:
    return Sample(sample.indices_N[kept], sample.features_NxF[kept], sample.folds_N[kept])


def _spread(indices: np.ndarray, most: int) -> np.ndarray:
    """At most so many of these, at even distances."""
    return indices[np.linspace(0, len(indices) - 1, min(len(indices), most)).astype(np.int64)]
