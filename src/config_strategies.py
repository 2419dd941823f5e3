"""Which settings go with which strategy; src/config_checks.py asks here. Everything runs before torch is imported."""

from __future__ import annotations

from src.config import Config, Strategy, device_count
from src.errors import UserError
from src.hydra_words import key_of
from src.text import as_typed
from src.user_command import corrected, typed_words

STAGES = ("model_parallel", "pipeline")  # the strategies of a network that is split
# Settings of a strategy, and who looks at them.
USED_BY = {
    "timeout_seconds": ("ddp", "pipeline"),
    "sync_batchnorm": ("ddp",),
    "micro_batches": STAGES,
    "schedule": STAGES,
}


def command(strategy: str, *words: str, devices: int | None = None) -> str:
    """The user's command with this strategy, on several devices, and with these words."""
    typed = {key_of(word): word.partition("=")[2] for word in typed_words()}
    needed = [f"strategy={strategy}"]
    if strategy in STAGES and typed.get("model") != "model_parallel_resnet50":
        needed.insert(0, "model=model_parallel_resnet50")
    if devices is not None or (strategy != "single" and typed.get("trainer.devices", "1") == "1"):
        needed.append(f"trainer.devices={devices or 2}")
    of_another = [] if strategy not in STAGES or typed.get("model.backbone") == "resnet50" else ["model.backbone"]
    unused = [f"strategy.{name}" for name, users in USED_BY.items() if strategy not in users]
    return corrected(*needed, *words, remove=[*of_another, *unused])


def check_strategy(config: Config) -> None:
    """Raises UserError for settings that have no effect with the strategy, or contradict it."""
    _check_used(config.strategy)
    _check_devices(config)
    _check_split(config)
    _check_batch(config)
    if config.strategy.sync_batchnorm:
        _check_sync_batchnorm(config)
    if config.strategy.name == "pipeline" and config.checkpoint.select == "ema":
        raise UserError(
            "checkpoint.select=ema does not go with strategy=pipeline",
            why="no process has all weights of a step, of which the average would be taken",
            fix=corrected("checkpoint.select=average_top_k"),
        )


def _check_used(strategy: Strategy) -> None:
    for name, users in USED_BY.items():
        value, default = getattr(strategy, name), getattr(Strategy(), name)
        if value != default and strategy.name not in users:
            also = ["oom.policy=stop"] if name == "sync_batchnorm" else []
            raise UserError(
                f"strategy.{name}={value} has no effect with strategy={strategy.name}",
                why=f"only strategy={' or strategy='.join(users)} looks at it",
                fix=command(users[0], f"strategy.{name}={str(value).lower()}", *also),
            )
    if strategy.name in STAGES and strategy.schedule not in ("1f1b", "gpipe"):
        raise UserError(
            f"strategy.schedule={strategy.schedule} is not a choice",
            why="strategy.schedule takes one of: 1f1b, gpipe",
            fix=corrected("strategy.schedule=1f1b"),
        )


def _check_devices(config: Config) -> None:
    name, trainer = config.strategy.name, config.trainer
    devices = trainer.devices
    if isinstance(devices, list):
        valid = all(type(number) is int and number >= 0 for number in devices) and len(set(devices)) == len(devices) > 0
    else:
        valid = devices == "auto" or (type(devices) is int and devices >= 1)
    if not valid:
        raise UserError(
            f"trainer.devices={devices} is out of range",
            why="trainer.devices is a number from 1, a list of different devices such as [0,2], or auto: all GPUs",
            fix=corrected("trainer.devices=1"),
        )
    if name == "single" and (device_count(trainer) != 1 or trainer.num_nodes != 1):
        raise UserError(
            f"strategy=single does not go with trainer.devices={devices} trainer.num_nodes={trainer.num_nodes}",
            why="strategy=single trains on one device of one machine",
            fix=[corrected("trainer.devices=1", remove=["trainer.num_nodes"]), command("ddp")],
        )
    if name in ("dp", "model_parallel") and trainer.num_nodes != 1:
        raise UserError(
            f"strategy={name} does not go with trainer.num_nodes={trainer.num_nodes}",
            why=f"strategy={name} is one process, and so on one machine",
            fix=[corrected("trainer.num_nodes=1"), command("ddp" if name == "dp" else "pipeline")],
        )


