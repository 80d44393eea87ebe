"""What a run reads: configuration, start, and corpora, checked before any time is spent on it."""

import math
import os
import re
from collections.abc import Sequence
from typing import NamedTuple

import jax
from etils import epath
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from flexolmo_jax import sharding
from flexolmo_jax.checkpoint.manifests import ANCHOR_NAME, MOE, NAME_RULE, ModelManifest, is_expert_name
from flexolmo_jax.checkpoint.model_directory import PUBLIC, kind_of, read_model
from flexolmo_jax.data.corpus import Corpus, open_corpora
from flexolmo_jax.errors import UserError
from flexolmo_jax.model.architecture import ANCHOR, PAIR, Architecture, Layout
from flexolmo_jax.model.decoder import REMAT_POLICIES, Compute, Decoder
from flexolmo_jax.model.dispatch import DISPATCH
from flexolmo_jax.model.kernels.causal_attention import KERNELS
from flexolmo_jax.training.partition import trainable_paths

EXPERT = MOE + "expert/"  # where the leaves of the expert in training lie
_CHOICES = {
    ("compute", "dtype"): ("float32", "bfloat16"),
    ("compute", "frozen_dtype"): ("float32", "bfloat16"),
    ("compute", "remat"): tuple(REMAT_POLICIES),
    ("compute", "attention"): ("auto", *KERNELS),
    ("compute", "dispatch"): ("auto", *DISPATCH),
    ("optimizer", "schedule"): ("cosine", "wsd"),
}
# Kernels that compile for devices of some platforms alone.
_PLATFORMS = {
    "cudnn": ("gpu", "hopper"),
    "splash": ("tpu",),
    "megablox": ("tpu",),
    "mosaic": ("hopper",),
}
ANY_PLATFORM = "any"
_POSITIVE = (
    ("data", "sequence_length"),
    ("data", "batch_size"),
    ("data", "grad_accum_steps"),
    ("compute", "unroll"),
    ("checkpoint", "every"),
    ("checkpoint", "keep"),
    ("log", "every"),
    ("moe", "num_experts"),
    ("moe", "top_k"),
)
_NOT_NEGATIVE = (("evaluation", "every"), ("evaluation", "batches"), ("publish", "public_documents"))


class Inputs(NamedTuple):
    """All that is known of a run before a weight is read.

    Attributes:
      model: the decoder to train.
      manifest: of the model directory it starts from, or None for fresh weights.
      trainable: paths of the trainable leaves.
      corpora: groups of training corpora, each with its share of the rows.
      held_out: {label: corpus} evaluated while training.
    """

    model: Decoder
    manifest: ModelManifest | None
    trainable: set[str]
    corpora: list[tuple[list[Corpus], float]]
    held_out: dict[str, Corpus]

    @property
    def training_corpora(self) -> list[Corpus]:
        """Of all groups."""
        return [corpus for group, _ in self.corpora for corpus in group]

    @property
    def roster(self) -> list[str]:
        """Names in the order of the router's logits."""
        if self.model.layout is PAIR:
            return [ANCHOR_NAME, "expert"]
        return self.manifest.roster if self.manifest else [ANCHOR_NAME]


def build_model(config: ConfigDict, platform: str | None = None) -> tuple[Decoder, ModelManifest | None]:
    """The decoder a configuration describes, and the manifest of the model it starts from, if any.

    `platform` (`sharding.platform_of`) is that of the devices that will compute, by default of those that are here;
    with `ANY_PLATFORM` the decoder is good for its shapes alone.

    Raises:
      UserError: a value makes no sense, alone or with the model it starts from.
    """
    _check_values(config)
    platform = platform or sharding.platform_of(jax.devices()[0])
    _check_kernels(config, platform)
    manifest = _read_start(config.start_from) if config.start_from else None
    if config.expert:
        _check_expert(config, manifest)
    elif manifest and _names_expert(config):
        raise UserError(f"--config.expert: empty; name the expert that is trained ({NAME_RULE})")
    if manifest is None:
        architecture = Architecture.from_dict(config.model.to_dict(), "--config.model")
        layout = _fresh_layout(config)
    else:
        architecture = Architecture.from_dict(manifest.architecture, config.start_from)
        layout = PAIR if config.expert else Layout.of_roster(len(manifest.experts), manifest.top_k)
    how = config.compute
    compute = Compute(
        how.dtype,
        how.remat,
        how.unroll,
        rules=config.sharding_rules,
        platform=platform,
        attention=how.attention,
        dispatch=how.dispatch,
    )
    return Decoder(architecture, layout, compute), manifest


def read_inputs(config: ConfigDict) -> Inputs:
    """Reads and checks everything but weights; raises UserError naming the key that is wrong."""
    model, manifest = build_model(config)
    if manifest is None:
        _check_fresh(config, model.layout)
    trainable = trainable_paths(model.abstract(), config.partition)
    others = sorted(path for path in trainable if config.expert and not path.startswith(EXPERT))
    if others:
        raise UserError(
            f"--config.partition: trains {others[0]}, and an expert ships {EXPERT}* alone; freeze the rest, as "
            f"configs/expert.py does, or leave out --config.expert={config.expert}"
        )
    corpora = _training_corpora(config)
    held_out = open_corpora(split_paths(config.evaluation.data))
    everything = [corpus for group, _ in corpora for corpus in group] + list(held_out.values())
    digest, source = everything[0].tokenizer_digest, str(everything[0].path)
    if manifest:
        digest, source = manifest.tokenizer_digest, f"--config.start_from={config.start_from}"
    for corpus in everything:
        if corpus.tokenizer_digest != digest:
            raise UserError(f"{corpus.path}: its tokenizer is not that of {source}; tokenize the text with that one")
    vocabulary = everything[0].tokenizer().vocab_size
    if vocabulary > model.architecture.vocab_size:
        raise UserError(
            f"--config.model.vocab_size={model.architecture.vocab_size}: below the {vocabulary} of the tokenizer of "
            f"{everything[0].path}; give at least that"
        )
    return Inputs(model, manifest, trainable, corpora, held_out)


