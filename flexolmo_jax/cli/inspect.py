"""Says what a directory is: model, contribution or corpus; reads all of it and checks every digest.

flexolmo inspect runs/merged
"""

from absl import flags

_CHECK = flags.DEFINE_bool("check", True, "Read everything and compare with the digests.")


def run(*paths: str) -> None:
    """Prints one description for each directory."""
    from flexolmo_jax.combine.inspect import describe
    from flexolmo_jax.errors import UserError
    from flexolmo_jax.tables import printable, show

    if not paths:
        raise UserError("no directory given; write `flexolmo inspect DIR`")
    for path in paths:
        facts, table = describe(path, check=_CHECK.value)
        width = max(map(len, facts))
        print("\n".join(f"{name:<{width}}  {printable(value)}" for name, value in facts.items()))
        if table:
            show(table)
