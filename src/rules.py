"""Settings that nothing reads beside the other settings: a table, and what is said of each.

A setting counts where it is not its default, so somebody has chosen it, on the command line or in a YAML file. Where it
can only be a mistake the config is refused (src/config_checks.py); elsewhere, as in a sweep over the setting that decides,
a run warns and goes on (src/run.py). Nothing here imports torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from src.config import Config
from src.errors import UserError
from src.text import as_typed
from src.user_command import corrected, is_typed


@dataclass(frozen=True)
class Rule:
    """`key` has an effect only if `effective`, which the setting `beside` decides."""

    key: str
    beside: str
    effective: Callable[[Config], bool]
    why: str
    use: Sequence[str] = ()  # words that give it an effect; none: the setting is left out
    refused: bool = False


def _one_of(key: str, *values: Any) -> Callable[[Config], bool]:
    return lambda config: attrgetter(key)(config) in values


def _for_sources(name: str, *sources: str, refused: bool = True) -> Rule:
    why = f"only data={' or data='.join(sources)} looks at data.{name}"
    return Rule(f"data.{name}", "data.source", _one_of("data.source", *sources), why, [f"data={sources[0]}"], refused)


def _needs(key: str, beside: str, value: str, why: str, refused: bool = False) -> Rule:
    return Rule(key, beside, _one_of(beside, value), why, [f"{beside}={value}"], refused)


def _unfreezes(config: Config) -> bool:
    return config.freeze.phases is None and config.freeze.preset in ("last_n", "gradual")


def _backbone_learns(config: Config) -> bool:
    return config.freeze.phases is not None or config.freeze.preset != "head_only"


FILES = ("image_folder", "table", "torchvision")
LATE = ["freeze.preset=last_n", "freeze.phases=null"]
RULES = [
    _for_sources("root", *FILES),
    _for_sources("table", "table"),
    _for_sources("name", "torchvision"),
    _for_sources("num_images", "synthetic"),
    _for_sources("num_classes", "synthetic"),
    _for_sources("bits", "image_folder", "table"),
    _for_sources("layout", "image_folder"),
    _for_sources("split_file", "image_folder", "table", refused=False),
    _for_sources("background", *FILES, refused=False),
    _for_sources("max_megapixels", "image_folder", "table", refused=False),
    _for_sources("on_bad_image", "image_folder", "table", refused=False),
    _needs("model.hidden", "model.head", "mlp", "it is the width of the mlp's hidden layer"),
    Rule(
        *("model.dropout", "model.head", lambda config: config.model.head != "append"),
        "append is one layer behind the kept classifier, which has its own dropout where it was trained with one",
        refused=True,
    ),
    Rule(
        *("model.min_match", "model.weights", lambda config: config.model.weights not in ("default", "none")),
        "it is about a weights file of your own",
    ),
    Rule(
        *("optimizer.backbone_lr_scale", "freeze.preset", _backbone_learns),
        "it is about the backbone's blocks, and none of them is trained",
        ["freeze.preset=full"],
    ),
    Rule(
        *("freeze.lr_decay", "freeze.preset", _backbone_learns),
        "it is about the backbone's blocks, and none of them is trained",
        ["freeze.preset=full"],
        refused=True,
    ),
    Rule("freeze.preset", "freeze.phases", lambda config: config.freeze.phases is None, "phases replace the preset"),
    Rule(
        "freeze.unfreeze_epoch", "freeze.preset", _unfreezes, "last_n and gradual unfreeze later, phases say when", LATE
    ),
    Rule("freeze.last_n", "freeze.preset", _unfreezes, "only the presets last_n and gradual count blocks", LATE),
    _needs(
        "freeze.batchnorm_momentum",
        "freeze.batchnorm",
        "update",
        "statistics that are kept take no share of a new batch",
    ),
    _needs(
        "checkpoint.ema_decay",
        "checkpoint.select",
        "ema",
        "no moving average of the weights is taken",
        refused=True,
    ),
    _needs(
        "oom.grow_after",
        "oom.policy",
        "split",
        "only parts of a batch can grow back",
        refused=True,
    ),
    Rule(
        *("logger.project", "logger", lambda config: config.logger.wandb or config.logger.mlflow),
        "it is for Weights & Biases and MLflow",
        ["logger=wandb"],
    ),
    Rule("logger.tracking_uri", "logger", lambda config: config.logger.mlflow, "it is for MLflow", ["logger=mlflow"]),
    Rule(
        "logger.offline", "logger", lambda config: config.logger.wandb, "it is for Weights & Biases", ["logger=wandb"]
    ),
    *(
        Rule(
            *(f"data.{name}", "data.split_file", lambda config: config.data.split_file is None),
            "the file says what is in each split",
        )
        for name in ("val_fraction", "test_fraction")
    ),
    Rule(
        *("checkpoint.top_k", "checkpoint.select", lambda config: config.checkpoint.select != "last"),
        "the last epoch's weights are taken, however good",
    ),
    *(
        Rule(f"memory.{name}", "memory.log", lambda config: config.memory.log, "nothing is measured")
        for name in ("detect_growth", "history")
    ),
    Rule("resume", "name", lambda config: config.name is not None, "a run without a name is always a new one"),
    Rule(
        *("trainer.limit_batches", "debug", lambda config: not config.debug),
        "debug=true takes three batches of each split",
        ["debug=false"],
    ),
    Rule(
        *("trainer.max_epochs", "debug", lambda config: not (config.debug and is_typed("trainer.max_epochs"))),
        "debug=true takes one epoch of each phase",
    ),
]
_DEFAULTS = Config()


def check_rules(config: Config) -> None:
    """Raises UserError for a setting that nothing reads, where that can only be a mistake."""
    for rule in _broken(config):
        if rule.refused:
            raise UserError(
                _found(rule, config),
                why=rule.why,
                fix=corrected(*rule.use, f"{rule.key}={as_typed(attrgetter(rule.key)(config))}")
                if rule.use
                else corrected(remove=[rule.key]),
            )


def without_effect(config: Config) -> list[str]:
    """What a run has to say of settings that it does not read."""
    said = [f"{_found(rule, config)}: {rule.why}." for rule in _broken(config) if not rule.refused]
    if config.optimizer.backbone_lr_scale == 0 and _backbone_learns(config):
        said.append("optimizer.backbone_lr_scale=0: the backbone learns nothing; freeze.preset=head_only is quicker.")
    if config.model.head == "append" and config.model.weights == "none":
        said.append("model.head=append keeps the pretrained classifier, but model.weights=none leaves it random.")
    return said


def _broken(config: Config) -> list[Rule]:
    return [
        rule
        for rule in RULES
        if attrgetter(rule.key)(config) not in (None, attrgetter(rule.key)(_DEFAULTS)) and not rule.effective(config)
    ]


def _found(rule: Rule, config: Config) -> str:
    beside = attrgetter(rule.beside)(config)
    shown = re.sub(r"\.(source|name)$", "", rule.beside)
    setting = "this logger" if rule.beside == "logger" else f"{shown}={as_typed(beside)}"
    return f"{rule.key}={as_typed(attrgetter(rule.key)(config))} has no effect with {setting}"
