"""The leaves that a run begins with, which of them it trains, and the train state around these."""

import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple
from zlib import crc32

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tensorstore as ts
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from flexolmo_jax.checkpoint.casts import Experts
from flexolmo_jax.checkpoint.manifests import MOE, ROUTER, ModelManifest
from flexolmo_jax.checkpoint.model_directory import open_merged_router, open_params
from flexolmo_jax.checkpoint.params import read_leaf
from flexolmo_jax.checkpoint.statistics import open_statistics
from flexolmo_jax.errors import UserError
from flexolmo_jax.model.architecture import SOLO, Layout
from flexolmo_jax.model.decoder import Decoder
from flexolmo_jax.model.leaves import INIT_STDDEV
from flexolmo_jax.model.routers import ROUTERS
from flexolmo_jax.model.selectors import is_derived, read_derived
from flexolmo_jax.training.step import Leaves, TrainState

EXPERT = MOE + "expert/"  # prefix of the leaves of the expert in training
TRAINABLE, FROZEN = "trainable", "frozen"
AbstractLeaves = dict[str, jax.ShapeDtypeStruct]


@dataclasses.dataclass(frozen=True)
class Start:
    """The model directory that a run starts from; its leaves are opened once, when they are first asked for."""

    path: epath.Path
    manifest: ModelManifest

    @functools.cached_property
    def params(self) -> dict[str, ts.TensorStore]:
        """{path: leaf} of its parameters."""
        return open_params(self.path)

    @functools.cached_property
    def statistics(self) -> Experts:
        """{expert: {leaf: slice}} of its owners' statistics."""
        return open_statistics(self.path, self.manifest)

    @functools.cached_property
    def derived(self) -> dict[str, np.ndarray]:
        """{path: array} of its leaves that are derived from these."""
        return read_derived(self.manifest, self.statistics, f"config.start_from={self.path}")

    @property
    def is_merged(self) -> bool:
        """Whether it has contributed experts."""
        return len(self.manifest.experts) > 1

    @property
    def layout(self) -> Layout:
        """The layout of its experts."""
        return Layout.of_roster(len(self.manifest.experts), self.manifest.top_k, self.manifest.selection)

    @functools.cached_property
    def merged_router(self) -> Experts:
        """{expert: {leaf: slice}} of its router as the merge made it."""
        return open_merged_router(self.path, self.manifest)


class Initialization(NamedTuple):
    """How leaves begin that no other model brings: fresh weights, and the router of a new expert.

    Attributes:
      seed: of all that is random.
      expert: name of the new expert, or "".
      options: the section `init` of the configuration.
    """

    seed: int
    expert: str
    options: ConfigDict


def trainable_paths(
    paths: Iterable[str], partition: Sequence[tuple[str, str]], required_prefix: str = ""
) -> frozenset[str]:
    """The paths that a partition marks trainable; the first pattern that matches a whole path decides.

    Args:
      paths: every leaf's path, such as `blocks/moe/expert/gate`.
      partition: (regular expression, "trainable" or "frozen") in order.
      required_prefix: of all trainable paths: an expert ships its leaves and no other.

    Raises:
      UserError: a path no pattern matches, a pattern that decides no path, an unknown mark or a bad
        expression, or nothing left to train.
    """
    key = "config.partition"
    for pattern, mark in partition:
        if mark not in (TRAINABLE, FROZEN):
            raise UserError(f"{key}: '{pattern}' is marked '{mark}'; use '{TRAINABLE}' or '{FROZEN}'")
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"{key}: '{pattern}' is not a regular expression ({error})") from None
    unused = {pattern for pattern, _ in partition}
    trainable = set()
    for path in paths:
        pattern, mark = next((rule for rule in partition if re.fullmatch(rule[0], path)), (None, None))
        if pattern is None:
            raise UserError(f"{key}: no pattern matches the leaf {path}; add one that does")
        unused.discard(pattern)
        if mark == TRAINABLE:
            trainable.add(path)
    others = sorted(path for path in trainable if not path.startswith(required_prefix))
    if others:
        raise UserError(
            f"{key}: trains {others[0]}, and an expert ships {required_prefix}* only; freeze the rest, as "
            "configs/expert.py does, or leave out config.expert=NAME"
        )
    for pattern, _ in partition:
        if pattern in unused:
            raise UserError(f"{key}: '{pattern}' decides no leaf of this model; remove it, or correct or move it")
    if not trainable:
        raise UserError(f"{key}: every leaf is frozen; mark at least one pattern '{TRAINABLE}'")
    return frozenset(trainable)


