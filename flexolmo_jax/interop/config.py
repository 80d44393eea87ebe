"""`config.json` in Hugging Face's form, as pydantic models whose fields have our names and whose aliases are the keys.

A subclass of `CausalLMConfig` describes one architecture. It declares the keys that differ; reading, checking and
writing follow from the fields.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple, Self

import pydantic
from pydantic import Field

from flexolmo_jax.checkpoint.manifests import BY_ROUTER, DEFAULT_LENGTH
from flexolmo_jax.errors import UserError
from flexolmo_jax.model.architecture import Architecture
from flexolmo_jax.model.selectors import DECAY, NgramSelector

CONFIG_FILE = "config.json"
SEQUENCE_LENGTH = "sequence_length"  # in a data card, as training writes it

# The description of a field completes the error "FILE: KEY is VALUE; ...".
_A_SIZE, _A_NUMBER = "it must be a positive integer, at most 2**31 - 1", "it must be a positive number"
_DEFAULT_ROPE = "only the default rope is computed here"
Size = Annotated[int, Field(strict=True, ge=1, le=2**31 - 1, description=_A_SIZE)]
Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False, description=_A_NUMBER)]
Flag = Annotated[bool, Field(strict=True, description="it must be true or false")]


class Rope(pydantic.BaseModel):
    """The rotary embedding: the default one, of which only the base is free."""

    model_config = pydantic.ConfigDict(extra="forbid")

    rope_type: Literal["default"] = "default"
    type: Literal["default"] | None = None
    rope_theta: Positive | None = Field(None, description=_A_NUMBER)


class CausalLMConfig(pydantic.BaseModel):
    """What a `config.json` holds of what is computed here; null counts as absent, and unknown keys are ignored.

    The fields that `Architecture` has too fix the model.
    """

    model_config = pydantic.ConfigDict(frozen=True)

    vocab_size: Size
    num_layers: Size = Field(alias="num_hidden_layers")
    d_model: Size = Field(alias="hidden_size")
    num_heads: Size = Field(alias="num_attention_heads")
    num_kv_heads: Size | None = Field(None, alias="num_key_value_heads", description=_A_SIZE)  # default: num_heads
    d_ff: Size = Field(alias="intermediate_size")
    norm_eps: Positive = Field(alias="rms_norm_eps")
    tied_embeddings: Flag = Field(False, alias="tie_word_embeddings")
    norm_topk_prob: Flag = False
    max_length: Size = Field(DEFAULT_LENGTH, alias="max_position_embeddings")
    eos_ids: tuple[int, ...] = Field((), alias="eos_token_id", description="it must be a token id, or a list of them")
    head_dim: Size | None = Field(None, description=_A_SIZE)
    # Versions before `rope_parameters` have `rope_scaling`, and `rope_theta` at the top.
    rope_parameters: Rope | None = Field(None, description=_DEFAULT_ROPE)
    rope_scaling: Rope | None = Field(None, description=_DEFAULT_ROPE)
    rope_theta: Positive | None = Field(None, description=_A_NUMBER)
    # Keys that would change what is computed, and their only value here.
    hidden_act: Literal["silu"] = Field("silu", description='only "silu" is computed here')
    attention_bias: Literal[False] = Field(False, description="only false is computed here")
    quantization_config: None = Field(None, description="only null is computed here")

    @pydantic.model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, document: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in document.items() if value is not None}

    @pydantic.field_validator("eos_ids", mode="before")
    @classmethod
    def _as_tuple(cls, value: Any) -> Any:
        ids = tuple(value) if isinstance(value, list | tuple) else (value,)
        if not all(type(token) is int and token >= 0 for token in ids):
            raise ValueError("no token id")
        return ids

    def experts(self) -> tuple[int | None, int]:
        """(number of experts, or None in a dense model; how many compute each token)."""
        return None, 1

    def chosen_by(self) -> str:
        """What chooses the experts, one of `selectors.SELECTIONS`."""
        return BY_ROUTER

    def architecture(self) -> Architecture:
        """The model's architecture; raises UserError where sizes do not fit together."""
        ropes = [rope for rope in (self.rope_parameters, self.rope_scaling, self) if rope and rope.rope_theta]
        if not ropes:
            raise UserError("lacks rope_theta; copy it again from its source")
        derived = {"rope_theta": ropes[0].rope_theta, "num_kv_heads": self.num_kv_heads or self.num_heads}
        names = {field.name for field in dataclasses.fields(Architecture)} & type(self).model_fields.keys()
        return Architecture(**{name: getattr(self, name) for name in names} | derived)

    def problem(self) -> str | None:
        """What is wrong between keys that are each valid, or None."""
        key = _key(type(self), "eos_ids")
        if any(token >= self.vocab_size for token in self.eos_ids):
            ids = self.eos_ids[0] if len(self.eos_ids) == 1 else list(self.eos_ids)
            return f"{key} is {short(ids)}; it must be an id below {self.vocab_size}"
        if self.head_dim not in (None, self.d_model // self.num_heads):
            size, heads = (_key(type(self), name) for name in ("d_model", "num_heads"))
            return f"head_dim is {self.head_dim}; only {size} / {heads} is read"
        return None

    @classmethod
    def of(cls, architecture: Architecture, **values: Any) -> Self:
        """The config of a model: its architecture, and other fields by name."""
        fields = {name: value for name, value in dataclasses.asdict(architecture).items() if name in cls.model_fields}
        # Readers older than `rope_parameters` look for `rope_theta` at the top.
        rope = {"rope_parameters": {"rope_type": "default", "rope_theta": architecture.rope_theta}}
        known = {name: value for name, value in values.items() if name in cls.model_fields}
        return cls.model_validate(fields | rope | known, by_name=True, by_alias=False)

    def document(self) -> dict[str, Any]:
        """The keys of `config.json`, as transformers reads them."""
        document = self.model_dump(by_alias=True, exclude_none=True, exclude={"eos_ids"})
        if not self.norm_topk_prob and self.experts()[0] is None:
            document.pop(_key(type(self), "norm_topk_prob"), None)
        (eos_id,) = self.eos_ids
        return document | {
            "attention_dropout": 0.0,
            "initializer_range": 0.02,
            "use_cache": True,
            # Null rather than absent: an id here would exclude that token's embedding from training.
            "pad_token_id": None,
            "bos_token_id": eos_id,
            _key(type(self), "eos_ids"): eos_id,
        }


class MixtureConfig(CausalLMConfig):
    """A `config.json` of a mixture of experts."""

    num_experts: Size
    top_k: Size = Field(alias="num_experts_per_tok")

    def experts(self) -> tuple[int | None, int]:
        """(number of experts, how many compute each token)."""
        return self.num_experts, self.top_k

    def problem(self) -> str | None:
        """What is wrong between keys that are each valid, or None."""
        if self.top_k > self.num_experts:
            key = _key(type(self), "top_k")
            return f"{key} is {self.top_k}, of {self.num_experts} experts; give at most that"
        return super().problem()

    def document(self) -> dict[str, Any]:
        """The keys of `config.json`, as transformers reads them."""
        return super().document() | {"output_router_logits": False, "router_aux_loss_coef": 0.0}


class SelectorConfig(MixtureConfig):
    """A `config.json` of a mixture whose experts are chosen by the selector "ngram"."""

    selection: Literal["ngram", "router+ngram"] = Field(description='it must be "ngram" or "router+ngram"')
    order: Size = Field(alias="ngram_order")
    decay: Positive = Field(DECAY, alias="evidence_decay", description=f"only {DECAY} is computed here")

    def chosen_by(self) -> str:
        """What chooses the experts, one of `selectors.SELECTIONS`."""
        return self.selection

    def problem(self) -> str | None:
        """What is wrong between keys that are each valid, or None."""
        problem, order = super().problem(), NgramSelector().order(self.architecture())
        if problem is None and (self.order, self.decay) != (order, DECAY):
            keys = f"{_key(type(self), 'order')} is {self.order}, {_key(type(self), 'decay')} {self.decay}"
            return f"{keys}; only {order} and {DECAY} are computed here"
        return problem


class Config(NamedTuple):
    """What a `config.json` says, in the terms of this package.

    Attributes:
      architecture: sizes and numerics.
      num_experts: the anchor included, or None for a dense model.
      top_k: how many experts compute each token.
      eos_ids: the tokens that end a document, the first of which is used; none where the file names none.
      max_length: length of a sequence at most, tokens.
      selection: what chooses the experts, one of `selectors.SELECTIONS`.
    """

    architecture: Architecture
    num_experts: int | None
    top_k: int
    eos_ids: tuple[int, ...]
    max_length: int
    selection: str = BY_ROUTER

    @property
    def eos_id(self) -> int | None:
        """The token that ends a document, or None where the file names none."""
        return self.eos_ids[0] if self.eos_ids else None


def read_document(file: pathlib.Path) -> dict[str, Any]:
    """Reads the JSON object of a `config.json`; raises UserError where it is missing or damaged."""
    if not file.is_file():
        raise UserError(f"{file}: no such file; give a directory in Hugging Face's form")
    try:
        document = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"{file}: damaged ({error}); copy it again from its source") from None
    if not isinstance(document, dict):
        raise UserError(f"{file}: damaged (no object); copy it again from its source")
    return document


