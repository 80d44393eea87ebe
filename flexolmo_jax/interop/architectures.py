"""The Hugging Face architectures that are read and written.

To add one, describe its `config.json` (a subclass of `CausalLMConfig` or `MixtureConfig` with the keys that differ),
name its tensors, and add it to `ARCHITECTURES`. What the model itself computes is `model.Architecture`.
"""

import pathlib
from typing import Any, NamedTuple

from flexolmo_jax.errors import ArgumentError, UserError
from flexolmo_jax.interop.config import (
    CONFIG_FILE,
    CausalLMConfig,
    Config,
    MixtureConfig,
    SelectorConfig,
    parse_config,
    read_document,
    short,
)
from flexolmo_jax.interop.tensors import TensorNames
from flexolmo_jax.model.architecture import Architecture
from flexolmo_jax.model.selectors import LOG_SCALE


class HuggingFaceArchitecture(NamedTuple):
    """One architecture.

    Attributes:
      model_type: `model_type` in `config.json`.
      class_name: the one entry of `architectures` there.
      config: of the keys.
      names: of the tensors.
      in_transformers: whether transformers computes it, so that logits are compared.
      modeling: the module of this package with its classes in PyTorch, where transformers has none; its file goes out
        beside the weights.
    """

    model_type: str
    class_name: str
    config: type[CausalLMConfig]
    names: TensorNames
    in_transformers: bool = True
    modeling: str | None = None

    @property
    def is_mixture(self) -> bool:
        """Whether it has experts and a router."""
        return issubclass(self.config, MixtureConfig)

    @property
    def has_selector(self) -> bool:
        """Whether a selector chooses its experts."""
        return issubclass(self.config, SelectorConfig)

    def header(self) -> dict[str, Any]:
        """The keys of `config.json` that say which architecture it is."""
        header: dict[str, Any] = {"architectures": [self.class_name], "model_type": self.model_type}
        if self.modeling:
            stem = f"{self.modeling}.{self.class_name.removesuffix('ForCausalLM')}"
            classes = {"AutoConfig": "Config", "AutoModel": "Model", "AutoModelForCausalLM": "ForCausalLM"}
            header["auto_map"] = {auto: stem + suffix for auto, suffix in classes.items()}
        return header


_OLMO2_SHARED = {
    "embedding": "model.embed_tokens.weight",
    "final_norm/scale": "model.norm.weight",
    "head": "lm_head.weight",
    "blocks/attention/query": "model.layers.{layer}.self_attn.q_proj.weight",
    "blocks/attention/key": "model.layers.{layer}.self_attn.k_proj.weight",
    "blocks/attention/value": "model.layers.{layer}.self_attn.v_proj.weight",
    "blocks/attention/out": "model.layers.{layer}.self_attn.o_proj.weight",
    "blocks/attention/query_norm/scale": "model.layers.{layer}.self_attn.q_norm.weight",
    "blocks/attention/key_norm/scale": "model.layers.{layer}.self_attn.k_norm.weight",
    "blocks/attention_norm/scale": "model.layers.{layer}.post_attention_layernorm.weight",
    "blocks/moe_norm/scale": "model.layers.{layer}.post_feedforward_layernorm.weight",
}
OLMO2 = HuggingFaceArchitecture(
    "olmo2",
    "Olmo2ForCausalLM",
    CausalLMConfig,
    TensorNames(_OLMO2_SHARED, "model.layers.{layer}.mlp.{leaf}.weight"),
)
FLEX_OLMO = HuggingFaceArchitecture(
    "flex_olmo",
    "FlexOlmoForCausalLM",
    MixtureConfig,
    TensorNames(
        _OLMO2_SHARED,
        "model.layers.{layer}.mlp.experts.{expert}.{leaf}.weight",
        "model.layers.{layer}.mlp.{leaf}.weight",
        # As transformers holds the experts in memory.
        fused={
            "model.layers.{layer}.mlp.experts.gate_up_proj": ("gate", "up"),
            "model.layers.{layer}.mlp.experts.down_proj": ("down",),
        },
    ),
)

FLEX_OLMO_SELECTOR = HuggingFaceArchitecture(
    "flex_olmo_selector",
    "FlexOlmoSelectorForCausalLM",
    SelectorConfig,
    TensorNames(
        {**_OLMO2_SHARED, LOG_SCALE: "model.selector.log_scale"},
        FLEX_OLMO.names.expert,
        "model.layers.{layer}.mlp.gate.{leaf}",
        {"router/weight": "weight", "router/bias": "bias"},
        derived={"selector/log_ratio": "model.selector.log_ratio"},
    ),
    modeling="modeling_flexolmo_selector",
)

# {model_type: architecture}. A model is exported as the first that fits it, unless another is asked for.
ARCHITECTURES = {architecture.model_type: architecture for architecture in (OLMO2, FLEX_OLMO, FLEX_OLMO_SELECTOR)}


def read_config(directory: pathlib.Path) -> tuple[HuggingFaceArchitecture, Config]:
    """Reads and checks `config.json`.

    Raises:
      UserError: it is missing or damaged, or describes a model that is not computed here.
    """
    file = directory / CONFIG_FILE
    document = read_document(file)
    model_type, classes = document.get("model_type"), document.get("architectures")
    found = ARCHITECTURES.get(model_type) if isinstance(model_type, str) else None
    if found is None or ("architectures" in document and classes != [found.class_name]):
        known = " or ".join(f'["{each.class_name}"] ({each.model_type})' for each in ARCHITECTURES.values())
        raise UserError(
            f"{file}: architectures is {short(classes)}, model_type {short(model_type)}; only {known} is read"
        )
    return found, parse_config(found.config, document, file)


def choose(
    architecture: Architecture, num_experts: int, label: str, model_type: str | None = None
) -> HuggingFaceArchitecture:
    """The Hugging Face architecture in which a model is exported.

    Args:
      architecture: of the model.
      num_experts: the anchor included.
      label: names the model in errors.
      model_type: a key of `ARCHITECTURES`; by default that of the first which fits.

    Raises:
      ArgumentError: `model_type` is unknown, or is that of a dense model and there are several experts.
      UserError: `config.json` has no place for what the model computes.
    """
    if model_type is None:
        chosen = next(each for each in ARCHITECTURES.values() if each.is_mixture == (num_experts > 1))
    elif model_type not in ARCHITECTURES:
        raise ArgumentError("model_type", model_type, f"unknown; give one of {', '.join(ARCHITECTURES)}")
    else:
        chosen = ARCHITECTURES[model_type]
    if num_experts > 1 and not chosen.is_mixture:
        mixtures = [each.model_type for each in ARCHITECTURES.values() if each.is_mixture]
        raise ArgumentError(
            "model_type", model_type, f"is a dense model, this one has {num_experts} experts; give {mixtures[0]}"
        )
    fields = {"num_experts": num_experts, "top_k": 1, "max_length": 1, "eos_ids": (0,)}  # none is in the architecture
    fields |= {"selection": "ngram", "order": 1}
    described = chosen.config.of(architecture, **fields).architecture()
    if described != architecture:
        differing = [f"{name} {x}" for name, x in vars(architecture).items() if getattr(described, name) != x]
        raise UserError(f"{label}: a {chosen.class_name} has no place for {', '.join(differing)}; it is not exported")
    return chosen
