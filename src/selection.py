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
from src.callbacks.checkpoint_selection import BEST, BestCheckpoint, Score, epoch_file
from src.callbacks.freezing import Phases
from src.callbacks.freezing import apply as freeze
from src.checkpoints.reading import FOREIGN, flaw, read_checkpoint, unusable
from src.config import Config
from src.data.module import PictureData
from src.evaluation import measure_split
from src.models.network import TransferNetwork
from src.strategies.precision import autocast
from src.trainer import find_callback

log = logging.getLogger(__name__)

State = dict[str, Tensor]


def choose_weights(
    config: Config, folder: Path, trainer: L.Trainer, data: PictureData, phases: Phases, device: torch.device
) -> tuple[int, str]:
    """Puts the chosen weights into the network; returns the best epoch, counted from 1, and a name for what was chosen.

    folder: of the checkpoints. An average of weights was trained by nobody: its BatchNorm statistics are computed anew,
    it is measured on val, and it is taken only if it beats the best epoch there. Raises UserError (DAMAGED).
    """
    network, select = trainer.lightning_module.network, config.checkpoint.select
    ranking = [score.epoch for score in find_callback(trainer, BestCheckpoint).kept]
    epoch, best = best_weights(folder, ranking, network.state_dict())
    if select == "last":
        return epoch, "the last step"
    if select == "best":
        network.load_state_dict(best)
        return epoch, f"epoch {epoch}"

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
        values, _ = measure_split(config, network, data.pictures, "val", data.preprocessing, device)
        metrics = {f"val/{key}": value for key, value in values.items()}
        scores.append(Score.of(metrics, config.checkpoint.monitor))
    shown = [f"{config.checkpoint.monitor} {abs(score.metric):.4f}, val/loss {-score.loss:.4f}" for score in scores]
    log.info(f"select    {name}: {shown[0]}; epoch {epoch}: {shown[1]}")
    if scores[0] > scores[1]:
        network.load_state_dict(average)
        return epoch, name
    return epoch, f"epoch {epoch}"


def best_weights(folder: Path, ranking: Sequence[int], own: State) -> tuple[int, State]:
    """The epoch, counted from 1, and the network's weights of the best epoch that can be read. own: the network's, whose
    names and shapes they have. Raises UserError."""
    broken = []
    paths = [folder / BEST, *(epoch_file(folder, epoch) for epoch in ranking)]
    for path in paths:
        what = flaw(path) or _other_network(path, own)
        if what is None:
            checkpoint = read_checkpoint(path)
            epoch = checkpoint["epoch"]
            if ranking and epoch != ranking[0]:
                why = "; ".join(broken) or f"{path.name} could not be written when it was due"
                log.warning(f"The best epoch, {ranking[0] + 1}, is lost ({why}): epoch {epoch + 1} is taken.")
            return epoch + 1, _network(checkpoint["state_dict"])
        broken.append(f"{path.name} {what}")
    raise unusable("the weights of the best epoch cannot be read", folder, paths, broken)


def _other_network(path: Path, own: State) -> str | None:
    shapes = {name: tensor.shape for name, tensor in own.items()}
    found = {name: tensor.shape for name, tensor in _network(read_checkpoint(path)["state_dict"]).items()}
    return None if found == shapes else FOREIGN


def average_of_epochs(folder: Path, ranking: Sequence[int], best: State) -> tuple[str, State]:
    """The mean of the weights of the kept epochs (Izmailov et al., 2018); counters are the best epoch's."""
    files = {epoch: epoch_file(folder, epoch) for epoch in sorted(ranking)}
    whole = [epoch for epoch, file in files.items() if (flaw(file) or _other_network(file, best)) is None]
    if len(whole) < len(ranking):
        log.warning(f"{len(ranking) - len(whole)} of {len(ranking)} epochs to average cannot be read; the others are.")
    total = {key: torch.zeros_like(tensor, dtype=torch.float64) for key, tensor in best.items()}
    for epoch in whole:
        for key, tensor in _network(read_checkpoint(epoch_file(folder, epoch))["state_dict"]).items():
            total[key] += tensor / len(whole)
    average = {
        key: total[key].to(tensor.dtype) if whole and tensor.is_floating_point() else tensor
        for key, tensor in best.items()
    }
    return f"the average of epochs {', '.join(str(epoch + 1) for epoch in whole)}", average


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
