"""`config.json` of Hugging Face: read into what fixes our model, and written from it."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from flexolmo_jax.checkpoint.manifests import DEFAULT_LENGTH, ModelManifest
from flexolmo_jax.errors import UserError
from flexolmo_jax.model.architecture import Architecture

CONFIG_FILE = "config.json"
DENSE, MIXTURE = "olmo2", "flex_olmo"
CLASSES = {DENSE: "Olmo2ForCausalLM", MIXTURE: "FlexOlmoForCausalLM"}
_KNOWN = [(model_type, [name]) for model_type, name in CLASSES.items()]
SEQUENCE_LENGTH = "sequence_length"  # in a data card, as training writes it
# Keys that would change what is computed: {key: the one value that is computed here}.
_FIXED = {"hidden_act": "silu", "attention_bias": False, "quantization_config": None}
_SIZES = {
    "vocab_size": "vocab_size",
    "num_layers": "num_hidden_layers",
    "d_model": "hidden_size",
    "num_heads": "num_attention_heads",
    "d_ff": "intermediate_size",
}


class Config(NamedTuple):
    """What a `config.json` says.

    Attributes:
      architecture: sizes and numerics.
      num_experts: the anchor included, or None for a dense model.
      top_k: experts that compute each token.
      eos_ids: the tokens that close a document, the first of which is used; none where it is not said.
      max_length: tokens in a row, at most.
    """

    architecture: Architecture
    num_experts: int | None
    top_k: int
    eos_ids: tuple[int, ...]
    max_length: int

    @property
    def eos_id(self) -> int | None:
        """The token that closes a document, or None where it is not said."""
        return self.eos_ids[0] if self.eos_ids else None


def read_config(directory: pathlib.Path) -> Config:
    """Reads and checks `config.json`.

    Raises:
      UserError: it is missing or damaged, or describes a model that is not computed here.
    """
    file = directory / CONFIG_FILE
    document = _read(file)
    model_type, named = document.get("model_type"), document.get("architectures")
    if (model_type, document.get("architectures", [CLASSES.get(str(model_type))])) not in _KNOWN:
        known = " or ".join(f"{_short(names)} ({kind})" for kind, names in _KNOWN)
        said = f"architectures is {_short(named)}, model_type {_short(model_type)}"
        raise UserError(f"{file}: {said}; only {known} is read")
    for key, value in _FIXED.items():
        if document.get(key) not in (None, value):
            raise UserError(f"{file}: {key} is {_short(document[key])}; only {_short(value)} is computed here")
    number = _Numbers(file, document)
    sizes = {ours: number.size(theirs) for ours, theirs in _SIZES.items()}
    kv_heads = number.size("num_key_value_heads", default=sizes["num_heads"])
    try:
        architecture = Architecture(
            **sizes,
            num_kv_heads=kv_heads,
            rope_theta=_rope_theta(number),
            norm_eps=number.positive("rms_norm_eps"),
            tied_embeddings=number.flag("tie_word_embeddings"),
            norm_topk_prob=model_type == MIXTURE and number.flag("norm_topk_prob"),
        )
    except UserError as error:
        raise UserError(str(error) if str(error).startswith(str(file)) else f"{file}: {error}") from None
    if number.size("head_dim", default=architecture.head_dim) != architecture.head_dim:
        raise UserError(f"{file}: head_dim is {document['head_dim']}; only hidden_size / num_attention_heads is read")
    num_experts, top_k = None, 1
    if model_type == MIXTURE:
        num_experts, top_k = number.size("num_experts"), number.size("num_experts_per_tok")
        if top_k > num_experts:
            raise UserError(f"{file}: num_experts_per_tok is {top_k}, of {num_experts} experts; give at most that")
    return Config(
        architecture,
        num_experts,
        top_k,
        _eos_ids(number, architecture.vocab_size),
        number.size("max_position_embeddings", default=DEFAULT_LENGTH),
    )


def config_document(manifest: ModelManifest, dtype: np.dtype) -> dict[str, Any]:
    """The `config.json` of a model, as transformers reads it; `dtype` is that of the weights."""
    arch = Architecture.from_dict(manifest.architecture, "the model")
    experts = len(manifest.experts)
    model_type = MIXTURE if experts > 1 else DENSE
    document = {
        "architectures": [CLASSES[model_type]],
        "model_type": model_type,
        **{theirs: getattr(arch, ours) for ours, theirs in _SIZES.items()},
        "num_key_value_heads": arch.num_kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": manifest.context_length,
        "rms_norm_eps": arch.norm_eps,
        # Readers older than `rope_parameters` look for the second.
        "rope_parameters": {"rope_type": "default", "rope_theta": arch.rope_theta},
        "rope_theta": arch.rope_theta,
        "tie_word_embeddings": arch.tied_embeddings,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        # Null rather than absent: an id here would take that row of the embedding out of training.
        "pad_token_id": None,
        "bos_token_id": manifest.eos_id,
        "eos_token_id": manifest.eos_id,
        "dtype": dtype.name,
    }
    if model_type == MIXTURE:
        document |= {
            "num_experts": experts,
            "num_experts_per_tok": min(manifest.top_k, experts),
            "norm_topk_prob": arch.norm_topk_prob,
            "output_router_logits": False,
            "router_aux_loss_coef": 0.0,
        }
    return document


def generation_document(manifest: ModelManifest) -> dict[str, Any]:
    """The `generation_config.json`: a document begins and ends with EOS, which pads as well."""
    return {f"{kind}_token_id": manifest.eos_id for kind in ("bos", "eos", "pad")}


class _Numbers(NamedTuple):
    """Typed access to the keys of a document."""

    file: pathlib.Path
    document: Mapping[str, Any]

    def size(self, key: str, default: int | None = None) -> int:
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"{self.file}: {key} is {_short(value)}; it must be a positive integer")
        return value

    def positive(self, key: str) -> float:
        value = self._value(key, None)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise UserError(f"{self.file}: {key} is {_short(value)}; it must be a positive number")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self._value(key, False)
        if not isinstance(value, bool):
            raise UserError(f"{self.file}: {key} is {_short(value)}; it must be true or false")
        return value

    def _value(self, key, default):
        value = self.document.get(key)
        if value is None and default is None:
            raise UserError(f"{self.file}: lacks {key}; copy it again from its source")
        return default if value is None else value


def _read(file: pathlib.Path) -> dict[str, Any]:
    if not file.is_file():
        raise UserError(f"{file}: no such file; give a directory in Hugging Face's form")
    try:
        document = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"{file}: damaged ({error}); copy it again from its source") from None
    if not isinstance(document, dict):
        raise UserError(f"{file}: damaged (no object); copy it again from its source")
    return document


def _rope_theta(number: _Numbers) -> float:
    """From `rope_parameters`, or, as older versions wrote it, from the top, beside `rope_scaling`."""
    theta = number
    for key in ("rope_parameters", "rope_scaling"):
        rope = number.document.get(key)
        if rope is None:
            continue
        if not isinstance(rope, dict) or not _is_default(rope):
            raise UserError(f"{number.file}: {key} is {_short(rope)}; only the default rope is computed here")
        if "rope_theta" in rope:
            theta = _Numbers(number.file, rope)
    return theta.positive("rope_theta")


def _is_default(rope: Mapping[str, Any]) -> bool:
    kinds = [rope[key] for key in ("rope_type", "type") if key in rope]
    return all(kind == "default" for kind in kinds) and rope.keys() <= {"rope_type", "type", "rope_theta"}


def _eos_ids(number: _Numbers, vocab_size: int) -> tuple[int, ...]:
    """`eos_token_id`: absent, an id, or several."""
    value = number.document.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(id) is int and 0 <= id < vocab_size for id in ids):
        raise UserError(f"{number.file}: eos_token_id is {_short(value)}; it must be an id below {vocab_size}")
    return tuple(ids)


def _short(value: Any) -> str:
    return json.dumps(value)[:120]
