"""Checkpoints of a run in progress: the train state and the data position, written by Orbax in the background."""

from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath


class Checkpoints:
    """The `checkpoints/` folder of a workdir; a checkpoint is there whole or not at all."""

    def __init__(self, directory: epath.PathLike, keep: int):
        """Opens the folder; `keep` is how many of the latest checkpoints stay."""
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(epath.Path(directory).resolve(), options=options)

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, state: Any, data_position: dict[str, Any]) -> None:
        """Starts to save in the background, unless that step is saved already."""
        if step == self.latest_step():
            return
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data_position))
        self._manager.save(step, args=items)

    def restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """Reads (state, data position); `like` gives the state's structure, shapes, dtypes and shardings."""
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore())
        restored = self._manager.restore(step, args=items)
        return restored.state, restored.data

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        """Waits for the save under way."""
        self._manager.wait_until_finished()
        self._manager.close()
