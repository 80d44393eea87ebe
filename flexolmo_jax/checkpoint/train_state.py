"""Checkpoints of a run in progress: the train state and the data position, written by Orbax in the background.

A checkpoint keeps checksums of the position and of every leaf. It is read and compared here before Orbax reads it,
whose errors do not tell damage from other faults. The formats are those that Orbax writes: JSON, and arrays in zarr on
OCDBT, which tensorstore reads.
"""

import functools
import itertools
import json
import sys
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath

from flexolmo_jax import distributed
from flexolmo_jax.checkpoint.digests import chunks, whole
from flexolmo_jax.checkpoint.params import COPY_THREADS
from flexolmo_jax.errors import UserError
from flexolmo_jax.paths import absolute, kvstore

# What tensorstore says of files that are missing, cut off, or hold something else.
_DAMAGE = ("DATA_LOSS", "OUT_OF_RANGE", "NOT_FOUND", "FAILED_PRECONDITION", "INVALID_ARGUMENT")
_POSITION, _BEST = "data position", "best evaluation"  # their names among the checksums


class Best(NamedTuple):
    """The evaluation with the lowest held-out loss so far.

    Attributes:
      step: after which it was made; that step's checkpoint is kept.
      loss: mean of the held-out corpora's nats per token.
    """

    step: int
    loss: float


class DamagedError(Exception):
    """A checkpoint cannot be read, or is not what was saved; the message says of which part."""


def latest_whole_step(directory: epath.PathLike, like_position: dict[str, Any]) -> int | None:
    """The latest step whose checkpoint can be read; later ones, which are damaged, get another name.

    A checkpoint that is looked at is read once, a few chunks at a time, and so is the best one that it names: without
    that it counts as damaged. Nothing is renamed where none can be read. To
    be called before `Checkpoints` opens the folder, which knows no checkpoint by another name.

    Args:
      directory: the folder, which need not be there.
      like_position: a data position, for its structure.

    Raises:
      UserError: there are checkpoints, and all are damaged.
    """
    directory = epath.Path(directory)
    steps = [int(entry.name) for entry in directory.iterdir() if entry.name.isdigit()] if directory.exists() else []
    damaged = {}
    for step in sorted(steps, reverse=True):
        try:
            best = _check(directory / str(step), like_position)
            if best and best.step != step:
                _check_best(directory / str(best.step), like_position)
        except DamagedError as error:
            damaged[step] = error
            continue
        for later, reason in damaged.items():
            name = _set_aside(directory, later)
            folder = directory / str(later)
            sys.stderr.write(f"{folder}: damaged ({reason}); renamed to {name}, resuming from step {step}\n")
        return step
    if damaged:
        step, reason = max(damaged.items())
        raise UserError(
            f"{directory}: no checkpoint can be read (step {step}: {reason}); put back a copy of one, or "
            "remove the folder to train from the start"
        )
    return None


def _set_aside(directory: epath.Path, step: int) -> str:
    """Renames a checkpoint so that it is none any more; returns its new name."""
    names = itertools.chain([f"{step}.damaged"], (f"{step}.damaged-{count}" for count in itertools.count(2)))
    name = next(name for name in names if not (directory / name).exists())
    (directory / str(step)).rename(directory / name)
    return name


