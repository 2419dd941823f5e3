"""From the composed YAML to a checked Config: values out of range and settings that contradict each other are refused.

Everything here runs before torch is imported, so that a mistake is answered in under a second.
"""

from __future__ import annotations

import re
from dataclasses import Field
from operator import attrgetter
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from src.engine.commands import schema
from src.engine.commands.knobs import ANY, example_of
from src.engine.commands.schema import KNOBS, RULES, Config, Data, value_of
from src.engine.commands.suggestions import did_you_mean, option_like
from src.engine.commands.user_command import corrected
from src.engine.own import check_own, is_own, metric_name, own_like
from src.engine.runs.errors import ExitCode, UserError
from src.engine.runs.files import existing_parent
from src.engine.runs.run_names import check_name
from src.engine.runs.text import as_typed, at_home, printable, shell_word


def read(composed: DictConfig | dict, *, files: bool = True) -> Config:
    """The composed YAML as dataclasses, checked. Raises UserError. files: whether the files it names must exist."""
    if lacking := schema.missing():
        raise _no_such_knob(lacking)
    if isinstance(composed, DictConfig):  # plain first: Hydra's + opens the schema to keys that nothing reads
        composed = OmegaConf.to_container(composed, resolve=True)  # type: ignore[assignment]
    assert RULES, "the front door imports src.rules"
    config: Config = OmegaConf.to_object(OmegaConf.merge(schema.defaults(), as_text(composed)))
    for name in ("root", "table", "split_file"):  # src/engine/weights/weights.py does it for model.weights
        if path := getattr(config.data, name):
            setattr(config.data, name, at_home(path))
    config.runs_dir = at_home(config.runs_dir)
    own_metrics = _own_metrics(config.metrics)
    for key, knob in KNOBS.items():
        if key != "checkpoint.monitor" or not (config.checkpoint.monitor in own_metrics or is_own(config.task.name)):
            check_knob(key, knob, attrgetter(key)(config))
    if config.name is not None:
        check_name(config.name, config.runs_dir)
    for rule in RULES:
        if rule.is_error and rule.broken(config):
            fixes = [_command(words.split(), config) for words in rule.fix.split("|")]
            raise UserError(_text(rule.found, config), why=_text(rule.why, config), fix=fixes)
    if files and config.data.source != "torchvision":
        _check_files(config.data)
    return config


def _no_such_knob(keys: list[str]) -> UserError:
    section, _, name = keys[0].rpartition(".")
    others = f" ({len(keys)} settings are missing: {', '.join(keys)})" if len(keys) > 1 else ""
    return UserError(
        f"src/config.py lacks {keys[0]}, which src/engine reads{others}",
        where=f"src/config.py, the class {section.capitalize() or 'Config'}",
        why="src/engine is newer than src/config.py, or the line was taken out there",
        fix=f"git show template/main:src/config.py | grep ' {name}:'   # the line to put there: UPGRADING.md",
    )


def without_effect(config: Config) -> list[str]:
    """The broken warnings of src/rules.py: what a run logs about settings that nothing reads."""
    broken = [rule for rule in RULES if not rule.is_error and rule.broken(config)]
    return [f"{_text(rule.found, config)}: {_text(rule.why, config)}." for rule in broken]


def as_text(value: Any) -> Any:
    """Plain values for OmegaConf, with every ${ escaped: in a resolved text it is no interpolation."""
    if isinstance(value, dict):
        return {key: as_text(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [as_text(inner) for inner in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def _own_metrics(entries: list[Any]) -> list[str]:
    """What the owner's metrics are called as checkpoint.monitor. Raises UserError for a name that cannot be, or is taken."""
    names: list[str] = []
    for entry in entries:
        dotted = entry.get("_target_") if isinstance(entry, dict) else entry
        if not isinstance(dotted, str) or not is_own(dotted):
            raise UserError(
                f"metrics: {entry} is not a metric",
                why="a metric is a class of yours below src., such as src.my_metrics.Kappa (docs/your_own.md)",
                fix=corrected("metrics=[src.my_metrics.Kappa]"),
            )
        check_own("metrics", dotted)
        name = f"val/{metric_name(entry)}"
        if name in (*names, *KNOBS["checkpoint.monitor"].metadata["options"]):
            why = "metrics are called by the names of their classes"
            raise UserError(
                f"metrics: {dotted} has a name that is taken: {name}", why=why, fix="give the class another name"
            )
        names.append(name)
    return names


def check_knob(key: str, knob: Field[Any], value: Any) -> None:
    """Raises UserError for an empty text, a value that is no choice, or a number out of its range."""
    options, (low, high) = knob.metadata.get("options"), knob.metadata.get("range", (None, None))
    if value == "" and "example" in knob.metadata:
        raise UserError(
            f"{key}= has no value",
            why="a shell variable that is not set leaves nothing after the =; the current folder is .",
            fix=corrected(f"{key}={example_of(knob)}"),
        )
    own = knob.metadata.get("own")
    if own and is_own(value):
        check_own(key, value)
        return
    if options and value not in (*options, knob.default):
        close = option_like(key, str(value), options) or (own and next(iter(own_like(f"src.{value}")), None))
        raise UserError(
            f"{key}={printable(value)} is not a choice" + (did_you_mean(f"{key}={close}") if close else ""),
            why=f"{key} takes one of: {', '.join(options)}" + (f"; or your own, such as {own}" if own else ""),
            fix=corrected(f"{key}={close or options[0]}"),
        )
    if low is not None and value is not None and not low <= value <= high:
        allowed = f"at least {low}" if high == ANY and value < low else f"from {low} to {high}"
        raise UserError(
            f"{key}={value} is out of range", why=f"{key} is {allowed}", fix=corrected(f"{key}={example_of(knob)}")
        )


def _check_files(data: Data) -> None:
    for name in ("table", "split_file", "root"):
        path = getattr(data, name)
        if path is not None and not Path(path).exists():
            raise UserError(
                f"data.{name}={path} does not exist",
                where=str(Path(path).absolute()),
                why="relative paths start from the folder the command is run in",
                fix=f"ls {shell_word(existing_parent(Path(path)))}",
                code=ExitCode.NO_INPUT,
            )


def _text(template: str, config: Config) -> str:
    def shown(found: re.Match[str]) -> str:
        value = as_typed(value_of(config, found[1] or found[2]))
        return f"{found[1]}={value}" if found[1] else value

    return re.sub(r"<([\w.]+)>|\{([a-z_.]+)\}", shown, template)


def _command(words: list[str], config: Config) -> str:
    """The user's command with a rule's words."""
    remove = [word[1:] for word in words if word.startswith("~")]
    use = [_text(word, config) for word in words if not word.startswith("~")]
    for complete in schema.COMPLETIONS:
        use, remove = complete(use, remove)
    return corrected(*use, remove=remove)
