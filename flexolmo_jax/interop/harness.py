"""Tasks of lm-evaluation-harness on one model, whole and with each contributed expert left out (extra `eval`)."""

import contextlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from flexolmo_jax.errors import UserError
from flexolmo_jax.inference.model import Model
from flexolmo_jax.interop.lm_eval import FlexOlmoLM

# Draws for the standard error of a metric that has none in closed form; the harness's own 100,000 take minutes a row.
BOOTSTRAP_ITERS = 1000

# A metric's "value", and its "standard_error" or None where the harness gives none.
Estimate = Mapping[str, float | None]


def evaluate_tasks(
    model: Model,
    tasks: Sequence[str],
    *,
    include_path: epath.PathLike | None = None,
    limit: int | None = None,
    without: Sequence[str] = (),
    batch_size: int = 8,
    max_length: int | None = None,
) -> dict[str, dict[str, Estimate]]:
    """Runs tasks on the whole model, then with each contributed expert left out; progress on standard error.

    Args:
      model: a loaded model.
      tasks: names of tasks, groups or tags, or patterns such as "mmlu_*".
      include_path: a directory with tasks of one's own.
      limit: at most so many documents of each task.
      without: where given, the only row is the model without these experts.
      batch_size: requests computed at once.
      max_length: tokens that the model may see; by default, as many as in a row that the anchor was trained on.

    Returns:
      {"full model", "without NAME", ...: {"TASK:METRIC": estimate}}. A group that has figures of its own stands for
      its tasks.

    Raises:
      UserError: a task is unknown or cannot be run, or a name is not on the roster.
    """
    if include_path is not None and not epath.Path(include_path).is_dir():
        raise UserError(f"--include_path={include_path}: no such directory; give one with task files (.yaml)")
    rows = {_label(without): without} if without else {_label(()): (), **{_label([x]): [x] for x in model.roster[1:]}}
    manager = TaskManager(include_path=include_path)
    names = _match(manager, tasks)
    matrix = {}
    for label, left_out in rows.items():
        lm = FlexOlmoLM(model, without=left_out, batch_size=batch_size, max_length=max_length)
        try:
            with contextlib.redirect_stdout(sys.stderr):  # the harness prints, and a table is to come
                results = simple_evaluate(
                    lm,
                    tasks=names,
                    task_manager=manager,
                    limit=limit,
                    bootstrap_iters=BOOTSTRAP_ITERS,
                    log_samples=False,
                )
        except ValueError as error:  # how the harness refuses a task
            raise UserError(f"--tasks={','.join(tasks)}: {error}") from error
        matrix[label] = _estimates(results)
    return matrix


def _label(without: Sequence[str]) -> str:
    return f"without {', '.join(without)}" if without else "full model"


def _match(manager: TaskManager, tasks: Sequence[str]) -> list[str]:
    """The names that the tasks stand for, each once."""
    matches = {task: manager.match_tasks([task]) for task in tasks}
    for task, found in matches.items():
        if not found:
            raise UserError(
                f"--tasks={task}: no such task; `lm_eval ls tasks` lists them, and --include_path=DIR adds your own"
            )
    return list(dict.fromkeys(name for found in matches.values() for name in found))


def _estimates(results: Mapping[str, Any]) -> dict[str, Estimate]:
    """{"TASK:METRIC": estimate} of what the harness returns, with its filter where that is not the plain one."""
    subtasks = {name for group in results.get("groups", ()) for name in results["group_subtasks"][group]}
    estimates = {}
    for task, figures in results["results"].items():
        for key, value in figures.items():
            metric, comma, filter_name = key.partition(",")
            if task in subtasks or not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = figures.get(f"{metric}_stderr,{filter_name}")  # "N/A" where there is none
            error = float(error) if isinstance(error, int | float) else None
            column = f"{task}:{metric}" if filter_name == "none" else f"{task}:{key}"
            estimates[column] = {"value": float(value), "standard_error": error}
    return estimates
