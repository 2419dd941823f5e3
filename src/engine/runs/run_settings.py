"""The settings of an older run, read by a program whose schema may have changed since.

A key that the run lacks has its default; a key that the schema no longer has is left out with a warning. So a run can be
continued after new settings were added, and evaluate, predict and export read runs of any age.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from src.engine.commands import config_checks, schema
from src.engine.commands.schema import KNOBS
from src.engine.commands.user_command import corrected
from src.engine.project import CONF
from src.engine.runs.errors import ExitCode, UserError
from src.engine.runs.plain_values import read_yaml
from src.engine.runs.run_names import free_name
from src.engine.runs.text import printable

log = logging.getLogger(__name__)

# Settings that may change when a run is continued: they say where and how, not what is computed.
FREE_TO_CHANGE = (
    "name", "runs_dir", "resume", "logger", "memory", "report", "oom", "strategy", "model.split_at",
    "data.num_workers", "data.timeout_seconds", "trainer.threads", "trainer.accelerator", "trainer.devices",
    "trainer.num_nodes", "trainer.compile", "trainer.on_nan",  # which concerns steps that the run has not made yet
    "checkpoint.every_n_steps", "checkpoint.every_n_minutes", "checkpoint.background",
)  # fmt: skip
RENAMED = {"data.num_pictures": "data.num_images"}  # settings of older runs -> their name today
_warned: set[str] = set()  # files: a command reads a file more than once


def stored_settings(path: Path) -> dict[str, Any]:
    """config.yaml of a run's folder as nested plain values, without keys that the schema lacks. Raises UserError."""
    file = path / "config.yaml"
    try:
        stored = read_yaml(file)
        if not (isinstance(stored, dict) and isinstance(stored.get("data"), dict)):
            raise ValueError("it does not hold the settings of a run")
    except PermissionError:
        raise
    except (yaml.YAMLError, ValueError, OSError) as error:
        raise UserError(
            f"{printable(file)} cannot be read",
            where=str(file.absolute()),
            why=" ".join(str(error).split())[:300],
            fix="copy it back from a backup; the run cannot be used without it",
            code=ExitCode.DATA,
        ) from error
    unknown: list[str] = []
    settings = _of_schema(_with_task(stored), "", unknown)
    if unknown and str(file) not in _warned:
        _warned.add(str(file))
        log.warning(
            f"{printable(file)} has {printable(', '.join(unknown))}, which this version of the program does not know, "
            "and leaves out."
        )
    if _balanced_means_inverse(settings) and settings["data"].get("class_weights") == "balanced":
        settings["data"]["class_weights"] = "inverse"
    return settings


def _with_task(stored: dict[str, Any]) -> dict[str, Any]:
    """The settings with a section task, which was model.task in older runs."""
    model = stored.get("model")
    if "task" in stored or not isinstance(model, dict):
        return stored
    rest = {key: value for key, value in model.items() if key != "task"}
    return {**stored, "task": {"name": model.get("task", "multiclass")}, "model": rest}


def _balanced_means_inverse(settings: dict[str, Any]) -> bool:
    """Whether a run is older than data.layout: its class_weights=balanced had no limit, as inverse has none today."""
    return "layout" not in settings["data"]


def _of_schema(stored: dict[str, Any], prefix: str, unknown: list[str]) -> dict[str, Any]:
    """The stored values whose keys the schema has; the other keys are added to `unknown`."""
    settings = {}
    for name, value in stored.items():
        key = RENAMED.get(f"{prefix}{name}", f"{prefix}{name}")
        name = key.removeprefix(prefix)
        if key not in KNOBS and value is None:
            continue  # strategy.port, an older setting without use
        if key not in KNOBS:
            unknown.append(key)
        elif is_dataclass(KNOBS[key].default_factory) and isinstance(value, dict):
            settings[name] = _of_schema(value, f"{key}.", unknown)
        else:
            settings[name] = value
    return settings


