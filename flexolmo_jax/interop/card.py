"""The model card: what an exported directory says of itself (`README.md`). `card.md.jinja` is its Jinja2 template."""

import json
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import jinja2

from flexolmo_jax.checkpoint.manifests import ModelManifest
from flexolmo_jax.combine.inspect import full_name
from flexolmo_jax.combine.opt_out import imported_experts
from flexolmo_jax.interop import parity
from flexolmo_jax.interop.architectures import HuggingFaceArchitecture
from flexolmo_jax.tables import printable

CARD_FILE = "README.md"
# Of a data card, the keys that have a column of their own.
_COLUMNS = ("description", "license", "tokens", "trained_tokens")


def model_card(
    manifest: ModelManifest,
    kind: HuggingFaceArchitecture,
    *,
    parameters: Mapping[str, int],
    gate: parity.Parity,
    dropped: Mapping[str, Mapping[str, parity.Difference]],
    has_tokenizer: bool,
    flags: Sequence[str] = (),
) -> str:
    """Writes the card.

    Args:
      manifest: of the model, as it is exported.
      kind: of the exported directory.
      parameters: {expert: number of its parameters}; under "" those that all experts share.
      gate: what the parity gate found.
      dropped: {what was left out: {sample: change of the logits}}.
      has_tokenizer: whether the directory has one.
      flags: of the command, for what was left out.
    """
    experts = manifest.experts
    top_k = min(manifest.top_k, len(experts))
    largest = sorted((count for name, count in parameters.items() if name), reverse=True)[:top_k]
    casts = [*manifest.casts.values(), *(cast for expert in experts for cast in expert.casts.values())]
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=printable,
    )
    environment.filters |= {"number": _number, "cell": _cell, "full_name": full_name}
    source = resources.files("flexolmo_jax.interop").joinpath("card.md.jinja")
    return environment.from_string(source.read_text("utf-8")).render(
        is_merged=len(experts) > 1,
        is_imported=bool(imported_experts(manifest)),
        license=_license(manifest),
        class_name=kind.class_name,
        in_transformers=kind.in_transformers,
        selection=manifest.selection if kind.has_selector else "",
        architecture=manifest.architecture,
        experts=experts,
        top_k=top_k,
        parameters=parameters,
        total=sum(parameters.values()),
        active=parameters[""] + sum(largest),
        details=_details(manifest),
        anchor_digest=manifest.anchor_digest,
        casts=sorted({" to ".join(cast.dtypes) for cast in casts}),
        tuned_leaves=manifest.tuned.leaves if manifest.tuned else [],
        gate=gate,
        allowed=f"{parity.MAX_DIFFERENCE:g} and {parity.MAX_KL:g}",
        dropped=dropped,
        flags="".join(f" --{flag}" for flag in flags),
        has_tokenizer=has_tokenizer,
    )


def _license(manifest: ModelManifest) -> str:
    """The license for the front matter, which knows one; where there are several, the table says which."""
    licenses = list(dict.fromkeys(str(e.card["license"]) for e in manifest.experts if e.card.get("license")))
    return json.dumps(licenses[0] if len(licenses) == 1 else "other") if licenses else ""


def _details(manifest: ModelManifest) -> list[tuple[str, str, Any]]:
    """What the data cards say besides: (expert, key, value)."""
    return [
        (expert.name, key, value)
        for expert in manifest.experts
        for key, value in expert.card.items()
        if key not in _COLUMNS and value not in ("", None)
    ]


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else "-"


def _cell(value: Any) -> str:
    """Text for a cell of a table, on one line."""
    return " ".join(printable(_words(value)).split()).replace("|", "\\|") if value not in (None, "") else "-"


def _words(value: Any) -> str:
    """A value of a data card as text."""
    if isinstance(value, list):
        return ", ".join(map(_words, value))
    if isinstance(value, dict):
        return ", ".join(f"{key.replace('_', ' ')} {_words(part)}" for key, part in value.items())
    return f"{value:.3g}" if isinstance(value, float) else str(value)