class Checkpoints:
    """The `checkpoints/` folder of a workdir; a checkpoint is there whole or not at all.

    Beside the data position a checkpoint keeps checksums of the position and of every leaf of the state, which
    are compared when it is read.

    Attributes:
      best: the best evaluation, as it was last saved or restored; its checkpoint stays.
    """

    def __init__(self, directory: epath.PathLike, keep: int):
        """Opens the folder; `keep` is how many of the latest checkpoints stay, beside that of the best evaluation."""
        self.best: Best | None = None
        policies = [ocp.checkpoint_managers.LatestN(keep), _KeepBest(self)]
        options = ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(policies), cleanup_tmp_directories=True
        )
        self._directory = absolute(directory)
        self._manager = ocp.CheckpointManager(self._directory, options=options)

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, state: Any, position: dict[str, Any], best: Best | None = None) -> None:
        """Starts to save in the background, unless that step is saved already.

        Args:
          step: of the state.
          state: the train state.
          position: the data position.
          best: the best evaluation so far, whose checkpoint is this one or there already.

        Raises:
          UserError: a leaf of the state is not finite; nothing is saved.
        """
        if step == self.latest_step():
            return
        checksums = _checksums(state, f"step {step}") | {_POSITION: _json_checksum(position)}
        data: dict[str, Any] = {"position": position, "checksums": checksums}
        if best:
            data["best"] = best._asdict()
            checksums[_BEST] = _json_checksum(data["best"])
        self.best = best
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data))
        self._manager.save(step, args=items)

    def restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """Reads (state, data position), and sets `best`.

        Args:
          step: of the checkpoint.
          like: gives the state's structure, shapes, dtypes and shardings; arrays or abstract ones.

        Raises:
          UserError: the checkpoint is of a state of another structure.
        """
        _check_structure(self._directory / str(step), like)
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore())
        restored = self._manager.restore(step, args=items)
        self.best = _best_of(restored["data"])
        return restored["state"], _position_of(restored["data"])

    def restore_checked(self, step: int, like: Any, like_position: dict[str, Any]) -> Any:
        """Reads the state of a step as `restore` does, after it compared the checksums as `latest_whole_step` does.

        Raises:
          UserError: the checkpoint is damaged.
        """
        self._manager.wait_until_finished()
        folder = self._directory / str(step)

        def check() -> None:
            try:
                _check(folder, like_position)
            except DamagedError as error:
                remedy = "run the same command again, which resumes from another checkpoint"
                raise UserError(f"{folder}: damaged ({error}); {remedy}") from None

        distributed.from_primary("best checkpoint", check)
        return self.restore(step, like)[0]

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        """Waits for the save under way, unless other processes may be lost, with whom it could not end."""
        is_agreed = kind is None or issubclass(kind, UserError)
        if distributed.count() > 1 and not is_agreed:
            return
        self._manager.wait_until_finished()
        self._manager.close()


class _KeepBest(ocp.checkpoint_managers.PreservationPolicy):
    """Preserves the checkpoint of the best evaluation."""

    def __init__(self, checkpoints: Checkpoints):
        self._checkpoints = checkpoints

    def should_preserve(
        self,
        checkpoints: Sequence[ocp.checkpoint_managers.PolicyCheckpointInfo],
        *,
        context: ocp.checkpoint_managers.PreservationContext,
    ) -> Sequence[bool]:
        best = self._checkpoints.best
        return [best is not None and checkpoint.step == best.step for checkpoint in checkpoints]


def _checksums(state: Any, label: str) -> dict[str, int]:
    """{leaf: the sum of its bits modulo 2**32}.

    Sums do not depend on how leaves are spread over devices. `label` says in errors when this is.

    Raises:
      UserError: a leaf is not finite.
    """
    examined = jax.device_get(_examine(state))
    broken = sorted(leaf for leaf, (finite, _) in examined.items() if not finite)
    if broken:
        raise UserError(
            f"{label}: {broken[0]} is not finite after the update; no checkpoint of this step is kept: check the data, "
            "or lower config.optimizer.learning_rate, in a new workdir"
        )
    return {leaf: int(total) for leaf, (_, total) in examined.items()}


def _position_of(data: dict[str, Any]) -> dict[str, Any]:
    """The data position in what stands beside a state; once it stood there alone."""
    return data["position"] if "checksums" in data else data


def _best_of(data: dict[str, Any]) -> Best | None:
    """The best evaluation in what stands beside a state, if any."""
    return Best(**data["best"]) if "checksums" in data and "best" in data else None


def _check_best(folder: epath.Path, like_position: dict[str, Any]) -> None:
    """As `_check`, of the checkpoint of the best evaluation."""
    try:
        _check(folder, like_position)
    except DamagedError as error:
        raise DamagedError(f"{folder.name}, the best checkpoint until then: {error}") from None


def _check(folder: epath.Path, like_position: dict[str, Any]) -> Best | None:
    """Reads a whole checkpoint, a few chunks at a time, and returns the best evaluation until then, if it names one.

    Args:
      folder: of one step.
      like_position: a data position, for its structure.

    Raises:
      DamagedError: a part is missing or unreadable, or is not what was saved.
      UserError: it may not be read.
    """
    folder = absolute(folder)
    data = _read_json(folder / "data" / "metadata")
    named = data.get("checksums", {}) if isinstance(data, dict) else {}
    position = _position_of(data) if named else data
    altered = bool(named) and named.get(_POSITION) != _json_checksum(position)
    if _structure(position) != _structure(like_position):
        if named and not altered:
            raise UserError(
                f"{folder}: its data position is of another version, which had another order of the data; finish the "
                "run with the version that began it, or name a new workdir"
            )
        raise DamagedError("data position: not one")
    if altered:
        raise DamagedError("data position: altered")
    if named.get(_BEST) != (_json_checksum(data["best"]) if named and "best" in data else None):
        raise DamagedError("best evaluation: altered")
    for file in (folder / "state" / "array_metadatas").glob("*"):
        _read_json(file)
    with ThreadPoolExecutor(COPY_THREADS) as pool:
        for leaf, array in _open(folder).items():
            chunk = [edge or 1 for edge in array.chunk_layout.read_chunk.shape or array.shape]
            total = sum(pool.map(functools.partial(_chunk_sum, leaf, array), chunks(whole(array.shape), chunk))) % 2**32
            if named and named.get(leaf) != total:
                raise DamagedError(f"{leaf}: altered")
    return _best_of(data)


