"""Removes experts from a model for good, and writes a certificate of what that guarantees (certificate.json).

flexolmo opt-out --model=runs/merged --expert=news --out=runs/without-news
"""

from absl import flags

from flexolmo_jax.cli import model_flags

_MODEL = model_flags.model()
_EXPERTS = flags.DEFINE_multi_string("expert", [], "Name of an expert to remove; give the flag once for each.")
_OUT = flags.DEFINE_string("out", None, "Model directory to make.", required=True)
_KEEP = flags.DEFINE_bool(
    "keep_tuned_router", False, "Keep a router that was tuned after the merge, at the price of exactness."
)
FLAG_OF = {"names": "expert"}


def run() -> None:
    """Removes the experts, and prints the guarantee."""
    from flexolmo_jax.combine.opt_out import opt_out
    from flexolmo_jax.errors import UserError

    if not _EXPERTS.value:
        raise UserError("--expert: none given; give the flag once for each expert to remove")
    certificate = opt_out(_MODEL.value, _EXPERTS.value, _OUT.value, _KEEP.value)
    print(f"{_OUT.value}: {', '.join(expert['name'] for expert in certificate['remaining'])}")
    print(certificate["guarantee"])
