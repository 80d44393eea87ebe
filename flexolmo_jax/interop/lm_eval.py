"""The command line of lm-evaluation-harness, with the model `flexolmo` on its list (extra `eval`).

python -m flexolmo_jax.interop.lm_eval --model flexolmo --model_args path=DIR,without=news --tasks hellaswag
"""

import os
import sys

from flexolmo_jax.errors import UserError

PROGRAM = "lm_eval"


def main() -> None:
    """Registers the model and runs the harness; bad input ends in one line and exit status 2."""
    # Bootstrapped errors would otherwise be computed in forks of a process whose JAX threads do not survive them.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    try:
        from lm_eval.__main__ import cli_evaluate

        from flexolmo_jax.interop import harness  # noqa: F401  registers the model
    except ModuleNotFoundError as error:
        missing = str(error.name).partition(".")[0]
        _fail(f"{missing} is missing; pip install 'flexolmo-jax[eval]'")
    try:
        cli_evaluate()
    except UserError as error:
        _fail(str(error))


def _fail(message: str) -> None:
    sys.stderr.write(f"{PROGRAM}: {message}\n")
    sys.exit(2)


if __name__ == "__main__":
    main()
