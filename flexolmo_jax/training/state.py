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
from flexolmo_jax.training.step import TrainState


def shardings(inputs: Inputs, mesh: Mesh, rules: sharding.Rules) -> dict[str, NamedSharding]:
    """Where each leaf lies: {path: sharding}."""
    return sharding.leaf_shardings(inputs.model.abstract(), inputs.model.logical_axes(), mesh, rules)


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
        published = inputs.trainable | {path for path in where if path.startswith(EXPERT)}
        dtypes = {path: jnp.dtype("float32" if path in published else config.compute.frozen_dtype) for path in where}
        leaves = {
            path: _read(config, stored, path, leaf.shape, dtypes[path], where[path])
            for path, leaf in inputs.model.abstract().items()
        }
    return partition.split(leaves, inputs.trainable)


def initial_state(trainable: dict[str, jax.Array], optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Step 0: optimizer state lies where its leaves do, scalars on every device."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    where = optax.tree.map_params(
        optimizer,
        lambda _, leaf: leaf.sharding,
        jax.eval_shape(optimizer.init, trainable),
        trainable,
        transform_non_params=lambda _: everywhere,
    )
    step = jax.device_put(jnp.zeros((), jnp.int32), everywhere)
    return TrainState(step, trainable, jax.jit(optimizer.init, out_shardings=where)(trainable))


def _read(
    config: ConfigDict,
    stored: Mapping[str, ts.TensorStore],
    path: str,
    shape: tuple[int, ...],
    dtype: np.dtype,
    where: NamedSharding,
) -> jax.Array:
    """One leaf, from `start_from`; a new expert's come from the anchor's, but for its row and its bias."""
    if path == EXPERT + "row":
        return jax.device_put(_new_row(config, shape), where)
    if path == EXPERT + "bias":
        return jax.device_put(np.full(shape, config.init.bias, np.float32), where)
    source = path.replace(EXPERT, directories.MIXTURE + "anchor/")
    label = f"--config.start_from={config.start_from}: leaf {source}"
    if source not in stored or tuple(stored[source].shape) != shape:
        raise UserError(f"{label} is missing or misshapen; copy the model again from its source")
    return tree.read_leaf(stored[source], where, dtype, label)


def _new_row(config: ConfigDict, shape: tuple[int, int]) -> np.ndarray:
    if not config.init.row_file:
        # The name enters the seed: owners who never talk must not start from the same row.
        key = jax.random.fold_in(jax.random.key(config.seed), crc32(config.expert.encode()))
        return np.asarray(config.init.row_stddev * jax.random.truncated_normal(key, -2, 2, shape))
    file = epath.Path(config.init.row_file)
    flag = f"--config.init.row_file={file}"
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