def split_paths(value: str) -> list[str]:
    """Splits a configuration value that lists paths with commas between."""
    return [path.strip() for path in value.split(",") if path.strip()]


def public_path(public: str, start_from: str) -> str:
    """The corpus of public data: as configured, or the sample that came with the start."""
    return public or os.path.join(start_from, PUBLIC)


def _training_corpora(config: ConfigDict) -> list[tuple[list[Corpus], float]]:
    data = config.data
    own = split_paths(data.train)
    if not own:
        raise UserError("--config.data.train: empty; give a corpus directory (`flexolmo tokenize` makes one)")
    if not 0 <= data.public_share < 1:
        raise UserError(f"--config.data.public_share={data.public_share}: must be at least 0 and below 1")
    groups = [([Corpus.open(path) for path in own], 1 - data.public_share)]
    if data.public_share:
        public = public_path(data.public, config.start_from)
        if not epath.Path(public).exists():
            raise UserError(
                f"--config.data.public_share={data.public_share}: {config.start_from or 'the start'} came without "
                "public data; give --config.data.public=DIR, or a share of 0"
            )
        groups.append(([Corpus.open(public)], data.public_share))
    return groups


def _check_kernels(config: ConfigDict, platform: str) -> None:
    for key in ("attention", "dispatch"):
        kernel = config.compute[key]
        platforms = _PLATFORMS.get(kernel, (platform,))
        if platform not in (*platforms, ANY_PLATFORM):
            raise UserError(
                f"--config.compute.{key}={kernel}: has kernels for {' and '.join(platforms)}, and the devices are "
                f"{platform}; leave it at auto"
            )


def _check_values(config: ConfigDict) -> None:
    for (section, key), allowed in _CHOICES.items():
        if config[section][key] not in allowed:
            raise UserError(f"--config.{section}.{key}={config[section][key]}: must be one of {', '.join(allowed)}")
    for section, key in _POSITIVE:
        if config[section][key] < 1:
            raise UserError(f"--config.{section}.{key}={config[section][key]}: must be at least 1")
    if not 0 <= config.seed < 2**32:
        raise UserError(f"--config.seed={config.seed}: must be at least 0 and below 2**32")
    for key in ("partition", "sharding_rules"):
        if not all(isinstance(rule, Sequence) and len(rule) == 2 for rule in config[key]):
            raise UserError(f"--config.{key}={config[key]}: must hold pairs; write them in a configuration file")
    for section, key in _NOT_NEGATIVE:
        if config[section][key] < 0:
            raise UserError(f"--config.{section}.{key}={config[section][key]}: must be at least 0")
    for pattern in config.optimizer.no_decay:
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"--config.optimizer.no_decay: '{pattern}' is not a regular expression ({error})") from None
    for key, value in flatten_dict(config.to_dict(), sep=".").items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"--config.{key}={value}: must be a finite number")
    if config.steps < 1:
        raise UserError(f"--config.steps={config.steps}: must be at least 1")
    if config.data.batch_size % config.data.grad_accum_steps:
        raise UserError(
            f"--config.data.grad_accum_steps={config.data.grad_accum_steps}: must divide --config.data.batch_size="
            f"{config.data.batch_size}"
        )


def _read_start(start_from: str) -> ModelManifest:
    """The manifest of the model directory to start from; a run's workdir is not one, but may hold it."""
    inside = epath.Path(start_from) / "model"
    if kind_of(start_from) is None and kind_of(inside) == "model":
        raise UserError(f"--config.start_from={start_from}: is the workdir of a run; give its model, {inside}")
    return read_model(start_from)


def _names_expert(config: ConfigDict) -> bool:
    """Whether the partition is one of the pair, with an expert in training."""
    return any(EXPERT in pattern for pattern, _ in config.partition)


def _fresh_layout(config: ConfigDict) -> Layout:
    """The layout of fresh weights: a mixture, the pair whose expert the partition names, or an anchor."""
    if config.moe.num_experts == 1 and _names_expert(config):
        return PAIR
    return Layout.of_roster(config.moe.num_experts, config.moe.top_k)


def _check_fresh(config: ConfigDict, layout: Layout) -> None:
    """Refuses to train fresh weights of anything but an anchor."""
    if layout is PAIR:
        raise UserError("--config.start_from: empty; an expert starts from an anchor, give its model directory")
    if layout is not ANCHOR:
        raise UserError(
            f"--config.start_from: empty; a mixture of {layout.num_experts} experts starts from a merge, "
            "give its model directory"
        )


def _check_expert(config: ConfigDict, manifest: ModelManifest | None) -> None:
    if not is_expert_name(config.expert):
        raise UserError(f"--config.expert={config.expert}: becomes the expert's name; {NAME_RULE}")
    if manifest is None:
        raise UserError("--config.start_from: empty; an expert starts from an anchor, give its model directory")
    if len(manifest.experts) > 1:
        raise UserError(
            f"--config.start_from={config.start_from}: a merged model ({', '.join(manifest.roster)}); "
            "an expert starts from the anchor alone"
        )