def _check_split(config: Config) -> None:
    name, model, trainer = config.strategy.name, config.model, config.trainer
    cuts = model.split_at
    if cuts is None:
        if name in STAGES:
            raise UserError(
                f"strategy={name} needs a network that is split",
                where=f"model.backbone={model.backbone}",
                why="which layers lie on which device is said by model.split_at",
                fix=command(name),
            )
        return
    if name not in STAGES:
        raise UserError(
            f"model.split_at={as_typed(cuts)} has no effect with strategy={name}",
            why="the whole network is on every device there",
            fix=[command("model_parallel"), corrected(remove=["model.split_at", "model"])],
        )
    if model.backbone != "resnet50":
        raise UserError(
            f"model.split_at={as_typed(cuts)} does not go with model.backbone={model.backbone}",
            why="ResNet50 is the network whose layers can be split here; see src/models/model_parallel_resnet50.py",
            fix=corrected("model.backbone=resnet50"),
        )
    if not (cuts in ("auto", "auto_memory") or (isinstance(cuts, list) and all(isinstance(cut, str) for cut in cuts))):
        raise UserError(
            f"model.split_at={as_typed(cuts)} is not a list of layers",
            why="it names the layers after which the network is cut; auto cuts by time, auto_memory by memory",
            fix=corrected("model.split_at=auto"),
        )
    devices = device_count(trainer) * trainer.num_nodes
    stages = len(cuts) + 1 if isinstance(cuts, list) else devices
    if stages != devices or stages == 1:
        raise UserError(
            f"{stages} stages do not fit {devices} devices",
            where=f"model.split_at={as_typed(cuts)}, {as_typed(trainer.devices)} devices on {trainer.num_nodes} machines",
            why="every stage has a device of its own, and there is one stage more than cuts",
            fix=corrected(
                f"trainer.devices={max(2, stages)}", remove=["trainer.num_nodes"] if trainer.num_nodes > 1 else []
            )
            if isinstance(cuts, list)
            else corrected("trainer.devices=2"),
        )


def _check_batch(config: Config) -> None:
    """A batch has an image for every process, replica or micro-batch."""
    size, settings, devices = config.data.batch_size, config.strategy, device_count(config.trainer)
    if size == "auto":
        if settings.name in STAGES:
            raise UserError(
                f"data.batch_size=auto does not go with strategy={settings.name}",
                why="it measures a network that is on one device",
                fix=corrected("data.batch_size=32"),
            )
        return
    if settings.name in STAGES:
        parts, what, fewer = (
            settings.micro_batches or 1,
            "micro-batches",
            corrected(f"strategy.micro_batches={size}"),
        )
    else:
        parts, what, fewer = devices * config.trainer.num_nodes, "devices", corrected(f"trainer.devices={size}")
    if size < parts:
        raise UserError(
            f"data.batch_size={size} is smaller than the number of {what}, {parts}",
            why="each of them takes an equal part of every batch, of one image at least",
            fix=[corrected(f"data.batch_size={parts}"), fewer],
        )


def _check_sync_batchnorm(config: Config) -> None:
    if config.trainer.accelerator == "cpu":
        raise UserError(
            "strategy.sync_batchnorm=true does not go with trainer.accelerator=cpu",
            why="torch's SyncBatchNorm is for GPUs",
            fix=corrected(remove=["strategy.sync_batchnorm"]),
        )
    if config.oom.policy == "split":
        raise UserError(
            "strategy.sync_batchnorm=true does not go with oom.policy=split",
            why="the processes would wait for each other's statistics while one of them repeats its batch in parts",
            fix=corrected("oom.policy=stop"),
        )
