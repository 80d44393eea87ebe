r"""Imports a local Hugging Face directory: OLMo-2 as an anchor, FlexOlmo as a model or as a contribution.

    flexolmo import-hf --source=OLMo-2 --out=anchor
    flexolmo import-hf --source=Flex-7x7B --out=model --expert-names=code,math,news,papers,reddit,writing
    flexolmo import-hf --source=Flex-math-2x7B --as-contribution --anchor=anchor --expert=math --out=math

Sharded or not, experts one by one or fused. What was written is compared with the source, byte for byte, and, where
torch and transformers are installed and the model fits in memory twice in float32, the logits with theirs. A dense
model has no router row; a pair's public row is taken over with --public-rows-from=Flex-math-2x7B, and pairs made
against those rows are then contributions to it.
"""

from absl import flags

_SOURCE = flags.DEFINE_string("source", None, "Local directory in Hugging Face's form.")
_OUT = flags.DEFINE_string("out", None, "Directory to make: a model, or a contribution with --as_contribution.")
_NAMES = flags.DEFINE_list("expert_names", [], "Names of the experts after the first; by default expert1, ...")
_ROWS = flags.DEFINE_string("public_rows_from", None, "FlexOlmo directory whose first router rows an anchor takes.")
_CONTRIBUTION = flags.DEFINE_bool("as_contribution", False, "Make a contribution of the second of two experts.")
_ANCHOR = flags.DEFINE_string("anchor", None, "With --as_contribution: model directory of the anchor.")
_EXPERT = flags.DEFINE_string("expert", None, "With --as_contribution: name of the expert.")
flags.mark_flags_as_required(["source", "out"])


def run() -> None:
    """Imports, and says what was found."""
    from flexolmo_jax.errors import UserError

    contribution_flags = {"anchor": _ANCHOR.value, "expert": _EXPERT.value}
    model_flags = {"expert_names": _NAMES.value, "public_rows_from": _ROWS.value}
    for name, value in (model_flags if _CONTRIBUTION.value else contribution_flags).items():
        if value:
            fits = "without" if _CONTRIBUTION.value else "with"
            raise UserError(f"--{name}: only {fits} --as_contribution")
    if _CONTRIBUTION.value:
        from flexolmo_jax.interop.import_contribution import import_contribution

        missing = [name for name, value in contribution_flags.items() if not value]
        if missing:
            raise UserError(f"--{missing[0]}: not given; --as_contribution needs --anchor and --expert")
        contribution, lines = import_contribution(_SOURCE.value, _ANCHOR.value, _EXPERT.value, _OUT.value)
        holds = contribution.expert.name
    else:
        from flexolmo_jax.interop.import_hf import import_model

        manifest, lines = import_model(_SOURCE.value, _OUT.value, _NAMES.value, _ROWS.value)
        holds = ", ".join(manifest.roster)
    print("\n".join([f"{_OUT.value}: {holds}", *lines]))
