"""Adds the statistics of corpora to a contribution or an anchor, by which a merge chooses experts.

    flexolmo statistics --source=runs/news/contribution --data=corpora/news --out=news-with-statistics
    flexolmo statistics --source=imported-anchor --data=corpora/public --out=anchor

`flexolmo train` does this at its end. This command is for what was trained before, elsewhere, or with
`config.publish.selector=` empty. It reads the corpora once and makes a copy; `flexolmo inspect` says what statistics
reveal of the text. With `--epsilon` they are noised (docs/privacy.md), differently each time: ship one copy alone.
"""

from absl import flags

_SOURCE = flags.DEFINE_string("source", None, "Contribution directory, or model directory of an anchor.", required=True)
_DATA = flags.DEFINE_multi_string(
    "data", [], "Corpus directory that it was trained on, but for public ones of an owner; give the flag once for each."
)
_OUT = flags.DEFINE_string("out", None, "Directory to make.", required=True)
_SELECTOR = flags.DEFINE_string("selector", "ngram", "Selector that the statistics are for.")
_EPSILON = flags.DEFINE_float("epsilon", 0.0, "Of differential privacy for each document; 0: statistics are exact.")
_DELTA = flags.DEFINE_float("delta", 1e-6, "Probability that epsilon does not hold; far below 1 / number of documents.")
_CLIP = flags.DEFINE_float("clip", 8.0, "With --epsilon, L2 norm to which a document's counts are scaled down.")


def run() -> None:
    """Reads the corpora and writes the copy."""
    from flexolmo_jax.combine.statistics import add_statistics
    from flexolmo_jax.errors import UserError

    if not _DATA.value:
        raise UserError("--data: none given; give the flag once for each corpus that it was trained on")
    privacy = {"epsilon": _EPSILON.value, "delta": _DELTA.value, "clip": _CLIP.value}
    add_statistics(_SOURCE.value, _DATA.value, _OUT.value, _SELECTOR.value, **privacy)
    print(f"{_OUT.value}: statistics for the selector {_SELECTOR.value}")
