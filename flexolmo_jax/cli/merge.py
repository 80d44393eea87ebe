r"""Merges contributions with the anchor they were trained on. Their order does not matter.

    flexolmo merge --anchor=runs/anchor/model --contribution=runs/news/contribution \
        --contribution=runs/code/contribution --out=runs/merged

A contribution that was made on another anchor, or was altered since, is refused.
"""

from absl import flags

_ANCHOR = flags.DEFINE_string("anchor", None, "Model directory of the anchor.")
_CONTRIBUTIONS = flags.DEFINE_multi_string("contribution", [], "Contribution directory; give the flag once for each.")
_OUT = flags.DEFINE_string("out", None, "Model directory to make.")
_TOP_K = flags.DEFINE_integer("top_k", 4, "Experts that compute each token; all of them, where there are fewer.")
flags.mark_flags_as_required(["anchor", "out"])


def run() -> None:
    """Merges, and says what the model holds."""
    from flexolmo_jax.errors import UserError
    from flexolmo_jax.merging.merge import merge

    if not _CONTRIBUTIONS.value:
        raise UserError("--contribution: none given; give the flag once for each contribution directory")
    merged = merge(_ANCHOR.value, _CONTRIBUTIONS.value, _OUT.value, _TOP_K.value)
    print(f"{_OUT.value}: {', '.join(merged.roster)}")
