"""The device mesh, and the rules that map logical axes to its axes."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flexolmo_jax.errors import UserError

if TYPE_CHECKING:
    Device = Any  # to type checkers, jax.Device is a variable
else:
    Device = jax.Device

MESH_AXES = ("data", "fsdp", "expert", "tensor")

# A rule is (logical axis, mesh axes): one mesh axis, several, or None for "not sharded".
Rules = Sequence[tuple[str, str | Sequence[str] | None]]


def platform_of(device: Device) -> str:
    """The platform of a device: "cpu", "gpu", "hopper" (GPUs of compute capability 9.0) or "tpu"."""
    return "hopper" if getattr(device, "compute_capability", "") == "9.0" else device.platform


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Device] | None = None) -> Mesh:
    """Builds the mesh over all devices.

    Args:
      sizes: devices along each of `MESH_AXES`; at most one may be -1, and takes the remaining devices.
      devices: the devices to use; all of them by default.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    shape = [sizes[axis] for axis in MESH_AXES]
    known = math.prod(size for size in shape if size != -1)
    free = shape.count(-1)
    described = ", ".join(f"{axis}={sizes[axis]}" for axis in MESH_AXES)
    if free > 1 or any(size == 0 or size < -1 for size in shape):
        raise UserError(f"config.mesh: {described}: sizes must be positive, and at most one of them -1")
    if len(devices) % known or (not free and known != len(devices)):
        raise UserError(
            f"config.mesh: {described} does not fit {len(devices)} devices; the sizes must multiply to that"
        )
    shape = [len(devices) // known if size == -1 else size for size in shape]
    axis_types = (jax.sharding.AxisType.Auto,) * len(MESH_AXES)
    return Mesh(_arrange(shape, devices, described), MESH_AXES, axis_types=axis_types)


def _arrange(shape: Sequence[int], devices: Sequence[Device], described: str) -> np.ndarray:
    """Arranges devices in an array of that shape; neighbors on an axis are neighbors in the network if possible.

    The network between TPU slices is slower than within one: only the axis "data", copies of the parameters, spans
    slices. JAX numbers other devices' slices by host, and parameters may well be sharded over GPUs of several hosts.
    Those are taken in their order, so that neighbors on the last axes are on one host.
    """
    slices = len({getattr(device, "slice_index", 0) for device in devices if device.platform == "tpu"} or {0})
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    copies, *others = shape
    if copies % slices:
        raise UserError(
            f"config.mesh: {described} does not fit {slices} slices; data must be a multiple of their number"
        )
    within, between = (copies // slices, *others), (slices, *(1 for _ in others))
    return mesh_utils.create_hybrid_device_mesh(within, between, devices, allow_split_physical_axes=True)


def partition_spec(axes: Sequence[str | None], rules: Rules) -> PartitionSpec:
    """Translates the logical axes of one array by the rules.

    Raises:
      UserError: an axis has no rule, or two axes of the array land on the same mesh axis.
    """
    table = {logical: as_tuple(mesh_axes) for logical, mesh_axes in rules}
    unknown = [axis for axis in axes if axis is not None and axis not in table]
    if unknown:
        raise UserError(f"config.sharding_rules: no rule for logical axis '{unknown[0]}'; add one")
    spec = [() if axis is None else table[axis] for axis in axes]
    missing = {mesh_axis for mesh_axes in spec for mesh_axis in mesh_axes} - set(MESH_AXES)
    if missing:
        raise UserError(f"config.sharding_rules: '{min(missing)}' is no axis of the mesh; use {', '.join(MESH_AXES)}")
    used = [mesh_axis for mesh_axes in spec for mesh_axis in mesh_axes]
    twice = sorted({mesh_axis for mesh_axis in used if used.count(mesh_axis) > 1})
    if twice:
        raise UserError(
            f"config.sharding_rules: the logical axes {tuple(axes)} of one array use mesh axis '{twice[0]}' twice"
        )
    return PartitionSpec(*(mesh_axes or None for mesh_axes in spec))


def leaf_shardings(shapes: Any, axes: Any, mesh: Mesh, rules: Rules) -> Any:
    """Shardings of a flat dict of leaves.

    Args:
      shapes: {path: anything with `.shape`}.
      axes: {path: logical axes, one per dimension}.
      mesh: the mesh.
      rules: logical axis -> mesh axes.

    Raises:
      UserError: a dimension does not divide into its number of shards, or the rules collide.
    """
    shardings = {}
    for path, leaf in shapes.items():
        spec = partition_spec(axes[path], rules)
        for dimension, mesh_axes in zip(leaf.shape, spec, strict=True):
            shards = num_shards(mesh, mesh_axes)
            if dimension % shards:
                raise UserError(
                    f"config.mesh: dimension {dimension} of {path} does not divide over the {shards} devices "
                    f"of mesh axes {as_tuple(mesh_axes)}; choose a divisor of {dimension}"
                )
        shardings[path] = NamedSharding(mesh, spec)
    return shardings


def constrain(x: jax.Array, axes: Sequence[str | None], rules: Rules) -> jax.Array:
    """Constrains an activation's sharding by its logical axes; returns it as is without a mesh or rules."""
    if not rules or jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes, rules))


def even_spec(shape: Sequence[int], axes: Sequence[str | None], rules: Rules) -> PartitionSpec:
    """Like `partition_spec`, but does not shard dimensions that do not divide over the devices.

    For `jax.shard_map`, which takes even shards only; needs a mesh (`jax.set_mesh`).
    """
    sizes = jax.sharding.get_abstract_mesh().shape
    return PartitionSpec(
        *(
            None if dimension % math.prod(sizes[axis] for axis in as_tuple(mesh_axes)) else mesh_axes
            for dimension, mesh_axes in zip(shape, partition_spec(axes, rules), strict=True)
        )
    )


def num_shards(mesh: Mesh, mesh_axes: str | Sequence[str] | None) -> int:
    """Number of shards along these mesh axes."""
    return math.prod(mesh.shape[axis] for axis in as_tuple(mesh_axes))


def as_tuple(mesh_axes: str | Sequence[str] | None) -> tuple[str, ...]:
    """Normalizes the mesh axes of one dimension of a `PartitionSpec` or a rule: none, one or several."""
    if mesh_axes is None:
        return ()
    return (mesh_axes,) if isinstance(mesh_axes, str) else tuple(mesh_axes)
