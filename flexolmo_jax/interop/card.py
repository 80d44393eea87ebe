"""The model card: what an exported directory says of itself (`README.md`)."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from flexolmo_jax.checkpoint.manifests import Casts, ExpertRecord, ModelManifest
from flexolmo_jax.combine.opt_out import imported_experts
from flexolmo_jax.interop import parity
from flexolmo_jax.interop.architectures import HuggingFaceArchitecture
from flexolmo_jax.tables import printable

CARD_FILE = "README.md"
# Of a data card, the keys that have a column or a sentence of their own.
_COLUMNS = ("description", "license", "tokens", "trained_tokens")
_LOAD = """```python
from transformers import AutoModelForCausalLM{import_tokenizer}

model = AutoModelForCausalLM.from_pretrained("DIRECTORY", dtype="auto"){load_tokenizer}
```"""
_BEGINNING = """A document begins after EOS. `flexolmo generate` and `flexolmo serve` put it in front of a text;
with transformers, `[tokenizer.eos_token_id] + tokenizer(text, add_special_tokens=False).input_ids` gives the same."""


class _Origin(NamedTuple):
    """Sentences about experts, by how they came together: what they are, how they were merged, what opt-out gives."""

    experts: str
    merge: str
    opt_out: str


_MERGED = _Origin(
    " The first is the public anchor; the others started from it, and each was trained by the owner of its data, apart "
    "from the others.",
    "The experts' feed-forwards and router weights were stacked, sorted by name, without training "
    "([FlexOlmo](https://arxiv.org/abs/2507.07024))",
    """The result is, byte for byte, what the merge would have been without that expert, unless more than the router was
trained after it; `certificate.json` says which holds.""",
)
_IMPORTED = _Origin(
    "",
    "The experts were imported as one model; what was trained together before that is not known",
    """The result is, byte for byte, the imported model without that expert, unless more than the router was trained
after the import. What was trained together before the import is not known; `certificate.json` says so.""",
)


def model_card(
    manifest: ModelManifest,
    kind: HuggingFaceArchitecture,
    *,
    parameters: Mapping[str, int],
    gate: parity.Parity,
    dropped: Mapping[str, parity.Difference],
    has_tokenizer: bool,
) -> str:
    """Writes the card.

    Args:
      manifest: of the model, as it is exported.
      kind: of the exported directory.
      parameters: {expert: number of its parameters}; under "" those that all experts share.
      gate: what the parity gate found.
      dropped: {sample: change of the logits} where biases were left out.
      has_tokenizer: whether the directory has one.
    """
    merged = len(manifest.experts) > 1
    sections = [
        _front_matter(manifest),
        f"# FlexOlmo: {', '.join(manifest.roster)}" if merged else f"# FlexOlmo anchor ({kind.class_name})",
        _introduction(manifest, parameters),
        "## Experts" if merged else "## Data",
        _roster(manifest, parameters),
        *_details(manifest),
        *(
            ["## How it was merged", _merge(manifest), "## Leaving an expert out", _opt_out(manifest, bool(dropped))]
            if merged
            else []
        ),
        *_loading(manifest, kind, has_tokenizer),
        "## Checks",
        _checks(gate, dropped),
    ]
    return "\n\n".join(sections) + "\n"


def _loading(manifest: ModelManifest, kind: HuggingFaceArchitecture, has_tokenizer: bool) -> list[str]:
    code = _LOAD.format(
        import_tokenizer=", AutoTokenizer" if has_tokenizer else "",
        load_tokenizer='\ntokenizer = AutoTokenizer.from_pretrained("DIRECTORY")' if has_tokenizer else "",
    )
    vllm = f"vllm serve DIRECTORY{' --model-impl transformers' if _normalized(manifest) else ''}"
    readers = f"transformers 5 or newer loads it, and so does vLLM: `{vllm}`."
    return [
        "## Loading it",
        *([code] if kind.in_transformers else []),
        _BEGINNING if has_tokenizer else "It has no tokenizer, so it takes and gives token ids.",
        readers if kind.in_transformers else f"It is a {kind.class_name}, which transformers does not compute.",
    ]


def _front_matter(manifest: ModelManifest) -> str:
    licenses = list(dict.fromkeys(str(e.card["license"]) for e in manifest.experts if e.card.get("license")))
    # Front matter knows one license; where there are several, the table says which.
    license_line = [f"license: {json.dumps(licenses[0] if len(licenses) == 1 else 'other')}"] if licenses else []
    tags = ["flexolmo", "mixture-of-experts"] if len(manifest.experts) > 1 else ["flexolmo", "anchor"]
    lines = [*license_line, "library_name: transformers", "pipeline_tag: text-generation", "tags:"]
    return "\n".join(["---", *lines, *(f"- {tag}" for tag in tags), "---"])


def _introduction(manifest: ModelManifest, parameters: Mapping[str, int]) -> str:
    total, arch = sum(parameters.values()), manifest.architecture
    shape = f"{arch['num_layers']} layers of width {arch['d_model']}, vocabulary {arch['vocab_size']:,}"
    if len(manifest.experts) == 1:
        return (
            f"A dense model of {total:,} parameters ({shape}): the public anchor that owners of closed data train "
            "their experts on."
        )
    top_k = min(manifest.top_k, len(manifest.experts))
    active = sum(sorted((count for name, count in parameters.items() if name), reverse=True)[:top_k])
    return (
        f"A mixture of {len(manifest.experts)} experts, {total:,} parameters, of which "
        f"{parameters[''] + active:,} compute each token (top {top_k}; {shape}).{_origin(manifest).experts}"
    )


def _origin(manifest: ModelManifest) -> _Origin:
    return _IMPORTED if imported_experts(manifest) else _MERGED


def _roster(manifest: ModelManifest, parameters: Mapping[str, int]) -> str:
    lines = [["expert", "digest", "parameters", "tokens", "trained tokens", "license", "data"]]
    for expert in manifest.experts:
        card = expert.card
        counts = [_number(card.get(key)) for key in ("tokens", "trained_tokens")]
        texts = [_cell(card.get(key)) for key in ("license", "description")]
        lines.append([_called(expert), f"`{expert.digest[:12]}`", _number(parameters[expert.name]), *counts, *texts])
    return _table(lines) + f"\n\nAll experts share {parameters['']:,} parameters (attention, norms, embeddings)."


def _details(manifest: ModelManifest) -> list[str]:
    """What the data cards say besides."""
    lines = [
        [expert.name, _cell(key.replace("_", " ")), _cell(value)]
        for expert in manifest.experts
        for key, value in expert.card.items()
        if key not in _COLUMNS and value not in ("", None)
    ]
    return [_table([["expert", "data card", ""], *lines])] if lines else []


def _called(expert: ExpertRecord) -> str:
    """The name in the roster, and its owner's where that is another."""
    return expert.name if expert.owner_name == expert.name else f"{expert.name} (its owner's {expert.owner_name})"


