"""Cleaning of corpora: which documents to drop, why, and copies without them."""

import bisect
import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from rich.progress import Progress
from rich.table import Table

from flexolmo_jax.checkpoint.atomic import atomic_directory
from flexolmo_jax.data.corpus import Corpus, check_one_tokenizer
from flexolmo_jax.data.corpus_writer import copy_documents
from flexolmo_jax.data.curation.contamination import HeldOutNgrams
from flexolmo_jax.data.curation.duplicates import DIGEST, document_digest, first_occurrences, near_duplicates
from flexolmo_jax.data.curation.ngrams import most_repeats
from flexolmo_jax.errors import ArgumentError, UserError
from flexolmo_jax.progress import progress_bar
from flexolmo_jax.tables import plain_table

REASONS = ("repeated", "contaminated", "exact", "near")  # a document has the first that applies
_REPEATED_NGRAM = 13  # tokens at most
# Of a document: 0 if it is kept, or 1 + the place of its reason; the other document; times, share or similarity.
_VERDICT = np.dtype([("reason", "i1"), ("other", "i8"), ("value", "f8")])


@dataclasses.dataclass(frozen=True)
class Checks:
    """What documents are dropped for.

    Attributes:
      drop: some of `REASONS`.
      repeats: "repeated" is a document in which an n-gram of 1 to 13 tokens occurs this often in succession.
      ngram: tokens of the n-grams that are compared with held-out documents.
      overlap: a held-out document is contaminated if training documents hold more than this share of its n-grams.
      near: Jaccard similarity from which documents are near-duplicates; 0: none are.

    Raises:
      ArgumentError: a value is out of bounds.
    """

    drop: Sequence[str] = REASONS
    repeats: int = 32
    ngram: int = 13
    overlap: float = 0.5
    near: float = 0.8

    def __post_init__(self):
        for reason in self.drop:
            if reason not in REASONS:
                raise ArgumentError("drop", ",".join(self.drop), f"use some of {', '.join(REASONS)}")
        bounds = {
            "repeats": (self.repeats >= 2, "at least 2"),
            "ngram": (self.ngram >= 1, "at least 1"),
            "overlap": (0 <= self.overlap <= 1, "from 0 to 1"),
            "near": (0 <= self.near <= 1, "from 0 to 1"),
        }
        for name, (valid, bound) in bounds.items():
            if not valid:
                raise ArgumentError(name, getattr(self, name), f"must be {bound}")

    def has(self, reason: str) -> bool:
        """Whether documents are dropped for this reason."""
        return reason in self.drop and not (reason == "near" and self.near == 0)


class Documents(Sequence[np.ndarray]):
    """The documents of several corpora as one sequence of ids [length], without EOS."""

    def __init__(self, corpora: Mapping[str, Corpus]):
        self.corpora, self._labels = dict(corpora), list(corpora)
        self._starts = [0, *itertools.accumulate(map(len, corpora.values()))]

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> np.ndarray:
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        label, place = self.place(index)
        corpus = self.corpora[label]
        ids = corpus[place]
        return ids[:-1] if ids[-1] == corpus.eos_id else ids

    def place(self, index: int) -> tuple[str, int]:
        """Returns the label of the document's corpus, and its index there."""
        corpus = bisect.bisect_right(self._starts, index) - 1
        return self._labels[corpus], index - self._starts[corpus]

    def of(self, label: str) -> slice:
        """The indices of the documents of one corpus."""
        corpus = self._labels.index(label)
        return slice(self._starts[corpus], self._starts[corpus + 1])