def split(leaves: Mapping[str, Any], trainable: Iterable[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits a flat dict into (trainable, frozen)."""
    chosen = frozenset(trainable)
    return (
        {path: leaf for path, leaf in leaves.items() if path in chosen},
        {path: leaf for path, leaf in leaves.items() if path not in chosen},
    )


def abstract_leaves(
    model: Decoder, shardings: Mapping[str, NamedSharding], trainable: frozenset[str], frozen_dtype: str
) -> tuple[AbstractLeaves, AbstractLeaves]:
    """The leaves of a run that starts from a model directory as (trainable, frozen): shapes, dtypes, shardings.

    Leaves that a run publishes from memory are float32, as are derived ones; the others have `frozen_dtype`.
    """

    def abstract(path: str, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        is_float32 = path in trainable or path.startswith(EXPERT) or is_derived(path)
        dtype = "float32" if is_float32 else frozen_dtype
        return jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype), sharding=shardings[path])

    return split({path: abstract(path, leaf) for path, leaf in model.abstract().items()}, trainable)


def initial_leaves(
    model: Decoder,
    trainable: Mapping[str, Any],
    frozen: Mapping[str, Any],
    start: Start | None,
    initialization: Initialization,
) -> tuple[Leaves, Leaves]:
    """The leaves that a run begins with, on their devices, as (trainable, frozen).

    Fresh weights are drawn from the seed, in float32. Otherwise leaves are read from the start, and a new expert gets
    the anchor's feed-forward. In a pair it gets router leaves of its own (`routers.Router.new_expert`); alone, the
    anchor's (but for `routers.Router.untrained_expert`).

    Args:
      model: the decoder.
      trainable: shapes, dtypes and shardings of the leaves.
      frozen: the same of the others.
      start: where leaves are read; None for fresh weights.
      initialization: of leaves that the start does not bring.
    """
    if start is None:
        shardings = {path: leaf.sharding for path, leaf in {**trainable, **frozen}.items()}
        leaves = jax.jit(model.init_flat, out_shardings=shardings)(jax.random.key(initialization.seed))
        leaves["embedding"] *= initialization.options.embedding_stddev / INIT_STDDEV
        return split(leaves, trainable)
    new = _new_expert(model, initialization) if initialization.expert else start.derived

    def initial(abstract: Mapping[str, Any]) -> Leaves:
        return {
            path: _placed(new[path], leaf.sharding) if path in new else _read(path, leaf, start)
            for path, leaf in abstract.items()
        }

    return initial(trainable), initial(frozen)


def _placed(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """An array that every process has, on devices; each process places its own shards."""
    return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)


def start_leaf(path: str) -> str:
    """The leaf of the start that a leaf begins as; an expert's are the anchor's."""
    return path.replace(EXPERT, MOE + "anchor/")


def interpolated(leaves: Mapping[str, jax.Array], start: Start, weight: float) -> Leaves:
    """The leaves of an expert, with anchor + weight * (trained - anchor) for those of the feed-forward.

    This is WiSE-FT of what an owner trains (Wortsman et al. 2022, "Robust fine-tuning of zero-shot models", section 3).

    Args:
      leaves: of the expert, {path: array}. The arrays of the feed-forward are consumed where the weight is not 1.
      start: has the anchor's.
      weight: of the trained leaves, 1 for these as they are.
    """
    if weight == 1:
        return dict(leaves)

    def between(path: str, trained: jax.Array) -> jax.Array:
        if path.startswith(EXPERT + ROUTER):  # does not begin as the anchor's
            return trained
        like = jax.ShapeDtypeStruct(trained.shape, trained.dtype, sharding=trained.sharding)
        return _interpolate(trained, _read(path, like, start), weight)

    return {path: between(path, leaf) for path, leaf in leaves.items()}


@functools.partial(jax.jit, donate_argnums=0, static_argnums=2)
def _interpolate(trained: jax.Array, anchor: jax.Array, weight: float) -> jax.Array:
    return anchor + weight * (trained - anchor)


def abstract_state(
    trainable: Mapping[str, jax.Array | jax.ShapeDtypeStruct], optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """Shapes, dtypes and shardings of the state around leaves: optimizer state has the shardings of its leaves.

    Scalars are replicated. To be called outside `jax.set_mesh` where the devices are not there.
    """

    def like(leaf, leaf_sharding):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf_sharding)

    replicated = NamedSharding(mesh, PartitionSpec())
    abstract = {path: like(leaf, leaf.sharding) for path, leaf in trainable.items()}
    state = optax.tree.map_params(
        optimizer,
        lambda moment, leaf: like(moment, leaf.sharding),
        jax.eval_shape(optimizer.init, trainable),
        abstract,
        transform_non_params=lambda scalar: like(scalar, replicated),
    )
    step: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated)
    leaves: Any = abstract
    return TrainState(step, leaves, state)


def _read(path: str, like: jax.ShapeDtypeStruct, start: Start) -> jax.Array:
    """Reads one leaf of the start, a new expert's from the anchor's."""
    source, stored = start_leaf(path), start.params
    label = f"config.start_from={start.path}: leaf {source}"
    if source not in stored or tuple(stored[source].shape) != like.shape:
        raise UserError(f"{label} is missing or misshapen; copy the model again from its source")
    return read_leaf(stored[source], like.sharding, like.dtype, label)


def _new_expert(model: Decoder, initialization: Initialization) -> dict[str, np.ndarray]:
    """The router's leaves of a new expert that are not the anchor's, {path: array}."""
    architecture, options = model.architecture, initialization.options
    router = ROUTERS[architecture.router]
    if model.layout == SOLO:
        leaves = router.untrained_expert(architecture, options)
    else:
        # The name enters the seed: owners who never talk must not start from the same leaves.
        key = jax.random.fold_in(jax.random.key(initialization.seed), crc32(initialization.expert.encode()))
        leaves = router.new_expert(architecture, options, key)
    return {EXPERT + ROUTER + name: leaf for name, leaf in leaves.items()}
