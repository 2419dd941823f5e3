"""A network in stages on several devices: strategy=model_parallel (one process) and strategy=pipeline (one for each)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from src.engine import features
from src.engine.commands.rule_kinds import clash, devices, is_list_of, one_machine, read_by, wrong
from src.engine.commands.schema import COMPLETIONS, COMPUTED, Config, Rule
from src.engine.commands.user_command import typed_value

if TYPE_CHECKING:
    import torch
    from lightning.pytorch.plugins import Precision
    from lightning.pytorch.strategies import Strategy
    from torch import nn

    from src.engine.runs.job import Job
    from src.engine.runs.task import RunTask

STAGES = ("model_parallel", "pipeline")  # the strategies of a network that is split
MEASURED = ("auto", "auto_memory")  # values of model.split_at


def stages(c: Config) -> int:
    return len(c.model.split_at) + 1 if isinstance(c.model.split_at, list) else devices(c)


def completed(use: list[str], remove: list[str]) -> tuple[list[str], list[str]]:
    """These strategies need a network that can be split, and others refuse their settings."""
    strategy = next((word.partition("=")[2] for word in use if word.startswith("strategy=")), None)
    if strategy is None:
        return use, remove
    if strategy not in STAGES:
        return use, [*remove, "strategy.micro_batches", "strategy.schedule"]
    use = use if typed_value("model") == "model_parallel_resnet50" else ["model=model_parallel_resnet50", *use]
    return use, remove if typed_value("model.backbone") == "resnet50" else [*remove, "model.backbone"]


# fmt: off
def rules() -> list[Rule]:
    COMPLETIONS.append(completed)
    COMPUTED.update({"stages": stages, "enough": lambda c: max(2, stages(c))})
    return [
        read_by("strategy.micro_batches", STAGES),
        read_by("strategy.schedule", STAGES),
        Rule(lambda c: c.strategy.name in STAGES and c.strategy.schedule is None,
             "<strategy.schedule> is not a choice", "strategy.schedule takes one of: 1f1b, gpipe", "strategy.schedule=1f1b"),
        one_machine("model_parallel", instead="pipeline"),
        Rule(lambda c: c.strategy.name in STAGES and c.model.split_at is None, "<strategy> needs a network that is split",
             "model.split_at says which layers of <model.backbone> lie on which device", "<strategy>"),
        Rule(lambda c: c.strategy.name not in STAGES and c.model.split_at is not None,
             "<model.split_at> has no effect with <strategy>", "every device has the whole network there",
             "strategy=model_parallel | ~model.split_at ~model"),
        clash("model.split_at", "model.backbone", lambda c: c.model.split_at is not None and c.model.backbone != "resnet50",
              "layers of ResNet50 can be split here; see src/engine/pipeline/model_parallel_resnet50.py",
              "model.backbone=resnet50"),
        wrong("model.split_at", lambda cuts: cuts in (None, *MEASURED) or is_list_of(str, cuts),
              "a list of layers after which the network is cut, auto (cut by time) or auto_memory", "is not a list of layers"),
        Rule(lambda c: c.strategy.name in STAGES and not 1 < stages(c) == devices(c),
             "{stages} stages do not fit {devices} devices: <model.split_at> <trainer.devices> <trainer.num_nodes>",
             "each stage has a device, and there is one stage more than cuts", "trainer.devices={enough} ~trainer.num_nodes"),
        Rule(lambda c: c.data.batch_size != "auto" and c.data.batch_size < (c.strategy.micro_batches or 1),
             "<data.batch_size> is smaller than the number of micro-batches, {strategy.micro_batches}",
             "each takes an equal part of every batch, at least one image",
             "data.batch_size={strategy.micro_batches} | strategy.micro_batches={data.batch_size}"),
        clash("data.mix", "strategy", lambda c: c.strategy.name in STAGES and c.data.mix != "none",
              "micro-batches have one label for each image", "data.mix=none"),
        clash("memory.checkpoint_gradients", "strategy", lambda c: c.strategy.name in STAGES and c.memory.checkpoint_gradients,
              "stages keep activations of micro-batches themselves", "memory.checkpoint_gradients=false"),
        clash("checkpoint.select", "strategy", lambda c: c.strategy.name == "pipeline" and c.checkpoint.select == "ema",
              "no process has all weights of a step to average", "checkpoint.select=average_top_k"),
    ]
# fmt: on


def backbone(model: Any) -> nn.Module | None:
    if model.split_at is None:
        return None
    from src.engine.pipeline.model_parallel_resnet50 import ModelParallelResNet50

    return ModelParallelResNet50(split_at=[] if model.split_at in MEASURED else model.split_at)  # [] until `prepare`


def prepare(job: Job, task: RunTask) -> Job:
    if job.config.model.split_at in MEASURED:
        from src.engine.pipeline.stage_balance import settle_split

        settle_split(job, task)
    return job


def build_model_parallel(config: Config, devices: Sequence[torch.device]) -> Strategy:
    from src.engine.pipeline.model_parallel import build_model_parallel

    return build_model_parallel(config.strategy.micro_batches, config.strategy.schedule)


def build_pipeline(config: Config, devices: Sequence[torch.device]) -> Strategy:
    from src.engine.pipeline.pipeline import Pipeline  # torch's pipelining takes a second to import
    from src.engine.processes.ranks import DEFAULT_TIMEOUT_SECONDS

    settings = config.strategy
    return Pipeline(settings.micro_batches, settings.schedule, settings.timeout_seconds or DEFAULT_TIMEOUT_SECONDS)


def precision(name: str, device: torch.device) -> Precision:
    from src.engine.pipeline.pipeline_precision import stage_precision

    return stage_precision(name, device)


features.add(
    features.Feature(
        name="pipeline",
        about="strategy=model_parallel and pipeline: a network in stages on several devices",
        files=(
            "conf/model/model_parallel_resnet50.yaml",
            "conf/strategy/model_parallel.yaml",
            "conf/strategy/pipeline.yaml",
            "docs/model_parallel.md",
            "docs/images/model_parallel.png",
            "docs/images/pipeline*.png",
            "docs/images/schedules.png",
            "docs/images/split.png",
            "scripts/benchmarks/pipeline.py",
            "scripts/figures/concepts.py",
            "src/models/model_parallel_resnet50.py",
            "tests/gpu/test_pipeline_on_gpu.py",
        ),
        reads=(
            "data.mix",
            "memory.checkpoint_gradients",
            "model.split_at",
            "strategy.micro_batches",
            "strategy.schedule",
        ),
        rules=rules,
        strategies={
            "model_parallel": features.RoomStrategy(
                build=build_model_parallel,
                shares_batches=False,
                overlaps=lambda config: (config.strategy.micro_batches or 1) > 1,
            ),
            "pipeline": features.RoomStrategy(
                build=build_pipeline,
                precision=precision,
                process_per_device=True,
                shares_batches=False,
                overlaps=lambda config: True,
            ),
        },
        backbone=backbone,
        prepare=prepare,
    )
)
