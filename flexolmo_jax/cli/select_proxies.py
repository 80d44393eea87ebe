r"""Selects public documents that are like an owner's, for others to train on in place of the owner's text.

    flexolmo select-proxies --own=corpora/news --public=corpora/public --out=news-proxies --documents=1000
    flexolmo select-proxies --own=corpora/news --public=corpora/public --out=news-proxies --tokens=1000000 \
        --report=private/news-proxies.json

A data owner runs it. A classifier learns to tell the owner's documents from public ones, and ranks the public ones; of
the best, those are chosen that differ from each other. The owner ships --out: public documents, and their indices in
--public. It holds nothing of --own, but the choice tells what kind of text that is; --report shows how much, and stays
with the owner (docs/data.md). It needs scikit-learn: pip install 'flexolmo-jax[data]'.
"""

import os

from absl import flags

_OWN = flags.DEFINE_string("own", None, "Corpus directory of the owner's documents.", required=True)
_PUBLIC = flags.DEFINE_string("public", None, "Corpus directory of public documents to choose from.", required=True)
_OUT = flags.DEFINE_string("out", None, "Corpus directory to make, of public documents.", required=True)
_DOCUMENTS = flags.DEFINE_integer("documents", None, "Number of documents to choose; or give --tokens.")
_TOKENS = flags.DEFINE_integer("tokens", None, "Number of tokens that the chosen documents have together, at least.")
_DIVERSITY = flags.DEFINE_float(
    "diversity", 0.9, "From 0, the documents most like the owner's, to 1: how much they shall differ from each other."
)
_EMBEDDER = flags.DEFINE_string(
    "embedder",
    None,
    "A .npy of token embeddings [tokens, dimensions]: documents are compared by the mean of these. By default, by "
    "n-grams of tokens.",
)
_REPORT = flags.DEFINE_string("report", None, "JSON file to write on what the choice reveals; it stays with the owner.")


def run() -> None:
    """Selects, reports, and writes the corpus."""
    from flexolmo_jax.checkpoint.atomic import check_absent
    from flexolmo_jax.data.corpus import Corpus
    from flexolmo_jax.errors import UserError

    try:
        from flexolmo_jax.data.curation.proxies import select_proxies
    except ModuleNotFoundError as error:
        raise UserError("it needs scikit-learn; pip install 'flexolmo-jax[data]'") from error

    check_absent(_OUT.value)
    if _REPORT.value:
        _check_apart(_REPORT.value, _OUT.value)
    if (_DOCUMENTS.value is None) == (_TOKENS.value is None):
        raise UserError("--documents or --tokens: says how much to choose; give one of the two")
    selection = select_proxies(
        Corpus.open(_OWN.value),
        Corpus.open(_PUBLIC.value),
        documents=_DOCUMENTS.value,
        tokens=_TOKENS.value,
        diversity=_DIVERSITY.value,
        embedder=_EMBEDDER.value,
    )
    if _REPORT.value:
        _report(selection, _REPORT.value)
    corpus = selection.write(_OUT.value)
    accuracy = selection.accuracy
    print(f"classifier, on unseen documents: accuracy {accuracy.accuracy:.1%}, ROC AUC {accuracy.auc:.3f}")
    print(
        f"{_OUT.value}: {corpus.documents:,} documents, {corpus.tokens:,} tokens, "
        f"of {len(selection.public):,} documents of {_PUBLIC.value}"
    )


def _check_apart(report, out):
    """Raises UserError where the report would be shipped with the proxies."""
    from flexolmo_jax.errors import UserError

    if os.path.realpath(report).startswith(os.path.join(os.path.realpath(out), "")):
        raise UserError(f"--report={report}: lies in --out, which is shipped; name a file that stays with the owner")


def _report(selection, file):
    """Writes what the list reveals to a file, and prints it."""
    from flexolmo_jax.cli.files import write_json
    from flexolmo_jax.data.curation.disclosure import COPY, disclosure, disclosure_tables
    from flexolmo_jax.tables import show

    report = disclosure(selection)
    write_json(file, report)
    for table in disclosure_tables(report):
        show(table)
    copies = report["nearest"]["near_copies"]
    print(f"near copies of the owner's documents in the list (cosine of {COPY} or more): {copies:,}")
