"""Answers the OpenAI API's requests for completions (`/v1/completions`, `/v1/models`) on this machine.

flexolmo serve --model=runs/merged

A request may also have `without` (names of experts to leave out), `top_k`, and `experts_per_layer`; each
answer says what share each expert had. There is no authentication: by default only this machine can connect.
"""

from absl import flags

_MODEL = flags.DEFINE_string("model", None, "Model directory.")
_NAME = flags.DEFINE_string("name", None, "What requests may call the model, besides the name of its directory.")
_HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen on.")
_PORT = flags.DEFINE_integer("port", 8000, "Port to listen on; 0: any that is free.", lower_bound=0, upper_bound=65535)
_SLOTS = flags.DEFINE_integer("slots", 8, "Sequences decoded at once.", lower_bound=1)
_QUEUE = flags.DEFINE_integer(
    "queue",
    32,
    "Sequences that may wait for a slot; requests beyond are told to try again.",
    lower_bound=1,
)
_MAX_LENGTH = flags.DEFINE_integer(
    "max_length",
    None,
    "Tokens of a prompt and its continuation together, at most; by default, a row of the anchor's training.",
    lower_bound=2,
)
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of parameters and computation.")
_VERBOSE = flags.DEFINE_boolean("verbose", False, "Log a line for each request.")
flags.mark_flags_as_required(["model"])
MEMORY_REMEDY = "give a lower --slots or --max_length, or --dtype=bfloat16"


def run() -> None:
    """Serves until SIGINT or SIGTERM."""
    from flexolmo_jax.serving.server import serve

    serve(
        _MODEL.value,
        name=_NAME.value,
        host=_HOST.value,
        port=_PORT.value,
        slots=_SLOTS.value,
        queue=_QUEUE.value,
        max_length=_MAX_LENGTH.value,
        dtype=_DTYPE.value,
        verbose=_VERBOSE.value,
    )
