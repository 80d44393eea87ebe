r"""Imports a local Hugging Face directory: a dense model as an anchor, a mixture as a model or as a contribution.

    flexolmo import-hf --source=OLMo-2 --out=anchor
    flexolmo import-hf --source=Flex-7x7B --out=model --expert-names=code,math,news,papers,reddit,writing
    flexolmo import-hf --source=Flex-math-2x7B --as-contribution --anchor=anchor --expert=math --out=math

Reads OLMo-2 and FlexOlmo, sharded or not, with experts one by one or fused. What was written is compared with the
source, byte for byte, and, where torch and transformers are installed and the model fits in memory twice in float32,
the logits with those of transformers. A dense model has no router weights; an anchor takes those of a pair with
--router-weights-from=Flex-math-2x7B, and pairs that were trained against them are then contributions to it.
"""

from absl import flags

_SOURCE = flags.DEFINE_string("source", None, "Local directory in Hugging Face's form.", required=True)
_OUT = flags.DEFINE_string(
    "out", None, "Directory to make: a model, or a contribution with --as_contribution.", required=True
)
_NAMES = flags.DEFINE_list("expert_names", [], "Names of the experts after the first; by default expert1, ...")
_ROUTER_WEIGHTS = flags.DEFINE_string(
    "router_weights_from", None, "FlexOlmo directory whose first expert's router weights an anchor takes."
)
_CONTRIBUTION = flags.DEFINE_bool("as_contribution", False, "Make a contribution of the second of two experts.")
_ANCHOR = flags.DEFINE_string("anchor", None, "With --as_contribution: model directory of the anchor.")
_EXPERT = flags.DEFINE_string("expert", None, "With --as_contribution: name of the expert.")


def run() -> None:
    """Imports, and prints what was found."""
    from flexolmo_jax.errors import UserError
    from flexolmo_jax.interop.import_hf import import_contribution, import_model

    anchor, expert = _ANCHOR.value, _EXPERT.value
    contribution_flags = {"anchor": anchor, "expert": expert}
    model_flags = {"expert_names": _NAMES.value, "router_weights_from": _ROUTER_WEIGHTS.value}
    for name, value in (model_flags if _CONTRIBUTION.value else contribution_flags).items():
        if value:
            condition = "without" if _CONTRIBUTION.value else "with"
            raise UserError(f"--{name}: only {condition} --as_contribution")
    if _CONTRIBUTION.value:
        if not anchor or not expert:
            missing = "expert" if anchor else "anchor"
            raise UserError(f"--{missing}: not given; --as_contribution needs --anchor and --expert")
        contribution, lines = import_contribution(_SOURCE.value, anchor, expert, _OUT.value)
        roster = contribution.name
    else:
        manifest, lines = import_model(_SOURCE.value, _OUT.value, _NAMES.value, _ROUTER_WEIGHTS.value)
        roster = ", ".join(manifest.roster)
    print("\n".join([f"{_OUT.value}: {roster}", *lines]))
