"""The objects that a run is made of, from its configuration. Besides this module only `data` reads a configuration."""

import hashlib
import importlib.util
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import NamedSharding
from ml_collections import ConfigDict

from configs import base, keys
from flexolmo_jax import sharding
from flexolmo_jax.checkpoint.manifests import ANCHOR_NAME, NAME_RULE, is_expert_name
from flexolmo_jax.checkpoint.model_directory import PUBLIC, kind_of, read_model
from flexolmo_jax.data.batches.pipeline import ARRAYS
from flexolmo_jax.data.tokenization.tokenizer import Tokenizer
from flexolmo_jax.errors import ArgumentError, NotFoundError, UserError
from flexolmo_jax.model.architecture import EXPERT_LAYOUTS, Architecture, Layout
from flexolmo_jax.model.decoder import Compute, Decoder
from flexolmo_jax.model.kernels import causal_attention, grouped_matmul
from flexolmo_jax.model.privacy import CARD_KEY, Privacy, make_privacy
from flexolmo_jax.model.selectors import is_derived
from flexolmo_jax.training.data import TRAIN, Data, open_data, split_paths
from flexolmo_jax.training.optimizer import make_optimizer, make_schedule, skipping, warmup_steps
from flexolmo_jax.training.publish import Publication
from flexolmo_jax.training.state import (
    EXPERT,
    Initialization,
    Start,
    abstract_leaves,
    abstract_state,
    trainable_paths,
)
from flexolmo_jax.training.step import LossWeights, Program, make_train_step
from flexolmo_jax.training.workdir import content_key

ANY_PLATFORM = "any"
NEEDS_ANCHOR = "config.start_from: empty; an expert starts from an anchor, give its model directory"


class Run(NamedTuple):
    """Everything that is known of a run before it reads a weight.

    Attributes:
      program: the step.
      start: the model that it starts from; None for fresh weights.
      initialization: of the leaves that no other model brings.
      data: the corpora.
      steps: of the whole run.
      evaluation: the section of the configuration: `every`, `batches`, `keep_best`, `patience`.
      checkpoint: the section of the configuration: `every`, `keep`.
      log: the section of the configuration: `every`, `by_layer`, `wandb`.
      faults: the section of the configuration: `step_timeout`, `skip_steps`, `spike`.
      profile: the section of the configuration: `first`, `steps`.
      roster: names of experts, in the order of the router's logits.
      publication: what the output holds beside trained leaves.
      record: what `config.json` holds: the configuration, and digests of what its paths name.
      warnings: lines for the user.
    """

    program: Program
    start: Start | None
    initialization: Initialization
    data: Data
    steps: int
    evaluation: ConfigDict
    checkpoint: ConfigDict
    log: ConfigDict
    faults: ConfigDict
    profile: ConfigDict
    roster: list[str]
    publication: Publication
    record: dict[str, Any]
    warnings: tuple[str, ...]


def read_run(config: ConfigDict) -> Run:
    """Reads and checks everything but weights.

    Raises:
      TypeError: the configuration is no `ConfigDict`.
      ArgumentError: the value of a key makes no sense, alone or with another.
      UserError: the start, a corpus or the devices do not suit the run.
    """
    devices = jax.devices()
    start = _read_start(config, sharding.platform_of(devices[0]))
    _check_fresh(config)
    data = open_data(config)
    tokenizer = _check_tokenizers(data, start)
    privacy = _privacy(config, data, start)
    card, record, warnings = _data_card(config, data, privacy), _record(config, data, start), _warnings(config)
    program = _make_program(config, start, devices)
    architecture = program.model.architecture
    if tokenizer.vocab_size > architecture.vocab_size:
        problem = f"below the {tokenizer.vocab_size} of the tokenizer of {data.training[0].path}; give at least that"
        raise ArgumentError("config.model.vocab_size", architecture.vocab_size, problem)
    publication = Publication(
        expert=config.expert,
        card=card,
        start=start,
        architecture=architecture,
        roster=start.manifest.roster if start else [ANCHOR_NAME],
        trainable=program.trainable,
        corpora=data.corpora,
        selector=config.publish.selector,
        privacy=privacy,
        public_documents=config.publish.public_documents,
        seed=config.seed,
        interpolation=config.publish.interpolation,
    )
    return Run(
        program=program,
        start=start,
        initialization=Initialization(seed=config.seed, expert=config.expert, options=config.init),
        data=data,
        steps=config.steps,
        evaluation=config.evaluation,
        checkpoint=config.checkpoint,
        log=config.log,
        faults=config.faults,
        profile=config.profile,
        roster=list(program.model.layout.sets) if config.expert else publication.roster,
        publication=publication,
        record=record,
        warnings=warnings,
    )


