"""Answers the OpenAI API's requests for completions, chat completions and models on this machine.

flexolmo serve --model=runs/merged

A request may also have `without` (names of experts to leave out), and each answer says what share each expert had.
Keys for clients stand in --api_key_file, or one in the environment variable FLEXOLMO_API_KEY; without any, whoever can
connect may ask, which by default is this machine alone. docs/serving.md has the endpoints and their fields.
"""

import os

from absl import flags

from flexolmo_jax.cli import model_flags

_MODEL, _DTYPE, _MAX_LENGTH = model_flags.model(), model_flags.dtype(), model_flags.max_length()
_NAME = flags.DEFINE_string("name", None, "Name of the model in requests, besides the name of its directory.")
_HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen on.")
_PORT = flags.DEFINE_integer("port", 8000, "Port to listen on; 0: any that is free.", lower_bound=0, upper_bound=65535)
_SLOTS = flags.DEFINE_integer("slots", 8, "Number of sequences decoded at once.", lower_bound=1)
_QUEUE = flags.DEFINE_integer(
    "queue",
    32,
    "Number of sequences that may wait for a slot; further requests get status 429.",
    lower_bound=1,
)
_KEYS = flags.DEFINE_string(
    "api_key_file",
    None,
    "Text file of API keys, one per line; a request must send one of them, or the one in the environment variable "
    "FLEXOLMO_API_KEY.",
)
_ORIGINS = flags.DEFINE_multi_string(
    "cors_origin",
    [],
    "Origin whose pages may send requests from a browser, such as http://localhost:3000, or *; give the flag once for "
    "each.",
)
_VERBOSE = flags.DEFINE_boolean("verbose", False, "Log a line for each request, and tracebacks of errors.")
_VARIABLE = "FLEXOLMO_API_KEY"
FLAG_OF = {"origins": "cors_origin"}
MEMORY_REMEDY = "give a lower --slots or --max_length, or --dtype=bfloat16"


def run() -> None:
    """Serves until SIGINT or SIGTERM."""
    from flexolmo_jax.serving.middleware import read_keys
    from flexolmo_jax.serving.server import serve

    keys = read_keys(_KEYS.value, os.environ.get(_VARIABLE), _VARIABLE)
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
        keys=keys,
        origins=_ORIGINS.value,
    )
