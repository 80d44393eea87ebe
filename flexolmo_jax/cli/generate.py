"""Continues prompts, and prints each expert's share of the routing weight.

flexolmo generate --model=runs/merged --prompt="def main():" --without=news
"""

from absl import flags

_MODEL = flags.DEFINE_string("model", None, "Model directory.")
_PROMPTS = flags.DEFINE_multi_string("prompt", [], "Text to continue; give the flag once for each.")
_WITHOUT = flags.DEFINE_multi_string("without", [], "Name of an expert to leave out; give the flag once for each.")
_TOKENS = flags.DEFINE_integer("max_new_tokens", 64, "Tokens written at most.", lower_bound=1)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "Of sampling; 0: always the likeliest token.", lower_bound=0.0)
_SEED = flags.DEFINE_integer("seed", 0, "Of sampling.", lower_bound=0, upper_bound=2**32 - 1)
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of parameters and computation.")
flags.mark_flags_as_required(["model"])


def run() -> None:
    """Generates, and prints prompt, continuation and shares."""
    from flexolmo_jax.errors import UserError
    from flexolmo_jax.inference.model import load

    if not _PROMPTS.value:
        raise UserError("--prompt: none given; give the flag once for each text to continue")
    continuations = load(_MODEL.value, _DTYPE.value).generate(
        _PROMPTS.value, _TOKENS.value, _WITHOUT.value, _TEMPERATURE.value, _SEED.value
    )
    for prompt, continuation in zip(_PROMPTS.value, continuations, strict=True):
        shares = ", ".join(f"{name} {share:.0%}" for name, share in continuation.experts.items() if share)
        print(f"{prompt}{continuation.text}\n[{shares}]\n")
