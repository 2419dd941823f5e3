"""Which weights a run ends with (checkpoint.select): the best epoch's, the last step's, or an average that proved better."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path

import lightning as L
import torch
from torch import Tensor, nn

from src.callbacks.averaging import WeightAverage
from src.callbacks.checkpoint_selection import BEST, BestCheckpoint, Score, epoch_file, file_of
from src.callbacks.freezing import Phases
from src.callbacks.freezing import apply as freeze
from src.checkpoints.reading import FOREIGN, flaw, read_checkpoint, unusable
from src.checkpoints.writing import LAST
from src.config import Config
from src.data.module import ImageData
from src.errors import ExitCode, UserError
from src.evaluation import measure_split
from src.models.network import TransferNetwork
from src.strategies.precision import autocast
from src.text import shell_word
from src.trainer import find_callback
from src.user_command import named

log = logging.getLogger(__name__)

State = dict[str, Tensor]


def choose_weights(
    config: Config, folder: Path, trainer: L.Trainer, data: ImageData, phases: Phases, device: torch.device
) -> tuple[int, str]:
    """Puts the chosen weights into the network; returns the best epoch, counted from 1, and a name for what was chosen.

    folder: of the checkpoints. An average of weights was trained by nobody: its BatchNorm statistics are computed anew,
    it is measured on val, and it is taken only if it beats the best epoch there. Raises UserError.
    """
    _refuse_unwritten(folder, trainer)
    network, select = trainer.lightning_module.network, config.checkpoint.select
    ranking = [score.epoch for score in find_callback(trainer, BestCheckpoint).kept]
    found = best_weights(folder, ranking, network.state_dict())
    if found is None and select != "last":
        log.warning(f"The weights of the best epochs are lost in {folder}: those of the last step take their place.")
    epoch, best = found or (trainer.current_epoch, {key: one.clone() for key, one in network.state_dict().items()})
    best_name = f"epoch {epoch}" if found else "the last step"
    if select == "last":
        return epoch, "the last step"
    if select == "best":
        network.load_state_dict(best)
        return epoch, best_name

    if select == "ema":
        name, average = "the moving average", network.state_dict() | find_callback(trainer, WeightAverage).weights()
    else:
        name, average = average_of_epochs(folder, ranking, best)
    network.load_state_dict(average)
    freeze(network, phases, max(0, trainer.current_epoch - 1), config.freeze.batchnorm)
    recompute_batchnorm(network, islice(data.statistics_loader(), data.steps_per_epoch), device, config.precision.name)
    average = {key: tensor.clone() for key, tensor in network.state_dict().items()}

    scores = []
    for state in (average, best):
        network.load_state_dict(state)
        values, _ = measure_split(config, network, data.images, "val", data.preprocessing, device)
        metrics = {f"val/{key}": value for key, value in values.items()}
        scores.append(Score.of(metrics, config.checkpoint.monitor))
    shown = [f"{config.checkpoint.monitor} {abs(score.metric):.4f}, val/loss {score.loss:.4f}" for score in scores]
    log.info(f"select    {name}: {shown[0]}; {best_name}: {shown[1]}")
    if scores[0].goodness > scores[1].goodness:
        network.load_state_dict(average)
        return epoch, name
    return epoch, best_name


def best_weights(folder: Path, ranking: Sequence[int], own: State) -> tuple[int, State] | None:
    """The epoch, counted from 1, and the network's weights of the best epoch that can be read; None where all are lost.

    own: the network's, whose names and shapes they have. Raises UserError where what is there is foreign.
    """
    paths = [folder / BEST, *(epoch_file(folder, epoch) for epoch in ranking)]
    flaws = {path: flaw(path) or _other_network(path, own) for path in paths}
    epochs = {path: read_checkpoint(path)["epoch"] for path, what in flaws.items() if what is None}
    why = [f"{path.name} {what}" for path, what in flaws.items() if what is not None]
    if not epochs:
        if any(FOREIGN in line for line in why):
            raise unusable("the weights of the best epoch cannot be read", folder, paths, why)
        return None
    path = min(epochs, key=lambda path: [*ranking, epochs[path]].index(epochs[path]))
    if ranking and epochs[path] != ranking[0]:
        why = why or [f"{path.name} holds another epoch"]
        log.warning(f"The best epoch, {ranking[0] + 1}, is lost ({'; '.join(why)}): epoch {epochs[path] + 1} is taken.")
    return epochs[path] + 1, _network(read_checkpoint(path)["state_dict"])


def _other_network(path: Path, own: State) -> str | None:
    shapes = {name: tensor.shape for name, tensor in own.items()}
    found = {name: tensor.shape for name, tensor in _network(read_checkpoint(path)["state_dict"]).items()}
    return None if found == shapes else FOREIGN


def _refuse_unwritten(folder: Path, trainer: L.Trainer) -> None:
    """Where the disk did not take the best weights, the command goes on from the last position that it took."""
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
    found = {epoch: file_of(folder, epoch) for epoch in sorted(ranking)}
    files = {epoch: path for epoch, path in found.items() if path is not None and _other_network(path, best) is None}
    if len(files) < len(ranking):
        log.warning(f"{len(ranking) - len(files)} of {len(ranking)} epochs to average cannot be read; the others are.")
    total = {key: torch.zeros_like(tensor, dtype=torch.float64) for key, tensor in best.items()}
    for path in files.values():
        for key, tensor in _network(read_checkpoint(path)["state_dict"]).items():
            total[key] += tensor / len(files)
    average = {
        key: total[key].to(tensor.dtype) if files and tensor.is_floating_point() else tensor
        for key, tensor in best.items()
    }
    return f"the average of epochs {', '.join(str(epoch + 1) for epoch in files)}", average


@torch.no_grad()
def recompute_batchnorm(
    network: TransferNetwork, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device, precision: str
) -> None:
    """Sets the statistics of the BatchNorm layers in training mode to the mean over the batches; leaves eval mode."""
    layers = [
        layer for layer in network.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.training
    ]
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


def _network(state: State) -> State:
    """The part of a LightningModule's state_dict that is the network's."""
    return {key.removeprefix("network."): value for key, value in state.items() if key.startswith("network.")}