def _check_structure(folder: epath.Path, like: Any) -> None:
    """Raises UserError unless a checkpoint that is whole has the leaves of `like`, in their shapes."""
    stored = {leaf: tuple(array.shape) for leaf, array in _open(folder).items()}
    wanted = {_name(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(like)}
    mismatched = sorted(leaf for leaf in stored.keys() | wanted.keys() if stored.get(leaf) != wanted.get(leaf))
    if mismatched:
        raise UserError(
            f"{folder}: of another program's run (its {mismatched[0]} is {stored.get(mismatched[0])}, this one's "
            f"{wanted.get(mismatched[0])}); resume with the version that began the run, or name a new workdir"
        )


@jax.jit
def _examine(state: Any) -> dict[str, tuple[jax.Array, jax.Array]]:
    """{leaf: (whether its numbers are finite, the sum of its bits)}, each a scalar."""

    def examine(leaf):
        bits = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{8 * leaf.dtype.itemsize}"))
        finite = jnp.isfinite(leaf).all() if jnp.issubdtype(leaf.dtype, jnp.floating) else jnp.array(True)
        return finite, jnp.sum(bits, dtype=jnp.uint32)

    return {_name(path): examine(leaf) for path, leaf in jax.tree.leaves_with_path(state)}


def _name(path: Any) -> str:
    """A leaf's name in Orbax's layout."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _open(folder: epath.Path) -> dict[str, ts.TensorStore]:
    """Opens every leaf that the index of a checkpoint names."""
    index = _read_json(folder / "state" / "_METADATA")
    try:
        driver = "zarr3" if index.get("use_zarr3") else "zarr"
        leaves = [leaf for leaf in index["tree_metadata"].values() if not leaf["value_metadata"]["skip_deserialize"]]
        names = [".".join(key["key"] for key in leaf["key_metadata"]) for leaf in leaves]
    except (KeyError, TypeError, AttributeError):
        raise DamagedError("state/_METADATA: no index of leaves") from None
    context = ts.Context({"cache_pool": {"total_bytes_limit": 0}})
    arrays = {}
    for name in names:
        spec = {"driver": "ocdbt", "base": kvstore(folder / "state"), "path": f"{name}/"}
        try:
            arrays[name] = ts.open({"driver": driver, "kvstore": spec, "open": True}, context=context).result()
        except ValueError as error:
            raise _unreadable(name, error) from None
    return arrays


def _chunk_sum(leaf: str, array: ts.TensorStore, index: tuple[slice, ...]) -> int:
    """The sum of a chunk's bits, of whatever size its numbers are; they must be finite, as all that is saved is."""
    try:
        values = np.ascontiguousarray(array[index].read().result())
    except ValueError as error:
        raise _unreadable(leaf, error) from None
    if jnp.issubdtype(values.dtype, jnp.floating) and not np.isfinite(values).all():
        raise DamagedError(f"{leaf}: not finite")
    return int(np.sum(values.reshape(-1).view(f"u{values.dtype.itemsize}"), dtype=np.uint32))


def _unreadable(leaf: str, error: ValueError) -> Exception:
    reason = str(error).splitlines()[0]
    if reason.startswith(_DAMAGE):
        return DamagedError(f"{leaf}: missing, cut off or overwritten")
    return UserError(f"checkpoint: {leaf} cannot be read ({reason[:200]})")


def _read_json(file: epath.Path) -> Any:
    """Reads a file of JSON; raises DamagedError where it is missing or is none."""
    label = f"{file.parent.name}/{file.name}"
    try:
        return json.loads(file.read_text())
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise DamagedError(f"{label}: missing") from None
    except ValueError:
        raise DamagedError(f"{label}: not JSON") from None


def _structure(value: Any) -> Any:
    """The same tree with types for its leaves; a tuple is what JSON makes of it."""
    if isinstance(value, dict):
        return {key: _structure(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_structure(item) for item in value]
    return type(value)


def _json_checksum(document: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(document, sort_keys=True).encode())
