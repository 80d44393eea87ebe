"""Checkpoints of a run in progress: the train state and the data position, written by Orbax in the background."""

import itertools
import sys
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from flexolmo_jax.checkpoint import whole
from flexolmo_jax.errors import UserError


def latest_whole_step(directory: epath.PathLike, like_position: dict[str, Any]) -> int | None:
    """The latest step whose checkpoint can be read; later ones, which are damaged, get another name.

    A checkpoint that is looked at is read once, a few chunks at a time. Nothing is renamed where none can be read. To
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
            whole.check(directory / str(step), like_position)
        except whole.DamagedError as error:
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
    """

    def __init__(self, directory: epath.PathLike, keep: int):
        """Opens the folder; `keep` is how many of the latest checkpoints stay."""
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        self._directory = epath.Path(directory).resolve()
        self._manager = ocp.CheckpointManager(self._directory, options=options)

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, state: Any, position: dict[str, Any]) -> None:
        """Starts to save in the background, unless that step is saved already.

        Raises:
          UserError: a leaf of the state is not finite; nothing is saved.
        """
        if step == self.latest_step():
            return
        data = {"position": position, "checksums": whole.checksums(state, position, f"step {step}")}
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data))
        self._manager.save(step, args=items)

    def restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """Reads (state, data position); `like` gives the state's structure, shapes, dtypes and shardings.

        Raises:
          UserError: the checkpoint is of a state of another structure.
        """
        whole.check_structure(self._directory / str(step), like)
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore())
        restored = self._manager.restore(step, args=items)
        return restored.state, whole.position_of(restored.data)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        """Waits for the save under way."""
        self._manager.wait_until_finished()
        self._manager.close()
