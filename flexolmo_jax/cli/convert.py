"""Converts a directory of format 1, which earlier versions wrote, to format 2. Its digests are checked on the way.

    flexolmo convert --source=old/anchor --out=anchor
    flexolmo convert --source=old/news --anchor=old/anchor --out=news

A contribution names its anchor by a digest, so that its anchor (of format 1) is needed, too. Converting an anchor and
contributions and then merging them gives the same as converting their merge.
"""

from absl import flags

_SOURCE = flags.DEFINE_string("source", None, "Model or contribution directory of format 1.", required=True)
_ANCHOR = flags.DEFINE_string("anchor", None, "For a contribution: the model directory of its anchor, of format 1.")
_OUT = flags.DEFINE_string("out", None, "Directory to make.", required=True)


def run() -> None:
    """Converts, and says what was found."""
    from flexolmo_jax.checkpoint.convert import convert

    print("\n".join(convert(_SOURCE.value, _OUT.value, _ANCHOR.value)))
