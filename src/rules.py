"""What contradicts what: one table, read from top to bottom, before torch is imported.

src/engine/commands/config_checks.py refuses a config with the first broken row that is an error. A broken warning is a
setting without effect: a run logs it and goes on, because in a sweep over another setting it can be right. In the texts
`<key>` stands for key=value as it is typed, `{key}` for the value alone. A fix is words for the user's own command:
`~key` leaves a setting out, `|` stands between alternatives. The condition of an error may rely on the errors above it.
"""

from __future__ import annotations

import re
import sys
from typing import Any

from src.config import METRICS_OF, NAMES, Config
from src.engine import features
from src.engine.commands.knobs import ANY, example_of
from src.engine.commands.rule_kinds import clash, devices, is_list_of, read_by, unread, wrong
from src.engine.commands.schema import COMPLETIONS, COMPUTED, KNOBS, RULES, Rule, value_of
from src.engine.commands.user_command import is_typed, typed_value
from src.engine.commands.word_checks import is_sweep
from src.engine.own import is_own, metric_name

# fmt: off
# Settings that only some sources or strategies read.
FILES = ("image_folder", "table", "torchvision")
OF_SOURCES = {
    "data.root": FILES, "data.table": ("table",), "data.name": ("torchvision",), "data.layout": ("image_folder",),
    "data.label_columns": ("table",), "data.num_images": ("synthetic",), "data.num_classes": ("synthetic",),
    "data.bits": ("image_folder", "table"), "data.group": ("image_folder", "table"),
}
HARMLESS = {  # of sources, too, but no sign of a mistake
    "data.split_file": ("image_folder", "table"), "data.max_megapixels": ("image_folder", "table"),
    "data.on_bad_image": ("image_folder", "table"), "data.background": FILES, "data.keep_side": ("image_folder", "table"),
    "data.image_bank": ("image_folder", "table"), "data.cache_mib": ("image_folder", "table"),
}
PROCESSES = ("ddp", *filter(features.process_per_device, features.strategies()))  # strategies with several processes
OF_STRATEGIES = {"strategy.timeout_seconds": PROCESSES, "strategy.sync_batchnorm": ("ddp",)}
SIZES = features.words("data.batch_size")  # that are no numbers
THRESHOLDS = ("binary", "multilabel")  # tasks that compare a probability with one
TABLE_TASKS = ("multilabel", "regression")  # whose labels no folder and no other data set has
LOSSES_OF = {"regression": ("mse", "huber"), "multilabel": ("cross_entropy", "focal")}
WITH_OPTIONS = ("focal", "logit_adjusted")  # losses that take model.loss_options
NEEDED = {"image_folder": "data.root", "table": "data.table", "torchvision": "data.name"}
# fmt: on


def is_schedule(phases: Any) -> bool:
    if not isinstance(phases, dict) or not all(isinstance(blocks, list) and blocks for blocks in phases.values()):
        return False
    return is_list_of(int, list(phases)) and min(phases) >= 0


def is_devices(value: Any) -> bool:
    if is_list_of(int, value):
        return min(value) >= 0 and len(set(value)) == len(value)
    return value == "auto" or (type(value) is int and value >= 1)


def backbone_learns(c: Config) -> bool:
    return c.freeze.phases is not None or c.freeze.preset != "head_only" or c.freeze.lora_rank > 0


def completed(use: list[str], remove: list[str]) -> tuple[list[str], list[str]]:
    """Another strategy brings what it needs, and leaves out what it refuses."""
    strategy = next((word.partition("=")[2] for word in use if word.startswith("strategy=")), None)
    if strategy is None:
        return use, remove
    if typed_value("trainer.devices") in (None, "1"):
        use = [*use, "trainer.devices=2"]
    if "strategy.sync_batchnorm=true" in use:
        use = [*use, "oom.policy=stop"]
    return use, [*remove, *(key for key, strategies in OF_STRATEGIES.items() if strategy not in strategies)]


def is_of_another_task(c: Config) -> bool:
    """Whether checkpoint.monitor is a metric, but none of this task's nor the owner's."""
    name = c.checkpoint.monitor.removeprefix("val/")
    return name in NAMES and name not in (*METRICS_OF[c.task.name], "loss", *map(metric_name, c.metrics))


def losses(c: Config) -> tuple[str, ...]:
    return LOSSES_OF.get(c.task.name, ("cross_entropy", "focal", "logit_adjusted"))


COMPUTED["first_loss"] = lambda c: losses(c)[0]
COMPUTED["first_metric"] = lambda c: METRICS_OF[c.task.name][0]
COMPLETIONS.append(completed)

