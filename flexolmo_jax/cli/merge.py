r"""Merges contributions with the anchor they were trained on. Their order does not matter.

    flexolmo merge --anchor=runs/anchor/model --contribution=runs/news/contribution \
        --contribution=runs/code/contribution --out=runs/merged

A contribution that was made on another anchor, was altered since, or holds anything else is refused. Experts are chosen
by the statistics that came with them, or by the router (--selection). Leaves keep the anchor's dtypes; a contribution
in another one is rounded to them, once, and model.json says so beside the owner's digests. --dtype chooses one dtype
for all. Where two owners chose one name, give one another name in the model:

    flexolmo merge --anchor=anchor/model --contribution=a/contribution --contribution=news-b=b/contribution --out=merged

An owner joins later, or updates an expert, from the merged model and the new contribution alone. The result is that of
a merge from the start, byte for byte; a router that was tuned since is the merge's again:

    flexolmo merge --model=merged --contribution=legal/contribution --out=merged-2
    flexolmo merge --model=merged --contribution=news-v2/contribution --replace=news --out=merged-3
"""

from absl import flags

from flexolmo_jax.checkpoint import DTYPES

_ANCHOR = flags.DEFINE_string("anchor", None, "Model directory of the anchor.")
_MODEL = flags.DEFINE_string("model", None, "Model directory of a merged model to add to, in place of --anchor.")
_CONTRIBUTIONS = flags.DEFINE_multi_string(
    "contribution", [], "Contribution directory, or NAME=DIR to call its expert NAME; give the flag once for each."
)
_REPLACE = flags.DEFINE_multi_string(
    "replace", [], "Name of an expert of --model that a contribution of that name updates; give the flag once for each."
)
_OUT = flags.DEFINE_string("out", None, "Model directory to make.", required=True)
_TOP_K = flags.DEFINE_integer(
    "top_k",
    None,
    "Experts that compute each token; all of them, where there are fewer. By default 1, with the router 4, or as in "
    "--model.",
)
_METHOD = flags.DEFINE_string("method", None, 'How the experts are combined; by default "stack", or as in --model.')
_SELECTION = flags.DEFINE_string(
    "selection",
    None,
    'What chooses experts: "ngram", a selector, by default if the anchor has statistics for it; "router", by default '
    'if not; or "router+ngram", both. With --model by default as there.',
)
_DTYPE = flags.DEFINE_enum(
    "dtype", None, list(DTYPES), "Of all leaves; by default each has that of the anchor's, or of the --model's."
)


def run() -> None:
    """Merges, and says what the model holds."""
    from flexolmo_jax.checkpoint.manifests import STACK
    from flexolmo_jax.checkpoint.model_directory import read_model
    from flexolmo_jax.combine.contribution import parse_contribution
    from flexolmo_jax.combine.join import join
    from flexolmo_jax.combine.merge import merge
    from flexolmo_jax.errors import UserError

    anchor, model, out, top_k, dtype = _ANCHOR.value, _MODEL.value, _OUT.value, _TOP_K.value, _DTYPE.value
    if anchor and model:
        raise UserError(f"--model={model}: goes without --anchor; a merged model holds its anchor")
    if anchor and _REPLACE.value:
        raise UserError(f"--replace={_REPLACE.value[0]}: goes with --model, the merged model to update")
    source = model or anchor
    if not source:
        raise UserError("--anchor: not given; give it, or a merged --model to add to (see `flexolmo merge --help`)")
    if not _CONTRIBUTIONS.value:
        raise UserError("--contribution: none given; give the flag once for each contribution directory")
    contributions = [parse_contribution(value) for value in _CONTRIBUTIONS.value]
    if model:
        made = join(source, contributions, out, _REPLACE.value, top_k, dtype, _METHOD.value, _SELECTION.value)
    else:
        made = merge(source, contributions, out, top_k, dtype, _METHOD.value or STACK, _SELECTION.value)
    print(f"{out}: {', '.join(made.roster)}")
    if model and read_model(model).tuned:
        print("the router is the merge's again, its later tuning was undone")
