"""What was probably meant: the setting nearest to a mistyped one, and the key of a section that takes a value.

src/word_checks.py and src/command_line.py ask here. Nothing here imports torch.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import Field, fields, is_dataclass
from pathlib import Path
from typing import Any

import hydra
from omegaconf import OmegaConf

from src import config
from src.config_checks import EXAMPLES
from src.errors import UserError
from src.hydra_words import at_home, key_of
from src.user_command import rewritten, typed_words

CONF = Path(__file__).resolve().parent.parent / "conf"
HELP = "python -m src.train --help"
ALL_KEYS = "settings are declared in src/config.py; the whole list with its values: python -m src.train --cfg job"

# What other trainers call it.
ALIASES = {
    "learning_rate": "optimizer.lr",
    "wd": "optimizer.weight_decay",
    "epochs": "trainer.max_epochs",
    "e": "trainer.max_epochs",
    "num_epochs": "trainer.max_epochs",
    "steps": "trainer.max_steps",
    "gpus": "trainer.devices",
    "ngpus": "trainer.devices",
    "num_gpus": "trainer.devices",
    "device": "trainer.accelerator",
    "nodes": "trainer.num_nodes",
    "workers": "data.num_workers",
    "j": "data.num_workers",
    "bs": "data.batch_size",
    "b": "data.batch_size",
    "batch": "data.batch_size",
    "img_size": "data.image_size",
    "imgsz": "data.image_size",
    "size": "data.image_size",
    "resolution": "data.image_size",
    "arch": "model.backbone",
    "architecture": "model.backbone",
    "a": "model.backbone",
    "pretrained": "model.weights",
    "ckpt_path": "model.weights",
    "checkpoint_path": "model.weights",
    "smoothing": "model.label_smoothing",
    "metric": "checkpoint.monitor",
    "path": "data.root",
    "data_dir": "data.root",
    "data_path": "data.root",
    "folder": "data.root",
    "images": "data.root",
    "csv": "data.table",
    "dataset": "data",
    "opt": "optimizer",
    "amp": "precision",
    "fp16": "precision",
    "bf16": "precision",
    "output": "runs_dir",
    "output_dir": "runs_dir",
    "out": "runs_dir",
    "save_dir": "runs_dir",
    "run_name": "name",
    "clip_grad": "trainer.gradient_clip",
}
# What other programs call a value, by the setting that it is given to here.
VALUES = {
    "precision": {
        **{"16": "fp16", "16-mixed": "fp16", "half": "fp16", "amp": "fp16", "true": "fp16", "float16": "fp16"},
        **{
            "bf16-mixed": "bf16",
            "bfloat16": "bf16",
            "32": "fp32",
            "32-true": "fp32",
            "float32": "fp32",
            "false": "fp32",
        },
    },
    "optimizer": {"adam": "adamw", "momentum": "sgd", "nesterov": "sgd"},
    "strategy": {"auto": "single", "none": "single", "null": "single", "ddp_spawn": "ddp", "dataparallel": "dp"},
    "logger": {"none": "csv", "null": "csv", "false": "csv", "tensorboard": "default", "true": "default"},
    "trainer.accelerator": {"cuda": "gpu", "cuda:0": "gpu", "0": "gpu", "metal": "mps"},
    "model.weights": {"true": "default", "imagenet": "default", "false": "none", "null": "none"},
    "resume": {"true": "auto", "false": "never"},
}
# The key of a section that is meant where the section is given a number, true or false, or another word.
NUMBERS = {
    "optimizer": "lr",
    "trainer": "max_epochs",
    "data": "batch_size",
    "freeze": "last_n",
    "oom": "grow_after",
    "checkpoint": "every_n_steps",
}
SWITCHES = {
    "memory": {"true": "memory.log=true", "false": "memory.log=false"},
    "freeze": {"true": "freeze.preset=head_only", "false": "freeze.preset=full", "none": "freeze.preset=full"},
    "oom": {"false": "oom.policy=stop", "true": "oom.policy=split"},
    "model": {"debug": "debug=true"},
    "trainer": {"debug": "debug=true"},
}


def groups() -> list[str]:
    """The config groups: folders of conf/ with a file per choice."""
    return sorted(folder.name for folder in CONF.iterdir() if folder.is_dir() and folder.name != "hydra")


def choices(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def knob_of(key: str) -> Field[Any] | None:
    """The field of the schema that a key such as data.batch_size is, or None."""
    schema: Any = config.Config
    knob = None
    for part in key.split("."):
        knob = next((one for one in fields(schema) if one.name == part), None) if is_dataclass(schema) else None
        if knob is None:
            return None
        schema = knob.default_factory
    return knob


def is_section(key: str) -> bool:
    knob = knob_of(key)
    return knob is not None and isinstance(knob.default_factory, type) and is_dataclass(knob.default_factory)


def knobs_of(section: str) -> Sequence[Field[Any]]:
    """The fields of a section's schema; none of a group that is no section (experiment)."""
    knob: Any = knob_of(section)
    return fields(knob.default_factory) if is_section(section) else ()


