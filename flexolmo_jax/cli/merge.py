r"""Merges contributions with the anchor they were trained on. Their order does not matter.

    flexolmo merge --anchor=runs/anchor/model --contribution=runs/news/contribution \
        --contribution=runs/code/contribution --out=runs/merged

A contribution that was made on another anchor, was altered since, or holds anything else is refused. Leaves keep the
anchor's dtypes; a contribution in another one is rounded to them, once, and model.json says so beside the owner's
digests. --dtype chooses one dtype for all. Where two owners chose one name, give one another name in the model:

    flexolmo merge --anchor=anchor/model --contribution=a/contribution --contribution=news-b=b/contribution --out=merged
"""

from absl import flags

from flexolmo_jax.checkpoint import DTYPES

_ANCHOR = flags.DEFINE_string("anchor", None, "Model directory of the anchor.", required=True)
_CONTRIBUTIONS = flags.DEFINE_multi_string(
    "contribution", [], "Contribution directory, or NAME=DIR to call its expert NAME; give the flag once for each."
)
_OUT = flags.DEFINE_string("out", None, "Model directory to make.", required=True)
_TOP_K = flags.DEFINE_integer("top_k", 4, "Experts that compute each token; all of them, where there are fewer.")
_METHOD = flags.DEFINE_string("method", "stack", "How the experts are combined.")
_DTYPE = flags.DEFINE_enum("dtype", None, list(DTYPES), "Of all leaves; by default each has that of the anchor's.")


def run() -> None:
    """Merges, and says what the model holds."""
    from flexolmo_jax.combine.contribution import parse_contribution
    from flexolmo_jax.combine.merge import merge
    from flexolmo_jax.errors import UserError

    if not _CONTRIBUTIONS.value:
        raise UserError("--contribution: none given; give the flag once for each contribution directory")
    contributions = [parse_contribution(value) for value in _CONTRIBUTIONS.value]
    merged = merge(_ANCHOR.value, contributions, _OUT.value, _TOP_K.value, _DTYPE.value, _METHOD.value)
    print(f"{_OUT.value}: {', '.join(merged.roster)}")
