"""Which weights a run ends with (checkpoint.select): the best epoch's, the last step's, or an average that proved better."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeVar

import lightning as L
import torch
from torch import Tensor

from src.engine.commands.schema import METRICS
from src.engine.commands.user_command import named
from src.engine.runs.checkpoint_selection import (
    BestCheckpoint,
    Score,
    State,
    WeightAverage,
    network_weights,
    weight_files,
)
from src.engine.runs.errors import ExitCode, UserError
from src.engine.runs.job import Job
from src.engine.runs.measuring import measure_split
from src.engine.runs.reading import FOREIGN, unusable
from src.engine.runs.task import RunTask
from src.engine.runs.text import decimal, shell_word
from src.engine.runs.writing import LAST
from src.engine.steps.network import Network
from src.engine.steps.precision import autocast
from src.engine.steps.step_snapshot import BATCHNORM
from src.engine.weights.low_rank import merge

log = logging.getLogger(__name__)

Kind = TypeVar("Kind", bound=L.Callback)


class Chosen(NamedTuple):
    best_epoch: int  # counted from 1
    name: str  # whose weights the network has: epoch 7, the last step, the moving average, ...


def find_callback(trainer: L.Trainer, kind: type[Kind]) -> Kind | None:
    """The trainer's callback of that class, if it has one."""
    return next((callback for callback in trainer.callbacks if isinstance(callback, kind)), None)


def choose_weights(job: Job, task: RunTask, trainer: L.Trainer) -> Chosen:
    """Puts the chosen weights into the network. Raises UserError.

    Nobody trained an average of weights: its BatchNorm statistics are computed anew, it is measured on val, and it is taken
    only if it beats the best epoch there.
    """
    folder, network, select = job.folder.checkpoints, task.network, job.config.checkpoint.select
    _refuse_unwritten(folder, trainer)
    merge(network)  # adapters: from here on the network is a plain one
    ranking = [score.epoch for score in find_callback(trainer, BestCheckpoint).kept]
    read = best_weights(folder, ranking, network.state_dict())
    if read is None:
        if select != "last":
            why = f"The weights of the best epochs are lost in {folder}"
            if not ranking:
                why = f"No epoch had a finite {job.config.checkpoint.monitor}"
            log.warning(f"{why}: those of the last step take their place.")
        chosen, best = Chosen(trainer.current_epoch, "the last step"), _copy(network.state_dict())
    else:
        epoch, best = read
        chosen = Chosen(epoch, f"epoch {epoch}")
    if select == "last":
        return chosen._replace(name="the last step")
    if select == "best":
        network.load_state_dict(best)
        return chosen

    if select == "ema":
        name, average = "the moving average", network.state_dict() | find_callback(trainer, WeightAverage).weights()
    else:
        members = _greedy_soup(job, task, trainer, ranking, best) if select == "greedy_soup" else ranking
        if select == "greedy_soup" and len(members) < 2:
            log.info(f"select    {chosen.name}: with none of the other epochs is an average as good on val")
            network.load_state_dict(best)
            return chosen
        name, average = average_of_epochs(folder, members, best)
    average = _with_statistics(job, task, trainer, average)
    score, best_score = _score(job, task, trainer, average), _score(job, task, trainer, best)
    log.info(f"select    {name}: {_shown(job, score)}; {chosen.name}: {_shown(job, best_score)}")
    if score.goodness > best_score.goodness:
        network.load_state_dict(average)
        return chosen._replace(name=name)
    return chosen


def _greedy_soup(job: Job, task: RunTask, trainer: L.Trainer, ranking: Sequence[int], best: State) -> list[int]:
    """The epochs to average, the best first: each further one only if with it the average is no worse on val (Wortsman et
    al., 2022, https://arxiv.org/abs/2203.05482)."""
    soup, score = list(ranking[:1]), _score(job, task, trainer, best)
    for epoch in ranking[1:]:
        _, average = average_of_epochs(job.folder.checkpoints, [*soup, epoch], best)
        tried = _score(job, task, trainer, _with_statistics(job, task, trainer, average))
        if tried.goodness[:2] >= score.goodness[:2]:
            soup, score = [*soup, epoch], tried
    return soup


