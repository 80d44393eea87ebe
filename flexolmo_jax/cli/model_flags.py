"""Flags that `generate` and `serve` have in common."""

from typing import NamedTuple

from absl import flags

flags.disclaim_key_flags()  # the flags belong to the command that calls `define`


class ModelFlags(NamedTuple):
    """Holders of the values of the flags."""

    model: flags.FlagHolder[str]
    dtype: flags.FlagHolder[str]
    max_length: flags.FlagHolder[int | None]


def define() -> ModelFlags:
    """Defines --model, which is required, --dtype and --max_length."""
    model = flags.DEFINE_string("model", None, "Model directory.", required=True)
    dtype = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of parameters and computation.")
    max_length = flags.DEFINE_integer(
        "max_length",
        None,
        "Maximum number of tokens of a prompt and its continuation together; by default the model's context: the "
        "sequence length of the anchor's training, or 4096 if its data card does not have it.",
        lower_bound=2,
    )
    return ModelFlags(model, dtype, max_length)
