"""Classes that a sweep's settings name: search={_target_: PATH, ...} and scheduler={_target_: PATH, ...}."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from hydra.utils import get_object
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from src.engine.commands.suggestions import did_you_mean
from src.engine.runs.errors import UserError
from src.engine.sweeps.commands import sweep_command

HOMES = {"search": ("ray.tune.search.", Searcher), "scheduler": ("ray.tune.schedulers.", TrialScheduler)}
EXAMPLES = {
    "search": "{_target_: ray.tune.search.optuna.OptunaSearch, seed: 1}",
    "scheduler": "{_target_: ray.tune.schedulers.ASHAScheduler, time_attr: epoch, max_t: 13}",
}


def class_of(entry: dict[str, Any], setting: str) -> type:
    """The class of an entry of `search` or `scheduler`, which is below Ray's folder for them or below src. Raises UserError.

    Nothing else is ever called: a _target_ such as ray.tune.search.os.system would be code from a config file.
    """
    home, kind = HOMES[setting]
    target, cls = entry.get("_target_"), None
    if isinstance(target, str) and target.startswith((home, "src.")):
        try:
            cls = get_object(target)
        except Exception as error:
            raise refused(entry, setting, f"it cannot be imported: {error}") from error
    if not (isinstance(cls, type) and issubclass(cls, kind) and cls.__module__.startswith((home, "src."))):
        raise refused(entry, setting, f"a {setting} is a class below {home} or src. that inherits from {kind.__name__}")
    return cls


def call(cls: type, entry: dict[str, Any], setting: str) -> Any:
    """An object of the class, with the keys of the entry. Raises UserError."""
    try:
        return cls(**{key: value for key, value in entry.items() if key != "_target_"})
    except (TypeError, ValueError, AssertionError, ImportError) as error:  # Ray asserts that a package is installed
        raise refused(entry, setting, str(error)) from error


def refused(entry: dict[str, Any], setting: str, why: str) -> UserError:
    return UserError(
        f"{setting}: {entry.get('_target_')} cannot be used",
        where=f"{setting}={entry}",
        why=why,
        fix=sweep_command(f"{setting}={EXAMPLES[setting]}"),
    )


def unknown(setting: str, name: Any, names: Sequence[str]) -> UserError:
    close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    return UserError(
        f"{setting}={name} is not a choice{did_you_mean(*close)}",
        why=f"{setting} is one of: {', '.join(names)}, or {{_target_: {HOMES[setting][0]}NAME}}",
        fix=sweep_command(f"{setting}={(close or names)[0]}"),
    )