def make_program(config: ConfigDict, devices: Sequence[sharding.Device] | None = None) -> Program:
    """The train step of a configuration; of what it names, at most the manifest of its start is read.

    To be called outside `jax.set_mesh`, within which JAX would compute some of this on devices that need not be there.

    Args:
      config: the configuration; without `start_from`, the program is that of a start with these sizes.
      devices: those that compute, by default all that are here.

    Raises:
      UserError: the configuration makes no sense, or does not fit the number of devices.
    """
    devices = devices or jax.devices()
    return _make_program(config, _read_start(config, sharding.platform_of(devices[0])), devices)


def build_model(config: ConfigDict, platform: str | None = None) -> tuple[Decoder, Start | None]:
    """The decoder that a configuration describes, and the model that it starts from, if any.

    Args:
      config: the configuration.
      platform: of the devices that will compute (`sharding.platform_of`), by default of those that are here; with
        `ANY_PLATFORM` the decoder serves for its shapes only.

    Raises:
      TypeError: the configuration is no `ConfigDict`.
      ArgumentError: the value of a key makes no sense, alone or with the model that the run starts from.
    """
    platform = platform or sharding.platform_of(jax.devices()[0])
    start = _read_start(config, platform)
    return _decoder(config, start, platform), start


def _read_start(config: ConfigDict, platform: str) -> Start | None:
    """The model directory to start from, if any, once the configuration is checked, alone and with that model."""
    check_values(config, platform)
    path, start = epath.Path(config.start_from), None
    if config.start_from:
        if kind_of(path) is None and kind_of(path / "model") == "model":
            raise ArgumentError("config.start_from", path, f"is the workdir of a run; give its model, {path / 'model'}")
        start = Start(path, read_model(path))
    _check_expert(config, start)
    return start


def _decoder(config: ConfigDict, start: Start | None, platform: str) -> Decoder:
    """The decoder: its sizes are those of the start, if any."""
    layout = _layout(config, start)
    if start is None:
        architecture = Architecture.from_dict(config.model.to_dict(), "config.model")
    else:
        architecture = Architecture.from_dict(start.manifest.architecture, str(start.path))
    compute = config.compute.to_dict()
    del compute["frozen_dtype"]
    return Decoder(architecture, layout, Compute(**compute, rules=config.sharding_rules, platform=platform))


def _make_program(config: ConfigDict, start: Start | None, devices: Sequence[sharding.Device]) -> Program:
    model = _decoder(config, start, sharding.platform_of(devices[0]))
    schedule = make_schedule(config.optimizer, config.steps)
    optimizer = make_optimizer(config.optimizer, schedule)
    if config.faults.skip_steps:
        optimizer = skipping(optimizer, config.faults.spike)
    step = make_train_step(model, optimizer, schedule, LossWeights(**config.loss), config.data.grad_accum_steps)
    mesh = sharding.make_mesh(config.mesh, devices)
    batch_sharding = NamedSharding(mesh, sharding.partition_spec(("batch", "length"), config.sharding_rules))
    batch_size, length = config.data.batch_size, config.data.sequence_length
    micro_batch, shards = batch_size // config.data.grad_accum_steps, sharding.num_shards(mesh, batch_sharding.spec[0])
    if micro_batch % shards:
        problem = (
            f"its micro-batches of {micro_batch} sequences do not divide over the {shards} devices that share the "
            "batch; give a multiple"
        )
        raise ArgumentError("config.data.batch_size", batch_size, problem)
    array = jax.ShapeDtypeStruct((batch_size, length), jnp.int32, sharding=batch_sharding)
    batch = {name: array for name in ARRAYS}
    shardings = sharding.leaf_shardings(model.abstract(), model.logical_axes(), mesh, config.sharding_rules)
    stored = [path for path in shardings if not is_derived(path)]
    trainable = trainable_paths(stored, config.partition, required_prefix=EXPERT if config.expert else "")
    leaves, frozen = abstract_leaves(model, shardings, trainable, config.compute.frozen_dtype)
    return Program(model, trainable, mesh, optimizer, step, abstract_state(leaves, optimizer, mesh), frozen, batch)


