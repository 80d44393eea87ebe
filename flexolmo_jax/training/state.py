"""The leaves a run begins with, on their devices, and the train state around them."""

from collections.abc import Mapping
from zlib import crc32

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tensorstore as ts
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from flexolmo_jax import sharding
from flexolmo_jax.checkpoint.manifests import MOE, ROUTER
from flexolmo_jax.checkpoint.model_directory import open_params
from flexolmo_jax.checkpoint.params import read_leaf
from flexolmo_jax.errors import UserError
from flexolmo_jax.model.leaves import INIT_STDDEV
from flexolmo_jax.model.routers import ROUTERS
from flexolmo_jax.training import partition
from flexolmo_jax.training.inputs import EXPERT, Inputs
from flexolmo_jax.training.step import Leaves, TrainState


def shardings(inputs: Inputs, mesh: Mesh, rules: sharding.Rules) -> dict[str, NamedSharding]:
    """Where each leaf lies: {path: sharding}."""
    return sharding.leaf_shardings(inputs.model.abstract(), inputs.model.logical_axes(), mesh, rules)


def leaf_dtypes(config: ConfigDict, inputs: Inputs) -> dict[str, np.dtype]:
    """How leaves are held: those that a run publishes from memory in float32, the others in `frozen_dtype`."""
    published = {path: path in inputs.trainable or path.startswith(EXPERT) for path in inputs.model.abstract()}
    return {path: jnp.dtype("float32" if own else config.compute.frozen_dtype) for path, own in published.items()}


def abstract_leaves(config: ConfigDict, inputs: Inputs, where: Mapping[str, NamedSharding]) -> tuple[Leaves, Leaves]:
    """The leaves of a run that starts from a model directory as (trainable, frozen): shapes, dtypes, shardings."""
    dtypes, shapes = leaf_dtypes(config, inputs), inputs.model.abstract()
    leaves = {p: jax.ShapeDtypeStruct(leaf.shape, dtypes[p], sharding=where[p]) for p, leaf in shapes.items()}
    return partition.split(leaves, inputs.trainable)


def initial_leaves(
    config: ConfigDict, inputs: Inputs, where: Mapping[str, NamedSharding]
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """The leaves a run begins with, on their devices, as (trainable, frozen).

    Fresh weights are drawn from the seed. Otherwise leaves are read from `start_from`, and a new expert
    gets the anchor's feed-forward and router leaves of its own (`routers.Router.new_expert`). What the
    run will publish from memory is float32; the other frozen leaves are held in `frozen_dtype`.
    """
    if inputs.manifest is None:
        key = jax.random.key(config.seed)
        leaves = jax.jit(inputs.model.init_flat, out_shardings=dict(where))(key)
        leaves["embedding"] *= config.init.embedding_stddev / INIT_STDDEV
    else:
        stored = open_params(config.start_from)
        new = _new_expert(config, inputs) if config.expert else {}
        trainable, frozen = (
            {
                path: jax.device_put(new[path], leaf.sharding) if path in new else _read(config, stored, path, leaf)
                for path, leaf in leaves.items()
            }
            for leaves in abstract_leaves(config, inputs, where)
        )
        return trainable, frozen
    return partition.split(leaves, inputs.trainable)


def abstract_state(
    trainable: Mapping[str, jax.Array | jax.ShapeDtypeStruct], optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """Shapes, dtypes and shardings of the state around leaves: optimizer state lies where its leaves do.

    Scalars lie on every device. To be called outside `jax.set_mesh` where the devices are not there.
    """

    def place(leaf, where):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    everywhere = NamedSharding(mesh, PartitionSpec())
    abstract = {path: place(leaf, leaf.sharding) for path, leaf in trainable.items()}
    state = optax.tree.map_params(
        optimizer,
        lambda leaf, like: place(leaf, like.sharding),
        jax.eval_shape(optimizer.init, trainable),
        abstract,
        transform_non_params=lambda leaf: place(leaf, everywhere),
    )
    return TrainState(jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere), abstract, state)


def initial_state(trainable: dict[str, jax.Array], optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The train state of step 0."""
    abstract = abstract_state(trainable, optimizer, mesh)
    where = jax.tree.map(lambda leaf: leaf.sharding, abstract.optimizer)
    step = jax.device_put(jnp.zeros((), jnp.int32), abstract.step.sharding)
    return TrainState(step, trainable, jax.jit(optimizer.init, out_shardings=where)(trainable))


def _read(
    config: ConfigDict,
    stored: Mapping[str, ts.TensorStore],
    path: str,
    like: jax.ShapeDtypeStruct,
) -> jax.Array:
    """Reads one leaf of `start_from`, a new expert's from the anchor's."""
    source = start_leaf(path)
    label = f"--config.start_from={config.start_from}: leaf {source}"
    if source not in stored or tuple(stored[source].shape) != like.shape:
        raise UserError(f"{label} is missing or misshapen; copy the model again from its source")
    return read_leaf(stored[source], like.sharding, like.dtype, label)


def _new_expert(config: ConfigDict, inputs: Inputs) -> dict[str, np.ndarray]:
    """The router's leaves of a new expert, {path: array}."""
    architecture = inputs.model.architecture
    # The name enters the seed: owners who never talk must not start from the same leaves.
    key = jax.random.fold_in(jax.random.key(config.seed), crc32(config.expert.encode()))
    leaves = ROUTERS[architecture.router].new_expert(architecture, config.init, key)
    return {EXPERT + ROUTER + name: leaf for name, leaf in leaves.items()}


def start_leaf(path: str) -> str:
    """The leaf of `start_from` that a leaf starts from, an expert's from the anchor's."""
    return path.replace(EXPERT, MOE + "anchor/")
