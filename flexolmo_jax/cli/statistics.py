"""Adds the statistics of corpora to a contribution or an anchor, by which a merge chooses experts.

    flexolmo statistics --source=runs/news/contribution --data=corpora/news --out=news-with-statistics
    flexolmo statistics --source=imported-anchor --data=corpora/public --out=anchor

`flexolmo train` does this at its end. This command is for what was trained before, elsewhere, or with
`config.publish.selector=` empty. It reads the corpora once and makes a copy; `flexolmo inspect` says what statistics
reveal of the text.
"""

from absl import flags

_SOURCE = flags.DEFINE_string("source", None, "Contribution directory, or model directory of an anchor.", required=True)
_DATA = flags.DEFINE_multi_string(
    "data", [], "Corpus directory that it was trained on, but for public ones of an owner; give the flag once for each."
)
_OUT = flags.DEFINE_string("out", None, "Directory to make.", required=True)
_SELECTOR = flags.DEFINE_string("selector", "ngram", "Selector that the statistics are for.")


def run() -> None:
    """Reads the corpora and writes the copy."""
    from flexolmo_jax.combine.statistics import add_statistics
    from flexolmo_jax.errors import UserError

    if not _DATA.value:
        raise UserError("--data: none given; give the flag once for each corpus that it was trained on")
    add_statistics(_SOURCE.value, _DATA.value, _OUT.value, _SELECTOR.value)
    print(f"{_OUT.value}: statistics for the selector {_SELECTOR.value}")