def parse_config(model: type[CausalLMConfig], document: Mapping[str, Any], file: pathlib.Path) -> Config:
    """Checks a `config.json` as one of an architecture.

    Raises:
      UserError: a key is missing or has a value that is not computed here; names the file and the key.
    """
    try:
        config = model.model_validate(document)
    except pydantic.ValidationError as error:
        raise UserError(f"{file}: {_problem(model, document, error)}") from None
    try:
        problem = config.problem()
        if problem:
            raise UserError(problem)
        architecture = config.architecture()
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    return Config(architecture, *config.experts(), config.eos_ids, config.max_length, config.chosen_by())


def _problem(model: type[pydantic.BaseModel], document: Mapping[str, Any], error: pydantic.ValidationError) -> str:
    """The first error, in one line: the key, its value, and what would be right."""
    first = error.errors(include_url=False)[0]
    key, value, expected = "", document, ""
    fields = {field.alias or name: field for name, field in model.model_fields.items()}
    for name in first["loc"]:
        if name not in fields or not fields[name].description:
            break
        if value.get(name) is None:
            return f"lacks {name}; copy it again from its source"
        key, value, expected = str(name), value[name], fields[name].description
        fields = Rope.model_fields if isinstance(value, dict) and fields[name].description == _DEFAULT_ROPE else {}
    return f"{key} is {short(value)}; {expected}"


def _key(model: type[pydantic.BaseModel], name: str) -> str:
    """The key in `config.json` of a field."""
    return model.model_fields[name].alias or name


def short(value: Any) -> str:
    """A JSON value for an error message."""
    return json.dumps(value)[:120]
