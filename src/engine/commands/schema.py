"""The settings, as far as the engine knows them: src/config.py and src/rules.py register them here when they are imported.

A front door that reads settings imports src.rules, which imports src.config. The engine reads a setting by its name, such as
config.trainer.devices, of an object whose class it does not import.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, is_dataclass
from operator import attrgetter
from typing import Any, Literal, TypeAlias

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from src.engine.commands.knobs import knobs_of
from src.engine.features import FEATURES

# Any, because a type here would repeat a third of src/config.py; READ_BY_ENGINE says what the objects must have.
Config: TypeAlias = Any  # of src/config.py
Data: TypeAlias = Any  # Config.data
Condition = Callable[[Config], bool]


@dataclass(frozen=True)
class Rule:
    """A row of src/rules.py."""

    broken: Condition  # whether the config has the mistake
    found: str
    why: str
    fix: str = ""
    is_error: bool = True


# The settings that the engine reads by their names, by section: src/config.py must have all of them. Optional rooms say
# themselves what they read.
READ_BY_ENGINE = {
    "": "name seed debug resume runs_dir metrics baseline",
    "task": "name",
    "data": "source root table label_columns split_file folds fold name bits augment class_weights on_bad_image "
    "keep_side batch_size num_workers timeout_seconds",
    "model": "backbone weights head module calibrate",
    "optimizer": "name lr schedule",
    "strategy": "name timeout_seconds sync_batchnorm",
    "precision": "name",
    "trainer": "accelerator devices num_nodes max_epochs max_steps limit_batches threads compile",
    "freeze": "preset lr_decay unfreeze_epoch lora_rank phases",
    "feature_bank": "views limit_gib",
    "checkpoint": "monitor select",
    "callbacks": "extra",
    "memory": "log history",
    "oom": "policy",
    "logger": "tensorboard wandb mlflow project tracking_uri offline extra",
}

KNOBS: dict[str, Field[Any]] = {}  # the field of every setting, such as data.batch_size, and of every section
METRICS: dict[
    str, Literal["max", "min"]
] = {}  # each metric that can choose the best epoch, and whether max or min is better
RULES: list[Rule] = []
COMPUTED: dict[str, Callable[[Config], Any]] = {}  # what a rule's texts can show beside the settings
# Functions that complete a fix: (words to use, keys to leave out) -> both, with what else the user's command needs.
COMPLETIONS: list[Callable[[list[str], list[str]], tuple[list[str], list[str]]]] = []


def register(config: type, metrics: Mapping[str, Literal["max", "min"]]) -> None:
    """Makes the schema known to the engine and to Hydra; conf/train.yaml begins with it."""
    KNOBS.update(knobs_of(config))
    METRICS.update(metrics)
    ConfigStore.instance().store(name="schema", node=config)


def missing() -> list[str]:
    """The settings that the engine and its rooms read and the registered schema lacks."""
    names = [f"{section}.{name}".lstrip(".") for section, line in READ_BY_ENGINE.items() for name in line.split()]
    names += [name for feature in FEATURES for name in feature.reads]
    return [name for name in names if name not in KNOBS]


def defaults() -> DictConfig:
    """The schema as Hydra composes onto it: it refuses unknown keys and values of another type. Empty where another
    program sweeps with the engine, and has registered none."""
    return ConfigStore.instance().load("schema.yaml").node if KNOBS else OmegaConf.create()


def value_of(config: Config, key: str) -> Any:
    """The value that `<key>` and `{key}` stand for in a rule's text: of a setting, of a group (its choice), or computed."""
    if key in COMPUTED:
        return COMPUTED[key](config)
    value = attrgetter(key)(config)
    return getattr(value, "source", None) or attrgetter("name")(value) if is_dataclass(value) else value
