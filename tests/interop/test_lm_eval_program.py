"""The command line of the harness where the harness is not installed."""

import subprocess
import sys

WITHOUT_HARNESS = """
import sys
sys.modules["lm_eval"] = None
from flexolmo_jax.interop.lm_eval import main
main()
"""


def test_it_names_the_extra_in_one_line():
    done = subprocess.run([sys.executable, "-c", WITHOUT_HARNESS], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "lm_eval: lm_eval is missing; pip install 'flexolmo-jax[eval]'\n"
