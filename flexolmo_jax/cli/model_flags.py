"""Flags that commands which compute a model have in common. Each function defines one and returns its holder."""

from absl import flags

flags.disclaim_key_flags()  # the flags belong to the command that calls these functions


def model() -> flags.FlagHolder[str]:
    """Defines --model, which is required."""
    return flags.DEFINE_string("model", None, "Model directory.", required=True)


def dtype() -> flags.FlagHolder[str]:
    """Defines --dtype, float32 by default."""
    return flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of parameters and computation.")


def without() -> flags.FlagHolder[list[str]]:
    """Defines --without, which may be given several times."""
    return flags.DEFINE_multi_string("without", [], "Name of an expert to leave out; give the flag once for each.")


def max_length() -> flags.FlagHolder[int | None]:
    """Defines --max_length, of decoding."""
    return flags.DEFINE_integer(
        "max_length",
        None,
        "Maximum number of tokens of a prompt and its continuation together; by default the model's context: the "
        "sequence length of the anchor's training, or 4096 if its data card does not have it.",
        lower_bound=2,
    )
