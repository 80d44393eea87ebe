"""The step that a configuration describes, and the batches it takes: the same for a run, a benchmark and a plan."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from flexolmo_jax import sharding
from flexolmo_jax.data.pipeline import ARRAYS
from flexolmo_jax.errors import UserError
from flexolmo_jax.model.decoder import Decoder
from flexolmo_jax.training.objective import LossWeights
from flexolmo_jax.training.optimizer import make_optimizer, make_schedule
from flexolmo_jax.training.step import make_train_step


def configured_step(config: ConfigDict, model: Decoder) -> tuple[optax.GradientTransformation, Callable]:
    """The optimizer of a run and its train step, as `step.make_train_step` says.

    Raises:
      UserError: the schedule does not fit the number of steps.
    """
    schedule = make_schedule(config.optimizer, config.steps)
    optimizer = make_optimizer(config.optimizer, schedule)
    weights = LossWeights(**config.loss)
    return optimizer, make_train_step(model, optimizer, schedule, weights, config.data.grad_accum_steps)


def abstract_batch(config: ConfigDict, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """A global batch: int32 [batch, length] of each of `ARRAYS`, and where it lies.

    Raises:
      UserError: the rows of its parts do not divide over the devices.
    """
    shape = (config.data.batch_size, config.data.sequence_length)
    where = NamedSharding(mesh, sharding.partition_spec(("batch", "length"), config.sharding_rules))
    rows, ways = config.data.batch_size // config.data.grad_accum_steps, sharding.num_shards(mesh, where.spec[0])
    if rows % ways:
        raise UserError(
            f"--config.data.batch_size={config.data.batch_size}: its parts of {rows} rows do not divide over "
            f"the {ways} devices that share the batch; give a multiple"
        )
    return {name: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=where) for name in ARRAYS}