def check_values(config: ConfigDict, platform: str) -> None:
    """Checks every key alone, and those that restrict each other."""
    if not isinstance(config, ConfigDict):
        raise TypeError(f"config: a {type(config).__name__}; give a ConfigDict, such as configs.anchor.get_config()")
    problem = keys.first_problem(base.declare(), config)
    if problem:
        name, value, what = problem
        raise ArgumentError(f"config.{name}", value, what)
    if config.data.batch_size % config.data.grad_accum_steps:
        problem = f"must divide config.data.batch_size={config.data.batch_size}"
        raise ArgumentError("config.data.grad_accum_steps", config.data.grad_accum_steps, problem)
    _check_evaluation(config.evaluation)
    if config.log.wandb and not importlib.util.find_spec("wandb"):
        raise ArgumentError("config.log.wandb", config.log.wandb, "needs the package wandb; pip install wandb")
    if config.faults.spike and not config.faults.skip_steps:
        raise ArgumentError("config.faults.spike", config.faults.spike, "needs config.faults.skip_steps of 1 at least")
    for name, kernels in (("attention", causal_attention), ("dispatch", grouped_matmul)):
        kernel = config.compute[name]
        platforms = kernels.PLATFORMS.get(kernel, (platform,))
        if platform not in (*platforms, ANY_PLATFORM):
            problem = f"has kernels for {' and '.join(platforms)}, and the devices are {platform}; leave it at auto"
            raise ArgumentError(f"config.compute.{name}", kernel, problem)


def _check_evaluation(evaluation: ConfigDict) -> None:
    """The best evaluation is one of several, of held-out text."""
    if not evaluation.keep_best:
        if evaluation.patience:
            raise ArgumentError(
                "config.evaluation.patience", evaluation.patience, "needs config.evaluation.keep_best=True"
            )
        return
    if not split_paths(evaluation.data):
        problem = "needs held-out text; give config.evaluation.data=DIR"
        raise ArgumentError("config.evaluation.keep_best", evaluation.keep_best, problem)
    if not evaluation.every:
        problem = "must be at least 1 with config.evaluation.keep_best"
        raise ArgumentError("config.evaluation.every", evaluation.every, problem)


def _check_expert(config: ConfigDict, start: Start | None) -> None:
    """An expert has a name, and starts from an anchor."""
    name = config.expert
    if not name:
        if start and _names_expert(config.partition):
            raise UserError(f"config.expert: empty; name the expert that is trained ({NAME_RULE})")
        return
    if not is_expert_name(name):
        raise ArgumentError("config.expert", name, f"becomes the expert's name; {NAME_RULE}")
    if start is None:
        raise UserError(NEEDS_ANCHOR)
    if start.is_merged:
        problem = f"a merged model ({', '.join(start.manifest.roster)}); an expert starts from the anchor alone"
        raise ArgumentError("config.start_from", start.path, problem)


def _names_expert(partition: Sequence[tuple[str, str]]) -> bool:
    """Whether the partition is one of the pair, with an expert in training."""
    return any(EXPERT in pattern for pattern, _ in partition)


