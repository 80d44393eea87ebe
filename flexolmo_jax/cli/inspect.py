"""Says what a directory is: model, contribution or corpus; reads all of it and checks every digest.

    flexolmo inspect runs/merged
    flexolmo inspect corpora/web --check=false --samples=5
    flexolmo inspect --config=configs/flexmix.py:7b

Of a corpus it shows how long documents are, how many are exact duplicates of others (with --check), and a few of them.
Of a configuration it shows what the run would take of its data: of each source in each phase the tokens and epochs, the
documents that packing cuts, and the first sequences.
"""

from absl import flags
from ml_collections import config_flags

_CHECK = flags.DEFINE_bool("check", True, "Read everything and compare with the digests.")

_CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration of a run, as FILE or FILE:ARGUMENT.")
_SAMPLES = flags.DEFINE_integer(
    "samples", 3, "Number of documents of a corpus, or of sequences of a run, to show, shortened.", lower_bound=0
)


def run(*paths: str) -> None:
    """Prints one description for each directory, and of the data of a configuration."""
    from flexolmo_jax.combine.inspect import describe
    from flexolmo_jax.errors import UserError

    if not paths and _CONFIG.value is None:
        raise UserError("no directory given; write `flexolmo inspect DIR`, or --config=FILE")
    for path in paths:
        _print(*describe(path, _CHECK.value, _SAMPLES.value))
    if _CONFIG.value is not None:
        from flexolmo_jax.training.preview import describe_data

        _print(*describe_data(_CONFIG.value, _SAMPLES.value))


def _print(facts, table):
    from flexolmo_jax.tables import printable, show

    width = max(map(len, facts))
    print("\n".join(f"{name:<{width}}  {printable(value)}" for name, value in facts.items()))
    show(table)