def refuse_other_settings(path: Path, new: dict[str, Any]) -> None:
    """Raises UserError if the run in the folder has settings that compute something else than `new`."""
    old = stored_settings(path)
    old_flat, new_flat = flat(old), flat(new)
    changed = changed_settings(old_flat, new_flat)
    if changed.get("data.class_weights") == ("inverse", "balanced") and _balanced_means_inverse(old):
        log.warning("The run began when data.class_weights=balanced had no limit; the rest of it has (docs/uneven.md).")
        del changed["data.class_weights"]
    if not changed:
        return
    lines = [f"{key}: {printable(was)} there, {printable(now)} now" for key, (was, now) in changed.items()]
    if len(lines) > 5:
        lines[5:] = [f"and {len(lines) - 5} more"]
    name = f"name={free_name(path)}"
    fixes = [corrected(name)]
    if old_flat.get("model.backbone") == new_flat.get("model.backbone") and (path / "model/model.json").is_file():
        # A schedule cannot grow, but a new run can begin with the weights of this one.
        new_run = corrected(name, f"model.weights={path / 'model'}")
        fixes.append(f"{new_run} # begins with its weights, and a new head")
    raise UserError(
        f"the run {printable(path.name)} was made with other settings",
        where=str(path / "config.yaml"),
        why="\n".join(lines),
        fix=fixes,
    )


def changed_settings(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The flat settings that differ and change the result: key -> (old value, new value).

    A key that the old settings lack had its default. A mapping on one side may be a plain key on the other, such as
    freeze.phases.
    """
    old = {RENAMED.get(key, key): value for key, value in old.items()}
    changed: dict[str, tuple[Any, Any]] = {}
    for key in {**new, **old}:
        if f"{key}.".startswith(tuple(f"{free}." for free in FREE_TO_CHANGE)):
            continue
        if key not in new:
            changed[key] = old[key], "nothing"
        elif key not in old:
            defaults = list(_defaults(key))
            if new[key] not in defaults:
                changed[key] = f"{defaults[0]}, its default,", new[key]
        elif old[key] != new[key]:
            changed[key] = old[key], new[key]
    return changed


def _defaults(key: str) -> Iterator[Any]:
    """The defaults that a key can have: the schema's first, then those of the choices in conf/."""
    yield flat(OmegaConf.to_container(schema.defaults())).get(key)  # type: ignore[arg-type]
    for file in sorted(CONF.glob("*.yaml")) + sorted(CONF.glob("*/*.yaml")):
        if file.parent.name in ("hydra", "experiment"):
            continue
        values = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
        whole = file.parent == CONF or file.read_text(encoding="utf-8").startswith("# @package _global_")
        values = flat(values if whole else {file.parent.name: values})  # type: ignore[dict-item, arg-type]
        if key in values:
            yield values[key]


def settings_without_run(changes: dict[str, Any]) -> dict[str, Any]:
    """Settings for a model whose run is not there: conf/'s, with the images that the changes name."""
    source = "table" if "data.table" in changes else "image_folder"
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose("train", [f"data={source}"])
    for key in ("data.root", "data.table", "data.source", "data.options"):
        if key in changes:
            OmegaConf.update(composed, key, config_checks.as_text(changes[key]))
    settings = OmegaConf.to_container(composed)
    assert isinstance(settings, dict)
    return {str(key): value for key, value in settings.items()}


def merged(stored: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run with some changes ({'data.batch_size': 16}), and with defaults for those that it lacks.

    A ${...} in a value is text. Raises UserError for values that the command line would refuse too.
    """
    try:
        whole = OmegaConf.merge(schema.defaults(), config_checks.as_text(stored))
        config_checks.read(whole, files=False)
    except (OmegaConfBaseException, UserError, TypeError, ValueError) as error:
        reason = (str(error).splitlines() or [""])[0][:200]
        raise UserError(
            f"the settings of the run do not fit this version of the program: {printable(reason)}",
            where="its config.yaml",
            why="the type and the range of every setting are declared in src/config.py",
            fix="use the version of the program that made the run; its environment.json names the commit",
            code=ExitCode.DATA,
        ) from error
    try:
        for key, value in changes.items():
            OmegaConf.update(whole, key, config_checks.as_text(value))
    except OmegaConfBaseException as error:
        raise UserError(
            f"{key}={printable(value)} cannot be: {str(error).splitlines()[0]}",
            why="the type of every setting is declared in src/config.py",
            fix=corrected(remove=[key]),
        ) from error
    return OmegaConf.to_container(whole, resolve=True)  # type: ignore[return-value]


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{'data.batch_size': 64, ...} of nested dicts with text keys; all other values stay whole."""
    result: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict) and value and all(isinstance(inner, str) for inner in value):
            result |= flat(value, f"{prefix}{name}.")
        else:
            result[f"{prefix}{name}"] = value
    return result