def _all_casts(manifest: ModelManifest) -> list[Casts]:
    return [manifest.casts, *(expert.casts for expert in manifest.experts)]


def _merge(manifest: ModelManifest) -> str:
    top_k = min(manifest.top_k, len(manifest.experts))
    lines = [
        f"{_origin(manifest).merge}; {top_k} of {len(manifest.experts)} compute each token.",
        "",
        f"- anchor: `{manifest.anchor_digest}`",
        *(f"- {_called(expert)}: `{expert.digest}`" for expert in manifest.experts[1:]),
    ]
    dtypes = {" to ".join(c.dtypes) for casts in _all_casts(manifest) for c in casts.values()}
    if dtypes:
        lines += [
            "",
            f"Weights were cast from {', '.join(sorted(dtypes))}; the digests are those of what was published.",
        ]
    if manifest.tuned:
        lines += ["", f"Changed since: {', '.join(f'`{leaf}`' for leaf in manifest.tuned.leaves)}."]
    return "\n".join(lines)


def _opt_out(manifest: ModelManifest, drop_bias: bool) -> str:
    name, flag = manifest.roster[1], " --drop_bias" if drop_bias else ""
    return f"""An expert is removed in the form that the model was merged in, and the rest exported again:

    flexolmo import-hf --source=DIRECTORY --out=model
    flexolmo opt-out --model=model --expert={name} --out=model-without-{name}
    flexolmo export-hf --model=model-without-{name} --out=DIRECTORY-without-{name}{flag}

{_origin(manifest).opt_out}"""


def _checks(gate: parity.Parity, dropped: Mapping[str, parity.Difference]) -> str:
    lines = [f"- Read back: the {gate.tensors} tensors of this directory have the digests of the model's leaves."]
    if gate.logits:
        lines.append(
            f"- Logits of transformers and of flexolmo-jax, float32, random tokens: {gate.logits} "
            f"(allowed: {parity.MAX_DIFFERENCE:g} and {parity.MAX_KL:g})."
        )
    else:
        lines.append(f"- The logits were not compared with those of transformers: {gate.compared}.")
    if dropped:
        lines.append(
            "- The model's experts had biases in the router, for which this form has no place. They were left out "
            "(`--drop_bias`). What that changes in the logits:"
        )
        lines += [f"  - {sample}: {change}" for sample, change in dropped.items()]
    return "\n".join(lines)


def _normalized(manifest: ModelManifest) -> bool:
    return bool(manifest.architecture.get("norm_topk_prob"))


def _table(lines: Sequence[Sequence[str]]) -> str:
    head, *body = lines
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *body])


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