def _layout(config: ConfigDict, start: Start | None) -> Layout:
    """That of the start or, of fresh weights: a mixture, that of the expert that the partition names, or an anchor."""
    if start:
        return EXPERT_LAYOUTS[config.expert_layout] if config.expert else start.layout
    if config.moe.num_experts == 1 and _names_expert(config.partition):
        return EXPERT_LAYOUTS[config.expert_layout]
    return Layout.of_roster(config.moe.num_experts, config.moe.top_k)


def _check_fresh(config: ConfigDict) -> None:
    """Fresh weights are those of an anchor."""
    if config.start_from:
        return
    if config.moe.num_experts > 1:
        raise UserError(
            f"config.start_from: empty; a mixture of {config.moe.num_experts} experts starts from a merge, "
            "give its model directory"
        )
    if _names_expert(config.partition):
        raise UserError(NEEDS_ANCHOR)


def _check_tokenizers(data: Data, start: Start | None) -> Tokenizer:
    """The tokenizer of all corpora, which is that of the start."""
    corpora = [*data.training, *data.held_out.values()]
    digest, source = corpora[0].tokenizer_digest, corpora[0].path
    if start:
        digest, source = start.manifest.tokenizer_digest, f"config.start_from={start.path}"
    for corpus in corpora:
        if corpus.tokenizer_digest != digest:
            raise UserError(f"{corpus.path}: its tokenizer is not that of {source}; tokenize the text with that one")
    return corpora[0].tokenizer()


def _privacy(config: ConfigDict, data: Data, start: Start | None) -> Privacy | None:
    """The privacy of the statistics that are shipped; None where they are exact, or none are computed."""
    options = config.publish
    if not options.selector or (start and start.is_merged):
        return None
    documents = sum(corpus.documents for corpus in data.corpora)
    return make_privacy(options.epsilon, options.delta, options.clip, documents, section="config.publish.")


def _data_card(config: ConfigDict, data: Data, privacy: Privacy | None) -> dict[str, Any]:
    """What the weights say of their data: the owner's words, counts, and how long they were trained on it."""
    return {
        **config.card.to_dict(),
        **({"expert_layout": config.expert_layout} if config.expert else {}),
        "documents": sum(corpus.documents for corpus in data.corpora),
        "tokens": sum(corpus.tokens for corpus in data.corpora),
        "sequence_length": config.data.sequence_length,
        # Of all sequences, public ones included.
        "trained_tokens": config.steps * data.tokens_per_step,
        "public_share": config.data.public_share,
        **({CARD_KEY: privacy.card()} if privacy else {}),
    }


def _record(config: ConfigDict, data: Data, start: Start | None) -> dict[str, Any]:
    """What `config.json` holds: the configuration, and the content of what its paths name."""
    record = json.loads(config.to_json())
    record["optimizer"]["warmup_steps"] = warmup_steps(config.optimizer, config.steps)
    digests = {source.label: [corpus.digest for corpus in source.corpora] for source in data.sources}
    content = {
        "start_from": start.manifest.content_digest if start else "",
        "data.train": digests.get(TRAIN, []),
        "data.public": digests.get(PUBLIC, []),
        "data.mixture": [[name, digests[name], weight] for name, _, weight in config.data.mixture],
        "evaluation.data": [corpus.digest for corpus in data.held_out.values()],
        "init.router_weight_file": _file_digest(config.init.router_weight_file),
    }
    return record | {content_key(name): digest for name, digest in content.items()}


def _file_digest(path: str) -> str:
    """The digest of a file's bytes; "" where none is named."""
    if path and not epath.Path(path).exists():
        raise NotFoundError(f"config.init.router_weight_file={path}: no such file; check the path")
    return hashlib.sha256(epath.Path(path).read_bytes()).hexdigest() if path else ""


def _warnings(config: ConfigDict) -> tuple[str, ...]:
    configured, taken = config.optimizer.warmup_steps, warmup_steps(config.optimizer, config.steps)
    if configured == taken:
        return ()
    return (
        f"config.optimizer.warmup_steps={configured}: no shorter than the run; the learning rate rises for {taken} of "
        f"{config.steps} steps",
    )