@dataclasses.dataclass(frozen=True, eq=False)
class Cleaning:
    """Which documents are dropped from corpora, and what held-out documents share with them.

    Attributes:
      documents: of the corpora.
      held_out: the documents that they are compared with; none if there was no such comparison.
      checks: what documents are dropped for.
      verdicts: of each document the reason, the other document and a value [documents].
      ngrams: of each held-out document the number of its different n-grams, int64 [held-out documents].
      before: the share of them that the corpora hold, float64 [held-out documents].
      after: the same without the documents that are dropped.
    """

    documents: Documents
    held_out: Documents
    checks: Checks
    verdicts: np.ndarray
    ngrams: np.ndarray
    before: np.ndarray
    after: np.ndarray

    def kept(self, label: str) -> np.ndarray:
        """The indices of the documents of a corpus that are kept, int64 [kept]."""
        return np.flatnonzero(self.verdicts["reason"][self.documents.of(label)] == 0)

    def counts(self, label: str) -> dict[str, int]:
        """Of each reason that is checked, the number of documents that are dropped from a corpus."""
        reasons = np.bincount(self.verdicts["reason"][self.documents.of(label)], minlength=1 + len(REASONS))
        return {reason: int(reasons[1 + i]) for i, reason in enumerate(REASONS) if self.checks.has(reason)}

    def kept_tokens(self, label: str) -> int:
        """The number of tokens of the documents of a corpus that are kept, EOS included."""
        corpus = self.documents.corpora[label]
        dropped = np.flatnonzero(self.verdicts["reason"][self.documents.of(label)])
        return corpus.tokens - sum(len(corpus[index]) for index in dropped.tolist())

    def dropped(self) -> Iterator[dict[str, Any]]:
        """Describes each document that is dropped, in order."""
        for index in np.flatnonzero(self.verdicts["reason"]).tolist():
            code, other, value = self.verdicts[index].tolist()
            label, place = self.documents.place(index)
            yield {"corpus": label, "index": place, **self._reason(REASONS[code - 1], other, value)}

    def as_dict(self) -> dict[str, Any]:
        """All of it for a JSON file."""
        return {
            "checks": dataclasses.asdict(self.checks),
            "corpora": {label: self.results(label) for label in self.documents.corpora},
            "held_out": {label: self.overlap(label) for label in self.held_out.corpora},
            "dropped": list(self.dropped()),
        }

    def _reason(self, reason: str, other: int, value: float) -> dict[str, Any]:
        if reason == "repeated":
            return {"reason": reason, "times": int(value), "ngram": other}
        if reason == "contaminated":
            return {"reason": reason, "held_out": _place(self.held_out, other), "share": value}
        similarity = {"similarity": value} if reason == "near" else {}
        return {"reason": reason, "original": _place(self.documents, other), **similarity}

    def results(self, label: str) -> dict[str, Any]:
        corpus = self.documents.corpora[label]
        return {
            "path": str(corpus.path),
            "documents": corpus.documents,
            "tokens": corpus.tokens,
            "dropped": self.counts(label),
            "kept_documents": len(self.kept(label)),
            "kept_tokens": self.kept_tokens(label),
        }

    def overlap(self, label: str) -> dict[str, Any]:
        """The overlap of a held-out corpus, with each of its documents that the corpora share n-grams with."""
        of = self.held_out.of(label)
        before, after, limit = self.before[of], self.after[of], self.checks.overlap
        shared = [
            {"index": int(index), "before": float(before[index]), "after": float(after[index])}
            for index in np.flatnonzero(before)
        ]
        return {
            "documents": len(before),
            "too_short": int(np.count_nonzero(self.ngrams[of] == 0)),
            "above_before": int(np.count_nonzero(before > limit)),
            "above_after": int(np.count_nonzero(after > limit)),
            "mean_before": float(before.mean()),
            "mean_after": float(after.mean()),
            "shared": shared,
        }


def clean(corpora: Mapping[str, Corpus], held_out: Mapping[str, Corpus], checks: Checks) -> Cleaning:
    """Decides which documents of `corpora` to drop, in three passes over them, with progress bars.

    Documents are dropped that repeat an n-gram; then those that share n-grams with contaminated held-out documents;
    then, of equal documents and of near-duplicates, all but the first. What is dropped by one check is not there for
    the next.

    Raises:
      ArgumentError: a library for near-duplicates is missing.
      UserError: corpora have different tokenizers, or a corpus is both cleaned and held out.
    """
    _check_corpora(corpora, held_out)
    documents, reference = Documents(corpora), Documents(held_out)
    verdicts = np.zeros(len(documents), _VERDICT)
    with progress_bar() as bar:
        ngrams = HeldOutNgrams(bar.track(reference, description="held-out n-grams"), checks.ngram)
        digests, sharing = _read(documents, ngrams, checks, verdicts, bar)
        before = ngrams.shares
        _drop_contaminated(documents, ngrams, sharing, checks.overlap, verdicts)
        if checks.has("exact"):
            _drop_exact(digests, verdicts)
        if checks.has("near"):
            _drop_near(documents, checks.near, verdicts, bar)
    for index in sharing:
        if verdicts["reason"][index] in (_code("exact"), _code("near")):
            ngrams.remove(documents[index])
    return Cleaning(documents, reference, checks, verdicts, ngrams.sizes, before, ngrams.shares)


def write_cleaned(cleaning: Cleaning, out: epath.PathLike) -> None:
    """Copies the corpora without what is dropped: one to `out` itself, several to `out`/LABEL.

    Raises:
      UserError: `out` exists, or no document of a corpus is kept.
    """
    corpora = cleaning.documents.corpora
    for label, corpus in corpora.items():
        if not len(cleaning.kept(label)):
            raise UserError(f"{corpus.path}: no document would be kept; name fewer checks, or leave the corpus out")
    if len(corpora) == 1:
        _write_corpus(cleaning, next(iter(corpora)), epath.Path(out))
        return
    with atomic_directory(out) as directory:
        for label in sorted(corpora):  # a corpus before one inside it
            _write_corpus(cleaning, label, directory / label)


