"""The tasks by the names that task=NAME takes. Your own needs no entry: task=own task.name=src.my_tasks.Mine."""

from __future__ import annotations

from pathlib import Path

from src.config import Task as TaskSettings
from src.engine.commands.schema import METRICS
from src.engine.own import build_part, check_still_there, is_own
from src.engine.runs.model_folder import ModelCard, damaged
from src.engine.steps.task_kind import TaskKind
from src.tasks.binary import Binary
from src.tasks.multiclass import Multiclass
from src.tasks.multilabel import Multilabel
from src.tasks.regression import Regression

TASKS = {"multiclass": Multiclass, "binary": Binary, "multilabel": Multilabel, "regression": Regression}


def build_task_kind(settings: TaskSettings) -> TaskKind:
    """The task of a new run. Raises UserError."""
    given = {"positive": settings.positive, "threshold": settings.threshold, "values": {}}
    return _named(settings.name, build_part("task.name", settings.name, TASKS, given, settings.options, TaskKind))


def task_kind_of(card: ModelCard, folder: Path) -> TaskKind:
    """The task of a model. Raises UserError, which names the folder."""
    if card.task not in TASKS and not is_own(card.task):
        raise damaged(folder / "model.json", f"task is {card.task[:60]!r}, not one of {', '.join(TASKS)}")
    check_still_there(card.task, folder)
    given = {"positive": None, "threshold": None, "values": card.task_values}
    return _named(card.task, build_part("task.name", card.task, TASKS, given, card.task_options, TaskKind))


def _named(name: str, kind: TaskKind) -> TaskKind:
    kind.name = name
    METRICS.update({f"val/{metric}": "min" for metric in kind.less_is_better})
    return kind