def _with_statistics(job: Job, task: RunTask, trainer: L.Trainer, average: State) -> State:
    """The weights with BatchNorm statistics of their own, in the layers that learned in the last epoch."""
    network, data = task.network, trainer.datamodule
    network.load_state_dict(average)
    task.freezing.apply(network, max(0, trainer.current_epoch - 1))
    batches = islice(data.statistics_loader(), data.steps_per_epoch)
    recompute_batchnorm(network, batches, job.device, job.config.precision.name)
    return _copy(network.state_dict())


def _score(job: Job, task: RunTask, trainer: L.Trainer, state: State) -> Score:
    task.network.load_state_dict(state)
    values, _ = measure_split(task.trained(job), task.images, "val", job.config, task.loss(job.config))
    return Score.of({f"val/{name}": value for name, value in values.items()}, job.config.checkpoint.monitor)


def _shown(job: Job, score: Score) -> str:
    monitor = job.config.checkpoint.monitor
    value = score.metric if METRICS[monitor] == "max" else -score.metric
    return f"{monitor} {decimal(value)}, val/loss {decimal(score.loss)}"


def _copy(state: State) -> State:
    return {name: tensor.clone() for name, tensor in state.items()}


def best_weights(folder: Path, ranking: Sequence[int], own: State) -> tuple[int, State] | None:
    """The epoch, counted from 1, and the network's weights of the best epoch that can be read; None where all are lost.

    own: the network's state, whose names and shapes the weights must have. Raises UserError for a foreign file.
    """
    files, flaws = weight_files(folder, ranking, own)
    why = [f"{path.name} {what}" for path, what in flaws.items()]
    if not files:
        if any(FOREIGN in line for line in why):
            raise unusable("the weights of the best epoch cannot be read", folder, list(flaws), why)
        return None
    epoch = min(files, key=lambda epoch: [*ranking, epoch].index(epoch))
    if ranking and epoch != ranking[0]:
        why = why or [f"{files[epoch].name} holds another epoch"]
        log.warning(f"The best epoch, {ranking[0] + 1}, is lost ({'; '.join(why)}): epoch {epoch + 1} is taken.")
    return epoch + 1, network_weights(files[epoch])


def _refuse_unwritten(folder: Path, trainer: L.Trainer) -> None:
    """Where the disk did not take the best weights, the repeated command goes on from the last position that it took."""
    unwritten = [path.name for path in sorted(trainer.strategy.checkpoint_io.unwritten) if path.name != LAST]
    if unwritten:
        raise UserError(
            f"the weights of the best epochs could not be written: {', '.join(unwritten)}",
            where=str(folder.absolute()),
            why="the disk is full, or a quota or a limit on the size of files is reached",
            fix=[f"df -h {shell_word(folder)}", f"make room, then repeat: {named(folder.parent.name)}"],
            code=ExitCode.CANNOT_WRITE,
        )


def average_of_epochs(folder: Path, ranking: Sequence[int], best: State) -> tuple[str, State]:
    """The mean of the weights of the kept epochs (Izmailov et al., 2018); counters are the best epoch's."""
    intact, _ = weight_files(folder, ranking, best)
    files = {epoch: intact[epoch] for epoch in sorted(ranking) if epoch in intact}
    if len(files) < len(ranking):
        log.warning(f"{len(ranking) - len(files)} of {len(ranking)} epochs to average cannot be read; the others are.")
    total = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in best.items()}
    for path in files.values():
        for name, tensor in network_weights(path).items():
            total[name] += tensor / len(files)
    average = {
        name: total[name].to(tensor.dtype) if files and tensor.is_floating_point() else tensor
        for name, tensor in best.items()
    }
    return f"the average of epochs {', '.join(str(epoch + 1) for epoch in files)}", average


@torch.no_grad()
def recompute_batchnorm(
    network: Network, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device, precision: str
) -> None:
    """Sets the statistics of the BatchNorm layers in training mode to the mean over the batches; leaves eval mode."""
    layers = [layer for layer in network.modules() if isinstance(layer, BATCHNORM) and layer.training]
    if not layers:
        return
    momenta = [layer.momentum for layer in layers]
    network.to(device).eval()
    for layer in layers:
        layer.train()
        layer.reset_running_stats()
        layer.momentum = None  # a plain mean over the batches
    for images, _ in batches:
        with autocast(precision, device):
            network(images.to(device))
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
    network.eval()
