"""Continues prompts, and prints each expert's share of the routing weight.

The continuation of a single prompt is streamed.

flexolmo generate --model=runs/merged --prompt="def main():" --without=news
"""

from absl import flags

from flexolmo_jax.cli import model_flags

_MODEL, _DTYPE, _MAX_LENGTH = model_flags.model(), model_flags.dtype(), model_flags.max_length()
_PROMPTS = flags.DEFINE_multi_string(
    "prompt",
    [],
    "Text to continue; give the flag once for each. The continuation of a single prompt is streamed.",
)
_WITHOUT = model_flags.without()
_TOKENS = flags.DEFINE_integer(
    "max_new_tokens",
    None,
    "Maximum number of new tokens; by default 64, or what fits in the context.",
    lower_bound=1,
)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "Of sampling; 0: greedy.", lower_bound=0.0)
_TOP_K = flags.DEFINE_integer("top_k", 0, "Sample from the k most likely tokens; 0: from all.", lower_bound=0)
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Sample from the fewest most likely tokens with this total probability.")
_MIN_P = flags.DEFINE_float(
    "min_p", 0.0, "Sample from tokens with at least this fraction of the largest probability; 0: from all."
)
_REPETITION = flags.DEFINE_float(
    "repetition_penalty",
    1.0,
    "Divides positive logits of tokens of the prompt and the continuation, and multiplies negative ones; 1: none.",
)
_PRESENCE = flags.DEFINE_float("presence_penalty", 0.0, "Is subtracted from the logits of tokens of the continuation.")
_FREQUENCY = flags.DEFINE_float("frequency_penalty", 0.0, "The same, once for each occurrence of the token.")
_STOP_IDS = flags.DEFINE_multi_integer(
    "stop_token_ids", [], "Token id that ends the continuation as EOS does; give the flag once for each."
)
_IGNORE_EOS = flags.DEFINE_bool("ignore_eos", False, "Continue after EOS, which ends a document.")
_STOP = flags.DEFINE_multi_string("stop", [], "Text that ends the continuation; give the flag once for each.")
_SEED = flags.DEFINE_integer("seed", 0, "Of sampling.", lower_bound=0, upper_bound=2**32 - 1)
_LAYERS = flags.DEFINE_bool("layers", False, "Print each expert's share in every layer.")
FLAG_OF = {"prompts": "prompt"}
MEMORY_REMEDY = "give fewer prompts, a lower --max_new_tokens, or --dtype=bfloat16"


def run() -> None:
    """Generates, and prints prompt, continuation and shares."""
    from flexolmo_jax.errors import UserError
    from flexolmo_jax.evaluation.results import routing_table
    from flexolmo_jax.inference.model import load
    from flexolmo_jax.inference.request import ContextError
    from flexolmo_jax.tables import show

    if not _PROMPTS.value:
        raise UserError("--prompt: none given; give the flag once for each text to continue")
    model = load(_MODEL.value, _DTYPE.value)
    streaming = len(_PROMPTS.value) == 1

    def write(text: str) -> None:
        print(text, end="", flush=True)

    try:
        continuations = model.generate(
            _PROMPTS.value,
            _TOKENS.value,
            _WITHOUT.value,
            _TEMPERATURE.value,
            _SEED.value,
            _TOP_K.value,
            _TOP_P.value,
            _STOP.value,
            on_text=_after(_PROMPTS.value[0], write) if streaming else None,
            min_p=_MIN_P.value,
            repetition_penalty=_REPETITION.value,
            presence_penalty=_PRESENCE.value,
            frequency_penalty=_FREQUENCY.value,
            stop_token_ids=_STOP_IDS.value,
            ignore_eos=_IGNORE_EOS.value,
            max_length=_MAX_LENGTH.value,
        )
    except ContextError as error:
        raise UserError(str(error).replace("max_", "--max_")) from error
    for prompt, continuation in zip(_PROMPTS.value, continuations, strict=True):
        if not streaming:
            write(f"{prompt}{continuation.text}")
        elif not continuation.text:
            write(prompt)
        shares = ", ".join(f"{name} {share:.0%}" for name, share in continuation.experts.items() if share)
        print(f"\n[{shares}]\n")
        if _LAYERS.value:
            show(routing_table(model.roster, continuation.layers))


def _after(prompt: str, write):
    """A callback for new text, which writes the prompt first: then the request has been accepted."""
    waiting = [prompt]

    def on_text(_: int, text: str) -> None:
        write((waiting.pop() if waiting else "") + text)

    return on_text
