"""Finds documents of corpora to drop before training, and writes copies of the corpora without them.

    flexolmo clean --data=corpora/news/train --against=corpora/news/validation --against=corpora/news/test --out=clean
    flexolmo clean --data=corpora/news/train --data=corpora/code/train --near=0 --json=dropped.json

Four checks drop a document, each for one reason: it repeats an n-gram (repeated), it shares n-grams with held-out
documents (contaminated), or it is an exact or a near-duplicate (exact, near) of an earlier document, in the order of
the corpora. Without --out nothing is written. One corpus is written to --out itself, several to --out/LABEL, with the
labels of the table. docs/data.md has more.
"""

from absl import flags

_DATA = flags.DEFINE_multi_string("data", [], "Corpus directory to clean; give the flag once for each.")
_AGAINST = flags.DEFINE_multi_string(
    "against", [], "Held-out corpus directory, for validation or evaluation; give the flag once for each."
)
_OUT = flags.DEFINE_string("out", None, "Directory to make.")
_JSON = flags.DEFINE_string("json", None, "File to write the results to, with each document that is dropped, and why.")
_DROP = flags.DEFINE_list(
    "drop",
    None,
    "Reasons to drop documents for, separated by commas: repeated, contaminated, exact, near. By default all; "
    "contaminated needs --against.",
)
_REPEATS = flags.DEFINE_integer(
    "repeats", 32, "repeated: how often an n-gram of 1 to 13 tokens must occur in immediate succession."
)
_NGRAM = flags.DEFINE_integer("ngram", 13, "contaminated: tokens of the n-grams that are compared.")
_OVERLAP = flags.DEFINE_float(
    "overlap",
    0.5,
    "contaminated: drop documents until they hold no more than this share of any held-out document's n-grams.",
)
_NEAR = flags.DEFINE_float(
    "near", 0.8, "near: Jaccard similarity of sets of 5-grams from which documents are near-duplicates; 0: none are."
)


def run() -> None:
    """Checks the corpora, prints the tables, and writes the copies."""
    from flexolmo_jax.checkpoint.atomic import check_absent
    from flexolmo_jax.cli.files import write_json
    from flexolmo_jax.data.corpus import open_corpora
    from flexolmo_jax.data.curation.cleaning import REASONS, Checks, clean, dropped_table, overlap_table, write_cleaned
    from flexolmo_jax.errors import ArgumentError, UserError
    from flexolmo_jax.tables import show

    if not _DATA.value:
        raise UserError("--data: none given; give the flag once for each corpus to clean")
    usable = REASONS if _AGAINST.value else [reason for reason in REASONS if reason != "contaminated"]
    drop = usable if _DROP.value is None else _DROP.value
    if ("contaminated" in drop) != bool(_AGAINST.value):
        needed = "is not used without the reason contaminated" if _AGAINST.value else "none given"
        raise UserError(f"--against: {needed}; --drop=contaminated and --against go together")
    if not drop:
        raise ArgumentError("drop", "", f"use some of {', '.join(REASONS)}")
    checks = Checks(drop, _REPEATS.value, _NGRAM.value, _OVERLAP.value, _NEAR.value)
    if _OUT.value is not None:
        check_absent(_OUT.value)
    cleaning = clean(open_corpora(_DATA.value), open_corpora(_AGAINST.value), checks)
    show(dropped_table(cleaning))
    if _AGAINST.value:
        show(overlap_table(cleaning))
    if _JSON.value is not None:
        write_json(_JSON.value, cleaning.as_dict())
    if _OUT.value is not None:
        write_cleaned(cleaning, _OUT.value)
        print(f"{_OUT.value}: {sum(len(cleaning.kept(label)) for label in cleaning.documents.corpora):,} documents")
