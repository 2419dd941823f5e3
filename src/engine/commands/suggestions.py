"""What a mistyped word was probably meant to be: the nearest setting, another program's name for it, a choice of a group.

Nothing here imports torch.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import Field
from typing import Any

import hydra
from omegaconf import OmegaConf

from src.engine.commands.knobs import example_of, knobs_of
from src.engine.commands.schema import KNOBS
from src.engine.commands.user_command import is_typed, key_of, replaced, typed_words
from src.engine.project import CONF
from src.engine.runs.errors import UserError
from src.engine.runs.text import as_typed, path_in

HELP = "python -m src.train --help"
KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "list": "a list"}


def _by_name(table: dict[str, str]) -> dict[str, str]:
    return {other: here for here, others in table.items() for other in others.split()}


# fmt: off
# A setting of src.train -> what other programs call it.
NAMES = _by_name({
    "name": "run_name", "runs_dir": "output output_dir out save_dir",
    "data": "dataset", "data.root": "path data_dir data_path folder images train_dir", "data.table": "csv",
    "data.batch_size": "bs b batch", "data.image_size": "img_size imgsz size resolution", "data.num_workers": "workers j",
    "model.backbone": "arch architecture a model.name", "model.weights": "pretrained ckpt_path checkpoint_path",
    "model.label_smoothing": "smoothing", "optimizer": "opt", "optimizer.lr": "learning_rate", "optimizer.weight_decay": "wd",
    "precision": "amp fp16 bf16", "checkpoint.monitor": "metric",
    "trainer.accelerator": "device", "trainer.devices": "gpus ngpus num_gpus", "trainer.num_nodes": "nodes",
    "trainer.max_epochs": "epochs e num_epochs", "trainer.max_steps": "steps", "trainer.gradient_clip": "clip_grad",
})
# The same for the settings of src.evaluate, src.predict and src.export.
OF_PROGRAMS = _by_name({
    "run": "checkpoint ckpt name model", "model": "weights", "images": "image img imgs input source folder photos",
    "out": "output csv", "accelerator": "device gpu", "batch_size": "bs", "num_workers": "workers", "data.root": "root",
})
# The last part of a setting's key -> its values by the names that other programs use.
VALUES = {key: _by_name(table) for key, table in {
    "precision": {"fp16": "16 16-mixed fp16-mixed half amp true float16", "bf16": "bf16-mixed bfloat16",
                  "fp32": "32 32-true float32 false"},
    "optimizer": {"adamw": "adam", "sgd": "momentum nesterov"},
    "strategy": {"single": "auto none null", "ddp": "ddp_spawn", "dp": "dataparallel"},
    "logger": {"csv": "none null false", "default": "tensorboard true"},
    "accelerator": {"gpu": "cuda nvidia", "mps": "metal"},
    "devices": {"auto": "all -1"},
    "split": {"train": "training", "val": "validation valid dev", "test": "testing"},
    "augment": {"standard": "true", "none": "false"},
    "class_weights": {"balanced": "true", "none": "false"},
    "weights": {"default": "true imagenet", "none": "false null"},
    "schedule": {"constant": "none null false"},
    "batchnorm": {"keep": "false frozen", "update": "true"},
    "preset": {"head_only": "true", "full": "false none"},
    "policy": {"split": "true", "stop": "false"},
    "resume": {"auto": "true", "never": "false none"},
}.items()}
# fmt: on
NUMBERS = {"optimizer": "lr", "trainer": "max_epochs", "data": "batch_size", "freeze": "last_n"}  # section=NUMBER


def groups() -> list[str]:
    """The config groups: folders of conf/ with a file per choice."""
    return sorted(folder.name for folder in CONF.iterdir() if folder.is_dir() and folder.name != "hydra")


def choices(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def section_of(key: str) -> dict[str, Field[Any]]:
    """The fields of a section by their names; none for a key that is no section."""
    return knobs_of(KNOBS[key].default_factory) if key in KNOBS else {}


def default_of(key: str) -> str:
    """A value that the setting takes, as it is typed: its default in conf/, or else the schema's example."""
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        value = OmegaConf.select(hydra.compose("train"), key)
    if value is None and key in KNOBS:
        value = example_of(KNOBS[key])
    return as_typed(value)


def closest(key: str, known: Sequence[str], names: dict[str, str] = NAMES) -> list[str]:
    """The known keys nearest to a mistyped one, the likeliest first. names: other programs' names for the keys."""
    key = key.replace("-", "_").lower()
    leaf = key.rpartition(".")[2]
    for name in (key, leaf):
        if name not in known and names.get(name) in known:
            return [names[name]]

    def alike(typed: str, name: str) -> float:
        return difflib.SequenceMatcher(None, re.sub("[_.]", "", typed), re.sub("[_.]", "", name.lower())).ratio()

    near = {name: max(alike(key, name), alike(leaf, name.rpartition(".")[2])) for name in known}
    close = [name for name in known if near[name] >= 0.75]
    return sorted(close, key=lambda name: (-near[name], -alike(key, name)))


def setting_like(key: str) -> list[str]:
    """The settings and groups nearest to a key. A section that is no group cannot be given a value."""
    close = closest(key, list(dict.fromkeys([*KNOBS, *groups()])))
    return [name for name in close if not section_of(name) or name in groups()]


