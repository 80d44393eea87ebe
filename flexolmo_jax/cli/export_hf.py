r"""Exports a model, an anchor, or an anchor with a contribution, in Hugging Face's form.

    flexolmo export-hf --model=runs/merged --out=Flex-merged
    flexolmo export-hf --contribution=runs/news/contribution --anchor=runs/anchor/model --out=Flex-news-2x

transformers and vLLM load the result; its README.md describes it. It is read back and compared with the model's
digests, and its logits with ours where torch and transformers are installed and the model fits in memory twice in
float32. import-hf makes the same model of it again. Weights keep their dtype, unless --dtype names another; then they
are rounded to it, once, and the folder flexolmo/ keeps the digests from before.

The published form has no selector. --keep-selector writes a form that has, with its code in PyTorch beside the weights:
AutoModelForCausalLM.from_pretrained(DIRECTORY, trust_remote_code=True) loads it, and vLLM does not.
"""

import math

from absl import flags

from flexolmo_jax.checkpoint import DTYPES

_MODEL = flags.DEFINE_string("model", None, "Anchor or model directory.")
_CONTRIBUTION = flags.DEFINE_string("contribution", None, "Contribution directory, with --anchor, in place of --model.")
_ANCHOR = flags.DEFINE_string("anchor", None, "Model directory of the contribution's anchor.")
_OUT = flags.DEFINE_string("out", None, "Local directory to make.", required=True)
_SHARD_SIZE = flags.DEFINE_float("shard_size", 5.0, "Size of a file of weights at most, GB (1e9 bytes).", 1e-9)
_DTYPE = flags.DEFINE_enum("dtype", None, list(DTYPES), "Of all weights; by default as they are.")
_MODEL_TYPE = flags.DEFINE_string(
    "model_type", None, "Architecture, as in config.json; by default olmo2 for an anchor, flex_olmo for a merged model."
)
_DROP_BIAS = flags.DEFINE_bool("drop_bias", False, "Leave out expert biases, and measure what that changes.")
_DROP_SELECTOR = flags.DEFINE_bool(
    "drop_selector", False, "Leave experts to the router where a selector chooses them, and measure what that changes."
)
_KEEP_SELECTOR = flags.DEFINE_bool(
    "keep_selector", False, "Keep the selector, and biases, in a form with code of its own, which vLLM cannot load."
)


def run() -> None:
    """Exports, and prints what was found."""
    from flexolmo_jax.errors import UserError
    from flexolmo_jax.interop.export_hf import export, open_pair, open_source

    model, contribution, anchor = _MODEL.value, _CONTRIBUTION.value, _ANCHOR.value
    if math.isnan(_SHARD_SIZE.value):
        raise UserError("--shard_size=nan: is no number; give the size of a file at most, in GB")
    if model and not contribution and not anchor:
        source = open_source(model, _DTYPE.value)
    elif contribution and anchor and not model:
        source = open_pair(contribution, anchor, _DTYPE.value)
    else:
        raise UserError("--model: give either a model directory, or both --contribution and --anchor")
    shard_bytes = int(min(_SHARD_SIZE.value, 1e9) * 1e9)
    lines = export(
        source,
        _OUT.value,
        shard_bytes,
        drop_bias=_DROP_BIAS.value,
        model_type=_MODEL_TYPE.value,
        drop_selector=_DROP_SELECTOR.value,
        keep_selector=_KEEP_SELECTOR.value,
    )
    print("\n".join(lines))
