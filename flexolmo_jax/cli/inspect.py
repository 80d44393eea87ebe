"""Says what a directory is: model, contribution or corpus; reads all of it and checks every digest.

    flexolmo inspect runs/merged
    flexolmo inspect corpora/web --check=false --samples=5

Of a corpus it shows how long documents are, how many are exact duplicates of others (with --check), and a few of them.
"""

from absl import flags

_CHECK = flags.DEFINE_bool("check", True, "Read everything and compare with the digests.")

_SAMPLES = flags.DEFINE_integer("samples", 3, "Number of documents of a corpus to show, shortened.", lower_bound=0)


def run(*paths: str) -> None:
    """Prints one description for each directory."""
    from flexolmo_jax.combine.inspect import describe
    from flexolmo_jax.errors import UserError
    from flexolmo_jax.tables import printable, show

    if not paths:
        raise UserError("no directory given; write `flexolmo inspect DIR`")
    for path in paths:
        facts, table = describe(path, _CHECK.value, _SAMPLES.value)
        width = max(map(len, facts))
        print("\n".join(f"{name:<{width}}  {printable(value)}" for name, value in facts.items()))
        show(table)