def value_here(key: str, value: str) -> str:
    """What the value is called here, such as gpu for cuda:0; the value itself if it has no other name."""
    names, text = VALUES.get(key.rpartition(".")[2], {}), value.lower()
    return names.get(text) or names.get(text.partition(":")[0], value)


def option_like(key: str, value: str, options: Sequence[str]) -> str | None:
    """The option that the value was probably meant to be."""
    here = value_here(key, value)
    close = [here] if here in options else difflib.get_close_matches(value.lower(), options, n=1, cutoff=0.5)
    return close[0] if close else None


def meant_by(setting: str, value: str) -> list[str]:
    """The words that give the value to a setting, or to a group or section: [] if nothing is near."""
    if section_of(setting):
        return [f"{setting}={value}"] if value in choices(setting) else of_section(setting, value)
    if setting == "resume" and path_in(value).exists():
        path = path_in(value)
        return [f"name={next((run for run in [path, *path.parents] if (run / 'config.yaml').exists()), path).name}"]
    source = ["data=image_folder"] if setting == "data.root" and not is_typed("data") else []
    return [*source, f"{setting}={value_here(setting, value)}"]


def of_section(section: str, value: str) -> list[str]:
    """The words that section=value, which is no choice, was probably meant to be."""
    text = value.strip("'\"")
    if (here := value_here(section, text)) != text and here in choices(section):
        return [f"{section}={here}"]
    if section == "memory" and text in ("true", "false"):
        return [f"memory.log={text}"]
    for name, knob in section_of(section).items():
        here = VALUES.get(name, {}).get(text, text)
        if here in knob.metadata.get("options", ()) and name not in ("name", "source"):
            return [f"{section}.{name}={here}"]
    if section == "data" and text and path_in(text).exists():
        return of_path(text) or ["data=table", f"data.table={text}"]
    if words := of_word(text, but=section):
        return words
    if close := difflib.get_close_matches(text.lower(), choices(section), n=1, cutoff=0.6):
        return [f"{section}={close[0]}"]
    if re.fullmatch(r"[-+.\d]+(e[-+]?\d+)?", text):
        return [f"{section}.{NUMBERS[section]}={text}"] if section in NUMBERS else []
    return [f"model.backbone={text}"] if section == "model" and text else []


def of_word(word: str, but: str = "") -> list[str]:
    """What a word without a key means: sgd is a choice of a group (not of the group `but`), cpu a value of one setting,
    debug a switch."""
    for group in groups():
        if group != but and word in choices(group) and word != "default":
            return [f"{group}={word}"]
    if word in KNOBS and KNOBS[word].type == "bool":
        return [f"{word}=true"]
    keys = [key for key, knob in KNOBS.items() if word in knob.metadata.get("options", ())]
    return [f"{keys[0]}={word}"] if len(keys) == 1 else []


def of_path(word: str) -> list[str]:
    """What a path without a key means: a folder of images, or a table of them."""
    path = path_in(word)
    if word and path.is_dir():
        return ["data=image_folder", f"data.root={word}"]
    return ["data=table", f"data.table={word}"] if path.is_file() and path.suffix in (".csv", ".tsv") else []


def did_you_mean(*words: str) -> str:
    return f"; did you mean {' '.join(words)}?" if words else ""


def _takes(key: str, value: str) -> bool:
    """False for a setting that has choices of which the value is none, not even misspelt."""
    options = KNOBS[key].metadata.get("options") if key in KNOBS else None
    return not options or option_like(key, value, options) is not None


def unknown_key(key: str) -> UserError:
    close = [] if key.startswith("hydra.") else setting_like(key)[:2]  # those have no names like ours
    word = next((word for word in typed_words() if key_of(word) == key), None)
    fixes = [HELP]
    if word is not None:
        value = word.partition("=")[2]
        close = [guess for guess in close if _takes(guess, value)] or close
        meanings = [meant_by(guess, value) for guess in close]
        fixes = [replaced(word, *meant) for meant in meanings if meant]
        fixes = list(dict.fromkeys(fixes)) or [HELP, f"{replaced(word)}   # without it"]
    return UserError(
        f"{key} is not a setting{did_you_mean(*close[:1])}",
        why="settings are declared in src/config.py; the whole list with its values: python -m src.train --cfg job",
        fix=fixes,
    )


def not_a_choice(word: str, section: str, values: Sequence[str]) -> UserError:
    """For section=value, or section=value,value of a sweep, if one of the values is no choice."""
    options = choices(section)
    wrong = next(value for value in values if value not in options)
    meant = of_section(section, wrong)
    if len(values) > 1:
        each = [[f"{section}={value}"] if value in options else of_section(section, value) for value in values]
        keys = {key_of(words[0]) for words in each if len(words) == 1}
        alike = len(keys) == 1 and all(len(words) == 1 for words in each)
        meant = [f"{keys.pop()}={','.join(words[0].partition('=')[2] for words in each)}"] if alike else []
    return UserError(
        (f"{section}={wrong} is not a choice" if options else f"{section} is a section") + did_you_mean(*meant),
        where=str(CONF / section) if options else "src/config.py",
        why=f"{section} is one of: {', '.join(options)}" if options else f"its keys: {', '.join(section_of(section))}",
        fix=replaced(word, *meant) if meant else HELP,
    )