def closest(key: str, known: Sequence[str]) -> list[str]:
    """The known keys nearest to a mistyped one, the likeliest first."""
    leaf = key.rpartition(".")[2].replace("-", "_").lower()
    if ALIASES.get(leaf) in known:
        return [ALIASES[leaf]]

    def squeeze(name: str) -> str:
        return name.replace("_", "").replace("-", "").replace(".", "").lower()

    def alike(one: str, other: str) -> float:
        return difflib.SequenceMatcher(None, squeeze(one), squeeze(other)).ratio()

    near = {name: max(alike(key, name), alike(leaf, name.rpartition(".")[2])) for name in known}
    close = [name for name in known if near[name] >= 0.75]
    return sorted(close, key=lambda name: (-near[name], -alike(key, name)))


def setting_like(key: str) -> list[str]:
    """The settings and groups nearest to a key."""
    known = list(dict.fromkeys([*config.known_keys(), *groups()]))
    close = closest(key, known)
    # A section is no answer to a key, unless it is a group that can be chosen from.
    return [name for name in close if not is_section(name) or name in groups()]


def example(key: str) -> str:
    """A value that the setting takes, as it is typed: its default, or where that is null, one of the table's."""
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        value = OmegaConf.select(hydra.compose("train"), key)
    return as_typed(EXAMPLES.get(key) if value is None else value)


def as_typed(value: Any) -> str:
    """A value as it is typed: true, null, [1,2]."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return str(value).replace(" ", "").replace("'", "") if isinstance(value, list | dict) else str(value)


def unknown_key(key: str) -> UserError:
    """The answer to a key that is no setting."""
    close = setting_like(key)[:2]
    word = next((word for word in typed_words() if key_of(word) == key), None)
    value = "" if word is None else word.partition("=")[2]
    fixes = [replaced(word, *meant) for guess in close if word is not None and (meant := meant_by(guess, value))]
    return UserError(
        f"{key} is not a setting" + (f"; did you mean {close[0]}?" if close else ""),
        why=ALL_KEYS,
        fix=list(dict.fromkeys(fixes)) or HELP,
    )


def meant_by(setting: str, value: str) -> list[str]:
    """The words that give the value to a setting, or to a group or section: what the value is called here."""
    if is_section(setting):
        return [f"{setting}={value}"] if value in choices(setting) else of_section(setting, value)
    return [f"{setting}={VALUES.get(setting, {}).get(value.lower(), value)}"]


def replaced(word: str, *instead: str) -> str:
    """The user's command with other words in the place of one."""
    return rewritten([other for one in typed_words() for other in (instead if one == word else (one,))])


def of_section(section: str, value: str) -> list[str]:
    """The words that were probably meant by section=value; [] where nothing is near."""
    text = value.strip("'\"")
    if known := VALUES.get(section, {}).get(text.lower()):
        return [f"{section}={known}"]
    if switch := SWITCHES.get(section, {}).get(text.lower()):
        return [switch]
    for knob in knobs_of(section):
        if text in knob.metadata.get("options", ()) and knob.name not in ("name", "source"):
            return [f"{section}.{knob.name}={text}"]
        if text in VALUES.get(f"{section}.{knob.name}", {}):
            return [f"{section}.{knob.name}={VALUES[f'{section}.{knob.name}'][text]}"]
    for group in groups():
        if group != section and text in choices(group) and text != "default":
            return [f"{group}={text}"]
    path = Path(at_home(text))
    if section == "data" and text and path.exists():
        return ["data=image_folder", f"data.root={text}"] if path.is_dir() else ["data=table", f"data.table={text}"]
    close = difflib.get_close_matches(text.lower(), choices(section), n=1, cutoff=0.6)
    if close:
        return [f"{section}={close[0]}"]
    if _is_number(text):
        return [f"{section}.{NUMBERS[section]}={text}"] if section in NUMBERS else []
    return [f"model.backbone={text}"] if section == "model" and text else []


def not_a_choice(word: str, section: str, value: str) -> UserError:
    """The answer to section=value where the section has no such choice."""
    meant = of_section(section, value)
    options = choices(section)
    keys = ", ".join(knob.name for knob in knobs_of(section)) if is_section(section) else ""
    guess = f"; did you mean {' '.join(meant)}?" if meant else ""
    return UserError(
        f"{section}={value} is not a choice{guess}" if options else f"{section} is a section{guess}",
        where=str(CONF / section) if options else "src/config.py",
        why=f"{section} is one of: {', '.join(options)}" if options else f"its keys: {keys}",
        fix=replaced(word, *meant) if meant else HELP,
    )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
