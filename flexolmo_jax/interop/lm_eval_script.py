"""The script `lm_eval` that this package brings: the harness's own, with the model `flexolmo` on its list.

The harness looks for no models outside of itself, so the script takes the place of the harness's.
"""

import sys


def main() -> None:
    """Runs the harness; one line and exit status 2 where it is not installed."""
    try:
        from flexolmo_jax.interop import lm_eval
    except ModuleNotFoundError as error:
        missing = error.name.partition(".")[0]
        sys.stderr.write(f"lm_eval: {missing} is missing; pip install 'flexolmo-jax[eval]'\n")
        sys.exit(2)
    lm_eval.main()