PHASES = "a schedule of blocks to train from an epoch on: {0: [block, ...], epoch: [block, ...], ...}, from epoch 0"
# fmt: off
COMPUTED["devices"] = devices
RULES.extend([
    wrong("data.batch_size", lambda size: size in SIZES or (type(size) is int and 1 <= size <= 10**6),
          "a whole number from 1" + "".join(f", or {size}," for size in SIZES) + " and at most 1000000"),
    wrong("trainer.max_time", lambda time: time is None or re.fullmatch(r"\d{1,5}:\d\d:\d\d:\d\d", time) is not None,
          "DD:HH:MM:SS: days, hours, minutes, seconds"),
    wrong("trainer.max_epochs", lambda epochs: epochs == "auto" or (type(epochs) is int and 1 <= epochs <= ANY),
          "a whole number from 1, or auto"),
    wrong("trainer.max_steps", lambda steps: steps == -1 or 1 <= steps <= ANY, f"from 1 to {ANY}, or -1: no limit"),
    wrong("data.background", lambda rgb: len(rgb) == 3 and all(0 <= level <= 255 for level in rgb), "three levels, 0 to 255"),
    wrong("trainer.devices", is_devices, "a number from 1, a list of different devices such as [0,2], or auto: all GPUs"),
    wrong("freeze.phases", lambda phases: phases is None or is_schedule(phases), PHASES, "is not a schedule"),
    wrong("freeze.phases", lambda phases: phases is None or 0 in phases, PHASES, "says nothing of epoch 0"),

    unread("task.positive", "<task>", lambda c: c.task.name == "binary" or is_own(c.task.name), "it is one of two classes",
           "task=binary", is_error=True),
    unread("task.threshold", "<task>", lambda c: c.task.name in THRESHOLDS or is_own(c.task.name),
           "no probability is compared with it", "task=binary", is_error=True),
    unread("task.options", "<task>", lambda c: is_own(c.task.name), "only a task of your own takes options", is_error=True),
    clash("checkpoint.monitor", "task", lambda c: not is_own(c.task.name) and is_of_another_task(c),
          "the task has other metrics", "checkpoint.monitor=val/{first_metric}"),
    clash("task", "data", lambda c: c.task.name in TABLE_TASKS and c.data.source != "table" and not is_own(c.data.source),
          "<data> has one class for each image", "data=table data.table=labels.csv ~data.name ~data.layout"
          " ~data.num_images ~data.num_classes"),
    wrong("data.label_columns", lambda names: len({name.strip().lower() for name in names}) == len(names),
          "a list of different columns", "names a column twice"),
    clash("model.loss", "task", lambda c: not (is_own(c.task.name) or is_own(c.model.loss) or c.model.loss in losses(c)),
          "the task compares other labels", "model.loss={first_loss}"),
    unread("data.class_weights", "<task>", lambda c: c.task.name != "regression", "its images have no classes", is_error=True),
    unread("model.calibrate", "<task>", lambda c: c.task.name != "regression", "its answers are no probabilities",
           is_error=True),
    *(read_by(key, users) for key, users in OF_SOURCES.items()),
    *(read_by(key, users, is_error=False) for key, users in HARMLESS.items()),
    *(Rule(lambda c, key=key, source=source: c.data.source == source and value_of(c, key) is None, f"{key} is missing",
           "<data> needs to know where the images are", f"{key}={example_of(KNOBS[key])}") for source, key in NEEDED.items()),
    *(unread(f"data.{key}", "<data.split_file>", lambda c: c.data.split_file is None, "the file says what is in each split")
      for key in ("val_fraction", "test_fraction", "split_seed")),
    clash("data.folds", "data.split_file", lambda c: c.data.folds is not None and c.data.split_file is not None,
          "both say what is in each split", "~data.split_file | ~data.folds ~data.fold"),
    unread("data.test_fraction", "<data.folds>", lambda c: c.data.folds is None, "a fold is the test split"),
    unread("data.fold", "<data.folds>", lambda c: c.data.folds is not None, "it is the number of a fold", "data.folds=5", True),
    clash("data.fold", "data.folds", lambda c: (c.data.fold or 0) >= (c.data.folds or ANY), "folds are numbered from 0",
          "data.fold=0"),
    Rule(lambda c: c.data.folds is not None and c.data.fold is None and is_sweep(sys.argv[1:]),
         "<data.folds> without data.fold does not go with -m", "it is several runs by itself, and a job of a sweep is one",
         "data.fold=range(0,{data.folds})"),
    Rule(lambda c: c.data.val_fraction + c.data.test_fraction > 0.9,
         "<data.val_fraction> and <data.test_fraction> leave too little to train on", "together they may be at most 0.9",
         "data.val_fraction=0.15 data.test_fraction=0.15"),

    unread("model.hidden", "<model.head>", lambda c: c.model.head == "mlp" or is_own(c.model.head),
           "it is the width of the mlp's hidden layer"),
    *(unread(f"model.{part}_options", f"<model.{part}>", lambda c, part=part: is_own(getattr(c.model, part)),
             f"only a {part} of your own takes options", is_error=True) for part in ("backbone", "module")),
    unread("model.loss_options", "<model.loss>", lambda c: is_own(c.model.loss) or c.model.loss in WITH_OPTIONS,
           "only focal, logit_adjusted and a loss of your own take options", is_error=True),
    unread("optimizer.schedule_options", "<optimizer.schedule>", lambda c: is_own(c.optimizer.schedule),
           "only a schedule of your own takes options", is_error=True),
    unread("strategy.options", "<strategy>", lambda c: is_own(c.strategy.name),
           "only a strategy of your own takes options", is_error=True),
    unread("model.label_smoothing", "<model.loss>", lambda c: c.model.loss == "cross_entropy",
           "it belongs to the cross-entropy"),
    unread("model.label_smoothing", "<task>", lambda c: c.task.name != "multilabel" or is_own(c.model.loss),
           "it spreads a target over classes"),
    unread("data.class_weights", "<model.loss>", lambda c: c.task.name != "multilabel" or c.model.loss == "cross_entropy",
           "only the cross-entropy weighs labels"),
    clash("data.sampler", "data.class_weights", lambda c: c.data.sampler == "balanced" and c.data.class_weights != "none",
          "rare classes would count twice as much as they should", "~data.class_weights | ~data.sampler"),
    *(clash("model.loss", key, lambda c, key=key, off=off: c.model.loss == "logit_adjusted" and value_of(c, key) != off,
            "rare classes would count twice as much as they should", f"~{key} | ~model.loss ~model.loss_options")
      for key, off in (("data.class_weights", "none"), ("data.sampler", "shuffle"))),
    unread("data.sampler", "<task>", lambda c: c.task.name not in TABLE_TASKS or is_own(c.task.name),
           "its images have no classes to draw equally often", is_error=True),
    clash("data.mix", "task", lambda c: c.data.mix != "none" and c.task.name == "regression",
          "an image that shows two has no number of its own", "data.mix=none"),
    unread("data.cache_mib", "<data.image_bank>", lambda c: c.data.image_bank == "auto", "nothing is kept"),
    unread("data.mix_alpha", "<data.mix>", lambda c: c.data.mix != "none", "no images are mixed", "data.mix=mixup", True),
    unread("feature_bank.views", "<data.mix>", lambda c: c.data.mix == "none" or c.feature_bank.views == 0,
           "mixed images are computed anew in every epoch"),
    unread("trainer.min_delta", "<trainer.patience>", lambda c: c.trainer.patience is not None,
           "it says what patience waits for", "trainer.patience=5", is_error=True),
    unread("model.dropout", "<model.head>", lambda c: c.model.head != "append",
           "append is a layer behind the kept classifier, which has the dropout it was trained with", is_error=True),
    unread("model.min_match", "<model.weights>", lambda c: c.model.weights not in ("default", "none"),
           "it is for a weights file of your own"),
    Rule(lambda c: c.model.head == "append" and c.model.weights == "none", "<model.head> has no effect with <model.weights>",
         "it keeps the pretrained classifier, which is random here", is_error=False),
    unread("optimizer.backbone_lr_scale", "<freeze.preset>", backbone_learns, "no block of the backbone is trained"),
    unread("freeze.lr_decay", "<freeze.preset>", backbone_learns,
           "no block of the backbone is trained", "freeze.preset=full", is_error=True),
    Rule(lambda c: c.optimizer.backbone_lr_scale == 0 and backbone_learns(c),
         "<optimizer.backbone_lr_scale>: the backbone learns nothing", "freeze.preset=head_only is quicker", is_error=False),
    clash("baseline", "model.head", lambda c: c.baseline in ("keep", "only") and c.model.head != "linear",
          "it is a linear head", "model.head=linear"),
    clash("baseline", "strategy", lambda c: c.baseline == "only" and c.strategy.name != "single",
          "nothing is trained that devices could share", "strategy=single trainer.devices=1 ~trainer.num_nodes"),
    unread("feature_bank.views", "<data.augment>", lambda c: c.data.augment != "none" or c.feature_bank.views <= 1,
           "an image looks the same in every epoch"),
    unread("freeze.preset", "<freeze.phases>", lambda c: c.freeze.phases is None, "phases replace the preset"),
    *(unread(key, "<freeze.preset>", lambda c: c.freeze.phases is None and c.freeze.preset in ("last_n", "gradual"),
             "it is for the presets last_n and gradual") for key in ("freeze.unfreeze_epoch", "freeze.last_n")),
    *(unread(f"freeze.{key}", "<freeze.lora_rank>", lambda c: not c.freeze.lora_rank or c.freeze.phases is not None,
             "head and adapters learn from epoch 0 on") for key in ("preset", "unfreeze_epoch", "last_n")),
    clash("freeze.phases", "freeze.lora_rank", lambda c: any("lora" in blocks for blocks in (c.freeze.phases or {}).values())
          != bool(c.freeze.phases and c.freeze.lora_rank), "adapters learn from the phase on that names lora",
          "~freeze.phases | freeze.lora_rank=8 ~freeze.phases"),
    unread("freeze.lora_rank", "<baseline>", lambda c: c.baseline != "only", "nothing is trained", is_error=True),
    unread("freeze.batchnorm_momentum", "<freeze.batchnorm>", lambda c: c.freeze.batchnorm == "update",
           "pretrained statistics are not updated"),

    clash("optimizer.momentum", "optimizer", lambda c: c.optimizer.name == "sgd" and c.optimizer.momentum is None,
          "sgd needs a momentum", "optimizer=sgd optimizer.momentum=0.9 ~optimizer.name"),
    clash("optimizer.momentum", "optimizer", lambda c: c.optimizer.name != "sgd" and c.optimizer.momentum is not None,
          "only sgd has a momentum", "optimizer=sgd <optimizer.momentum> ~optimizer.name"),
    clash("optimizer.warmup_fraction", "optimizer.schedule",
          lambda c: c.optimizer.schedule == "onecycle" and c.optimizer.warmup_fraction == 0,
          "one cycle is a rise and a fall: the rise needs steps", "optimizer.warmup_fraction=0.3"),
    clash("checkpoint.select", "checkpoint.top_k", lambda c: c.checkpoint.top_k == 1
          and c.checkpoint.select in ("average_top_k", "greedy_soup"),
          "an average needs the weights of two epochs at least", "checkpoint.top_k=3"),
    unread("checkpoint.ema_decay", "<checkpoint.select>", lambda c: c.checkpoint.select == "ema",
           "no moving average of the weights is taken", "checkpoint.select=ema", is_error=True),
    unread("checkpoint.top_k", "<checkpoint.select>", lambda c: c.checkpoint.select != "last", "it takes the last epoch"),
    unread("oom.grow_after", "<oom.policy>", lambda c: c.oom.policy == "split",
           "only parts of a batch can grow back", "oom.policy=split", is_error=True),
    unread("memory.history", "<memory.log>", lambda c: c.memory.log, "nothing is measured"),
    unread("resume", "<name>", lambda c: c.name is not None, "a run without a name is always a new one"),
    unread("trainer.limit_batches", "<debug>", lambda c: not c.debug, "debug=true takes three batches of each split"),
    unread("trainer.max_epochs", "<debug>", lambda c: not (c.debug and is_typed("trainer.max_epochs")),
           "debug=true takes one epoch of each phase"),
    unread("logger.project", "this logger", lambda c: c.logger.wandb or c.logger.mlflow, "it is for wandb and mlflow"),
    unread("logger.tracking_uri", "this logger", lambda c: c.logger.mlflow, "it is for mlflow"),
    unread("logger.offline", "this logger", lambda c: c.logger.wandb, "it is for wandb"),

    clash("trainer.compile", "strategy", lambda c: c.trainer.compile and c.strategy.name in features.strategies(),
          "it computes in threads or stages, and a pass is compiled for one device", "~trainer.compile"),
    unread("trainer.compile", "<freeze.preset>", backbone_learns, "no block of the backbone is trained"),
    *(read_by(key, users) for key, users in OF_STRATEGIES.items()),
    Rule(lambda c: c.strategy.name == "single" and devices(c) != 1,
         "<strategy> does not go with <trainer.devices> <trainer.num_nodes>",
         "strategy=single trains on one device of one machine", "trainer.devices=1 ~trainer.num_nodes | strategy=ddp"),
    Rule(lambda c: features.shares_batches(c.strategy.name) and c.data.batch_size not in SIZES
         and c.data.batch_size < devices(c),
         "<data.batch_size> is smaller than the number of devices, {devices}",
         "each takes an equal part of every batch, at least one image",
         "data.batch_size={devices} | trainer.devices={data.batch_size}"),
    clash("strategy.sync_batchnorm", "trainer.accelerator",
          lambda c: c.strategy.sync_batchnorm and c.trainer.accelerator == "cpu",
          "torch's SyncBatchNorm is for GPUs", "~strategy.sync_batchnorm"),
    clash("strategy.sync_batchnorm", "oom.policy", lambda c: c.strategy.sync_batchnorm and c.oom.policy == "split",
          "the others would wait for the statistics of a process that repeats its batch in parts", "oom.policy=stop"),
    *(row for feature in features.FEATURES for row in feature.rules()),
])
# fmt: on
