"""The first words of a report: what the run reaches, whether that is more than the baseline, and what to try next."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from src.engine.baseline.many_doubts import worth_a_look
from src.engine.commands.user_command import key_of
from src.engine.runs.intervals import PROPORTIONS, share_interval
from src.engine.runs.tables import BASELINE, column_titles, compared_metric
from src.engine.runs.text import decimal, plural, shell_word

LESS_IS_BETTER = ("loss", "mae", "rmse")
MORE_IS_BETTER = ("acc", "balanced_acc", "macro_f1", "map", "subset_acc", "r2")  # of an owner's metric it is not known
OVERFITTED, WEAK = 0.1, 0.9  # train is so much better than val, though augmented; or no better than this itself
FAR_ABOVE = (
    1.25  # times the loss of equal probabilities; digits reach 1.5 with ten times the default lr, 3.1 with 30 times
)
UNEVEN = 10  # times as many images in the largest class as in the smallest
LONG, LARGE = 100, 384  # epochs, and pixels, beyond which more of them are not the first thing to try


@dataclass(frozen=True)
class Evidence:
    """What is known of a run. metrics.csv: epochs. images: of each split. counts: training images of each class."""

    config: Mapping[str, Any]
    result: Mapping[str, Any]
    epochs: Mapping[str, Sequence[float]]
    images: Mapping[str, int]
    image_size: int | None  # None: not known
    counts: Mapping[str, int]
    doubts: int | None  # images with a label in doubt; None: labels were not checked
    command: str

    @property
    def split(self) -> str:
        return "test" if any(name.startswith("test/") for name in self.result.get("metrics", {})) else "val"

    @property
    def metric(self) -> str:
        return compared_metric(self.setting("checkpoint", "monitor", "val/"), self.result.get("metrics", {}))

    def setting(self, section: str, key: str, default: Any) -> Any:
        """default: of an older run, which does not have it."""
        return self.config.get(section, {}).get(key, default)

    def value(self, of: Mapping[str, Any]) -> float | None:
        return (of.get("metrics") or {}).get(f"{self.split}/{self.metric}")


@dataclass(frozen=True)
class Judgement:
    """reached: sentences. advice: what to try next, and the command of it, if there is one."""

    reached: str
    advice: str
    command: str | None = None


def judge(known: Evidence) -> Judgement | None:
    """None of a run without numbers."""
    own = known.value(known.result)
    if own is None:
        return None
    title = column_titles([f"val/{known.metric}"])[known.metric]
    number = known.images.get(known.split, 0)
    if not math.isfinite(own):
        found = f"The {known.split} {title} of {plural(number, 'image')} is not a number."
        return Judgement(found, "Measure on more images, of which not all have the same label.")
    interval = (known.result.get("intervals") or {}).get(f"{known.split}/{known.metric}")
    interval = interval or interval_of(known.metric, own, number)  # of an older run
    words = [f"The run reaches a {known.split} {title} of {_with(own, interval)} on {plural(number, 'image')}."]
    baseline = known.result.get("baseline") or {}
    other = known.value(baseline)
    is_better = None  # True: more than noise; None: nothing can be said
    if not known.result.get("epochs") or known.result.get("weights") == BASELINE:
        words.append("It is the baseline alone, a linear model on the features of the untouched backbone.")
    elif other is None:
        words.append("There is no baseline to compare it with, so it is open what training gained.")
    else:
        there = (baseline.get("intervals") or {}).get(f"{known.split}/{known.metric}")
        there = there or interval_of(known.metric, other, number)
        words.append(
            f"The baseline, a linear model on the features of the untouched backbone, reaches {_with(other, there)}."
        )
        gain = baseline.get("gain") or {}
        if gain.get("metric") == f"{known.split}/{known.metric}":
            is_better, sentence = said(gain["value"], gain["is_sure"], gain.get("how", ""))
        else:  # of an older run
            is_better, sentence = compare(known.metric, own, other, interval)
        words.append(sentence)
    advice, change = next_step(known, is_better)
    return Judgement(" ".join(words), advice, changed_command(known.command, change) if change else None)


def _with(value: float, interval: Sequence[float] | None) -> str:
    if interval is None:
        return decimal(value)
    low, high = interval
    return f"{decimal(value)} (95 % interval {low:.3g} to {high:.3g})"


def compare(metric: str, own: float, other: float, interval: Sequence[float] | None) -> tuple[bool | None, str]:
    """Whether the run is better than the baseline (None: the difference may be chance), and that as a sentence. A cautious
    answer: it takes both for measured on different images."""
    gain = other - own if metric in LESS_IS_BETTER else own - other
    if interval is None:
        return said(gain, None)
    return said(gain, abs(gain) > math.sqrt(2) * (interval[1] - interval[0]) / 2)


def said(gain: float, is_sure: bool | None, how: str = "") -> tuple[bool | None, str]:
    number, given = decimal(abs(gain)), f" ({how})" if how else ""
    if gain == 0:
        return None, "Both are equally good."
    if is_sure is None:
        reason = f": {how}" if how else ""
        return None, f"The difference is {number}, and it is not known whether that is chance{reason}."
    if not is_sure:
        return None, f"The difference of {number} may be chance{given}."
    return gain > 0, f"Training {'gained' if gain > 0 else 'lost'} {number}, which is more than chance{given}."


def interval_of(metric: str, value: float, images: int) -> tuple[float, float] | None:
    """The 95 % interval of a share of the images; None for other metrics."""
    return share_interval(value, images) if metric in PROPORTIONS and images else None


def next_step(known: Evidence, is_better: bool | None) -> tuple[str, list[str]]:
    """What to try next, by the first sign that is there, and the settings of it."""
    result, lr = known.result, known.setting("optimizer", "lr", 3e-3)
    train = [loss for loss in known.epochs.get("train/loss", []) if not math.isnan(loss)]
    if not result.get("epochs"):
        return "Train the network too, and see whether it gains anything.", ["model=transfer"]
    if result.get("weights") == BASELINE:
        return "No epoch was as good on val: learn more slowly.", [f"optimizer.lr={lr / 3:.3g}"]
    if len(train) > 1 and train[-1] >= 0.98 * train[0]:
        why = f"The training loss went from {train[0]:.3g} to {train[-1]:.3g}: the learning rate is probably too high."
        return why, [f"optimizer.lr={lr / 10:.3g}"]
    if (worst := _worse_than_constant(known)) is not None:
        chance = math.log(len(known.counts))
        why = f"The loss was up to {worst:.3g}, and equal probabilities have {chance:.3g}"
        return f"{why}: the learning rate is probably too high.", [f"optimizer.lr={lr / 10:.3g}"]
    if is_better is False:
        return "Training spoils the pretrained features: learn more slowly.", [f"optimizer.lr={lr / 3:.3g}"]
    other = known.value(result.get("baseline") or {}) if known.metric == "acc" else None
    if worth_a_look(known.doubts or 0, sum(known.images.values()), other):
        doubtful = plural(known.doubts or 0, "image")
        return f"Look at the labels in doubt of {doubtful} below first, and correct the wrong ones.", []
    rarest, largest = min(known.counts.values(), default=0), max(known.counts.values(), default=0)
    if largest >= UNEVEN * max(1, rarest) and known.setting("data", "class_weights", "none") == "none":
        why = f"The rarest class has {plural(rarest, 'training image')}, the largest {largest:,}: let rare ones count more."
        return why, ["data.class_weights=balanced"]
    if result.get("best_epoch") == result["epochs"] < LONG:
        return "The best epoch is the last: train longer.", [f"trainer.max_epochs={2 * result['epochs']}"]
    return _by_the_gap(known, is_better)


def _worse_than_constant(known: Evidence) -> float | None:
    """The largest loss of an epoch, on train or val, if it is far above that of equal probabilities, where no training that
    goes well ever is; only of classes with cross-entropy is it known what these have."""
    is_known = known.setting("task", "name", "multiclass") in ("multiclass", "binary")
    losses = [loss for split in ("train", "val") for loss in known.epochs.get(f"{split}/loss", [])]
    if not is_known or known.setting("model", "loss", "cross_entropy") != "cross_entropy" or len(known.counts) < 2:
        return None
    worst = max(filter(math.isfinite, losses), default=0.0)
    return worst if worst > FAR_ABOVE * math.log(len(known.counts)) else None


def _by_the_gap(known: Evidence, is_better: bool | None) -> tuple[str, list[str]]:
    """Advice for a run that has learned without trouble. Train is measured with augmentation."""
    best = known.result.get("best_epoch") or 0
    train, val = (known.epochs.get(f"{split}/{known.metric}", []) for split in ("train", "val"))
    at_best = (train[best - 1], val[best - 1]) if 0 < best <= min(len(train), len(val)) else (math.nan, math.nan)
    if known.metric in MORE_IS_BETTER and at_best[0] - at_best[1] > OVERFITTED:
        why = f"Train ({at_best[0]:.3f}) is far better than val ({at_best[1]:.3f}): more images, or more augmentation."
        return why, ["data.augment=strong"]
    if is_better is None and known.value(known.result.get("baseline") or {}) is not None:
        why = "Training gains nothing that these images can show: the baseline takes seconds, or measure on more test images."
        return why, ["model=features"]
    if known.metric in MORE_IS_BETTER and max(at_best) < WEAK:
        return "Train and val are both low: give the network more pixels, or take a larger one.", [
            f"data.image_size={2 * size}" if (size := known.image_size) and size < LARGE else "model.backbone=resnet50"
        ]
    return "Look at the most confident mistakes below; more images like them help most.", []


def changed_command(command: str, words: Sequence[str]) -> str:
    """The run's command with other settings and without its name, which belongs to this run."""
    keys = {key_of(word) for word in words} | {"name"}
    parts = shlex.split(command) if "src.train" in command else ["python", "-m", "src.train"]
    return " ".join(map(shell_word, [*(part for part in parts if key_of(part) not in keys), *words]))
