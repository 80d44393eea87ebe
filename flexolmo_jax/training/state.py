"""The leaves a run begins with, on their devices, and the train state around them."""

from collections.abc import Mapping
from zlib import crc32

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tensorstore as ts
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from flexolmo_jax import sharding
from flexolmo_jax.checkpoint import directories, tree
from flexolmo_jax.errors import UserError
from flexolmo_jax.model.layers import INIT_STDDEV
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
    gets the anchor's feed-forward, a router row of its own and its bias (docs/method.md, "Formulas"). What the
    run will publish from memory is float32; the other frozen leaves are held in `frozen_dtype`.
    """
    if inputs.manifest is None:
        key = jax.random.key(config.seed)
        leaves = jax.jit(inputs.model.init_flat, out_shardings=dict(where))(key)
        leaves["embedding"] *= config.init.embedding_stddev / INIT_STDDEV
    else:
        stored = directories.open_params(config.start_from)
        abstract = abstract_leaves(config, inputs, where)
        return tuple({path: _read(config, stored, path, leaf) for path, leaf in leaves.items()} for leaves in abstract)
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
    """One leaf, from `start_from`; a new expert's come from the anchor's, but for its row and its bias."""
    if path == EXPERT + "router/weight":
        return jax.device_put(_new_row(config, like.shape), like.sharding)
    if path == EXPERT + "router/bias":
        return jax.device_put(np.full(like.shape, config.init.router_bias, np.float32), like.sharding)
    source = start_leaf(path)
    label = f"--config.start_from={config.start_from}: leaf {source}"
    if source not in stored or tuple(stored[source].shape) != like.shape:
        raise UserError(f"{label} is missing or misshapen; copy the model again from its source")
    return tree.read_leaf(stored[source], like.sharding, like.dtype, label)


def start_leaf(path: str) -> str:
    """The leaf of `start_from` that a leaf starts from, an expert's from the anchor's."""
    return path.replace(EXPERT, directories.MOE + "anchor/")


def _new_row(config: ConfigDict, shape: tuple[int, int]) -> np.ndarray:
    if not config.init.router_weight_file:
        # The name enters the seed: owners who never talk must not start from the same row.
        key = jax.random.fold_in(jax.random.key(config.seed), crc32(config.expert.encode()))
        return np.asarray(config.init.router_weight_stddev * jax.random.truncated_normal(key, -2, 2, shape))
    file = epath.Path(config.init.router_weight_file)
    flag = f"--config.init.router_weight_file={file}"
    if not file.exists():
        raise UserError(f"{flag}: no such file; give a .npy of shape [{shape[1]}] or {list(shape)}")
    with file.open("rb") as stream:
        try:
            row = np.load(stream, allow_pickle=False)
        except ValueError:
            raise UserError(f"{flag}: not a .npy file; write one with numpy.save") from None
    if row.shape not in (shape, shape[1:]) or not np.isfinite(row).all():
        raise UserError(f"{flag}: shape {list(row.shape)}; must be finite, of shape [{shape[1]}] or {list(shape)}")
    return np.broadcast_to(row, shape).astype(np.float32)