def dropped_table(cleaning: Cleaning) -> Table:
    """A table of the corpora: documents and tokens, dropped documents by reason, and what is kept."""
    reasons = [reason for reason in REASONS if cleaning.checks.has(reason)]
    table = plain_table("corpus", ["documents", "tokens", *reasons, "kept documents", "kept tokens"])
    for label in cleaning.documents.corpora:
        described = cleaning.results(label)
        numbers = [described["documents"], described["tokens"], *described["dropped"].values()]
        kept = [described["kept_documents"], described["kept_tokens"]]
        table.add_row(label, *(f"{number:,}" for number in (*numbers, *kept)))
    return table


def overlap_table(cleaning: Cleaning) -> Table:
    """A table of the held-out corpora: how much of them the corpora hold, before and after cleaning."""
    above = f"above {cleaning.checks.overlap:.0%}"
    columns = ["documents", "too short", above, "after cleaning", "mean overlap", "after cleaning"]
    table = plain_table("held out", columns)
    for label in cleaning.held_out.corpora:
        overlap = cleaning.overlap(label)
        counts = [overlap[key] for key in ("documents", "too_short", "above_before", "above_after")]
        means = [overlap[key] for key in ("mean_before", "mean_after")]
        table.add_row(label, *(f"{count:,}" for count in counts), *(f"{mean:.1%}" for mean in means))
    return table


def _read(
    documents: Documents, ngrams: HeldOutNgrams, checks: Checks, verdicts: np.ndarray, bar: Progress
) -> tuple[np.ndarray, list[int]]:
    """Reads each document once: drops those that repeat an n-gram, and counts n-grams of held-out documents.

    Returns:
      The digests of documents, `DIGEST` [documents], and the indices of those that share n-grams with held-out ones.
    """
    digests, sharing = np.zeros(len(documents), DIGEST), []
    for index, ids in enumerate(bar.track(documents, description="documents")):
        if checks.has("repeated") and (repeats := most_repeats(ids, _REPEATED_NGRAM, checks.repeats)):
            times, n = repeats
            verdicts[index] = _code("repeated"), n, times
        if checks.has("exact"):
            digests[index] = document_digest(ids)
        if ngrams.add(ids):
            sharing.append(index)
    return digests, sharing


def _drop_contaminated(
    documents: Documents, ngrams: HeldOutNgrams, sharing: list[int], limit: float, verdicts: np.ndarray
) -> None:
    for index in sharing:
        if verdicts["reason"][index]:
            ngrams.remove(documents[index])
    ngrams.mark(limit)
    for index in sharing:
        match = None if verdicts["reason"][index] else ngrams.match(documents[index])
        if match is not None:
            ngrams.remove(documents[index])
            verdicts[index] = _code("contaminated"), match.document, match.share


def _drop_exact(digests: np.ndarray, verdicts: np.ndarray) -> None:
    remaining = np.flatnonzero(verdicts["reason"] == 0)
    first = remaining[first_occurrences(digests[remaining])]
    for index, original in zip(remaining[first != remaining], first[first != remaining], strict=True):
        verdicts[index] = _code("exact"), original, 1


def _drop_near(documents: Documents, threshold: float, verdicts: np.ndarray, bar: Progress) -> None:
    remaining = np.flatnonzero(verdicts["reason"] == 0).tolist()
    found = near_duplicates(documents, remaining, threshold)
    for duplicate in bar.track(found, total=len(remaining), description="near-duplicates"):
        if duplicate is not None:
            verdicts[duplicate.index] = _code("near"), duplicate.original, duplicate.similarity


def _write_corpus(cleaning: Cleaning, label: str, out: epath.Path) -> None:
    corpus = cleaning.documents.corpora[label]
    copy_documents(corpus, cleaning.kept(label).tolist(), out, card={"dropped": cleaning.counts(label)})


def _check_corpora(corpora: Mapping[str, Corpus], held_out: Mapping[str, Corpus]) -> None:
    check_one_tokenizer([*corpora.values(), *held_out.values()])
    digests = {corpus.digest: corpus.path for corpus in corpora.values()}
    for corpus in held_out.values():
        if corpus.digest in digests:
            raise UserError(f"{corpus.path}: is held out, and {digests[corpus.digest]} is the same; name it once")


def _code(reason: str) -> int:
    return 1 + REASONS.index(reason)


def _place(documents: Documents, index: int) -> dict[str, Any]:
    label, place = documents.place(index)
    return {"corpus": label, "index": place}
