"""The weights that a run can end with: the files of the best epochs (best.ckpt, and epoch-0007.ckpt for each of the best k
where k is more than 1), and the moving average."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint as CheckpointCallback
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from src.engine.commands.schema import METRICS
from src.engine.commands.user_command import corrected
from src.engine.runs.errors import UserError
from src.engine.runs.reading import FOREIGN, flaw, read_checkpoint
from src.engine.runs.text import few
from src.engine.weights.low_rank import merge, merged

log = logging.getLogger(__name__)

BEST = "best.ckpt"
State = dict[str, Tensor]


@dataclass(frozen=True)
class Score:
    """How good a validation was."""

    metric: float  # the monitored metric, negated where less is better
    loss: float  # val/loss
    epoch: int  # counted from 0

    @classmethod
    def of(cls, metrics: dict[str, Any], monitor: str, epoch: int = 0) -> Score:
        """metrics: as the validation reported them. The worst score where val/loss is not finite: with logits of nan,
        accuracy is that of the first class."""
        loss = float(metrics["val/loss"])
        if not math.isfinite(loss):
            return cls(-math.inf, math.inf, epoch)
        if monitor not in metrics:
            names = [name for name in metrics if name.startswith("val/")]
            found = f"checkpoint.monitor={monitor} is no metric of this run"
            raise UserError(found, why=f"it has {few(names)}", fix=corrected(f"checkpoint.monitor={names[-1]}"))
        metric = -float(metrics[monitor]) if METRICS.get(monitor) == "min" else float(metrics[monitor])
        return cls(-math.inf if math.isnan(metric) else metric, loss, epoch)

    @property
    def goodness(self) -> tuple[float, float, int]:
        """Sort key, the greater the better: the metric, then the lower val/loss, then the earlier epoch."""
        return self.metric, -self.loss, -self.epoch


class BestCheckpoint(CheckpointCallback):
    """Keeps the weights of the best top_k epochs.

    Equal metrics are decided by the lower val/loss, then by the earlier epoch: on small validation sets many epochs reach
    the same accuracy, and the first of them is rarely the best. Lightning's ModelCheckpoint has no second criterion.
    """

    def __init__(self, folder: Path, monitor: str, top_k: int = 1) -> None:
        self.folder, self.monitor, self.top_k = folder, monitor, top_k
        self.kept: list[Score] = []  # the best first

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        loss = float(trainer.callback_metrics["val/loss"])
        if not math.isfinite(loss):
            if trainer.is_global_zero:
                log.warning(
                    f"val/loss of epoch {trainer.current_epoch + 1} is {loss}: it cannot become the best epoch."
                )
            return
        score = Score.of(trainer.callback_metrics, self.monitor, trainer.current_epoch)
        ranking = sorted([*self.kept, score], key=lambda score: score.goodness, reverse=True)
        self.kept, dropped = ranking[: self.top_k], ranking[self.top_k :]
        if score is self.kept[0]:
            trainer.save_checkpoint(self.folder / BEST, weights_only=True)
        if self.top_k > 1 and score in self.kept:
            trainer.save_checkpoint(epoch_file(self.folder, score.epoch), weights_only=True)
        if self.top_k > 1 and dropped and dropped[0] is not score:
            trainer.strategy.remove_checkpoint(epoch_file(self.folder, dropped[0].epoch))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A continued run has its ranking from the last position, but cannot choose an epoch whose weights are lost."""
        if lost := trainer.strategy.broadcast(self._lost()):
            log.warning(
                f"The weights of some of the best epochs are lost ({'; '.join(lost.values())}): others are chosen."
            )
            self.kept = [score for score in self.kept if score.epoch not in lost]
        kept = {epoch_file(self.folder, score.epoch) for score in self.kept}
        newest = epoch_file(self.folder, trainer.current_epoch)
        for path in self.folder.glob("epoch-*.ckpt"):  # left behind by a run that was killed
            if path not in kept and path < newest:
                trainer.strategy.remove_checkpoint(path)

    def _lost(self) -> dict[int, str]:
        """Those of the best epochs whose weights cannot be read -> why."""
        own_files = {score.epoch: epoch_file(self.folder, score.epoch) for score in self.kept}
        files, flaws = weight_files(self.folder, own_files if self.top_k > 1 else ())
        if self.top_k == 1:
            own_files = dict.fromkeys(own_files, self.folder / BEST)
            # Of a later epoch, whose position was not written any more: that epoch is trained again.
            own_files = {epoch: path for epoch, path in own_files.items() if max(files, default=epoch) <= epoch}
        return {
            epoch: f"epoch {epoch + 1}: {path.name} {flaws.get(path, 'holds another epoch')}"
            for epoch, path in own_files.items()
            if epoch not in files
        }

    def state_dict(self) -> dict[str, Any]:
        return {"kept": [list(score.goodness) for score in self.kept]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.kept = [Score(metric, -loss, -epoch) for metric, loss, epoch in state_dict["kept"]]


class WeightAverage(L.Callback):
    """Keeps decay * average + (1 - decay) * weights, step by step (Polyak and Juditsky, 1992). Training does not see it.

    decay grows to its value, (1 + t) / (10 + t) in step t, as in timm and TensorFlow: with 0.99 from the start, the random
    head of the first steps would be a third of the average after 100.

    It is part of the position that is saved, so that a continued run has the same average. Lightning's
    EMAWeightAveraging would validate, and choose the best epoch, by the average instead of the weights.
    """

    def __init__(self, decay: float) -> None:
        self.average: torch.nn.Module  # a copy of the network, with the averaged weights
        self.decay = decay
        self._num_averaged = 0  # torch's AveragedModel counts on the GPU, and waits for it twice in every step

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.average = copy.deepcopy(pl_module.network)
        merge(self.average)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.average.to(pl_module.device)

    @torch.no_grad()
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any, **kwargs: Any) -> None:
        network: Any = pl_module.network
        if self._num_averaged == 0:
            self.average.load_state_dict(merged(network.state_dict()))
        else:
            own = merged(dict(network.named_parameters()))
            weights = [own[name].detach().to(pl_module.device) for name, _ in self.average.named_parameters()]
            decay = min(self.decay, (1 + self._num_averaged) / (10 + self._num_averaged))
            average = [tensor.detach() for tensor in self.average.parameters()]
            get_ema_multi_avg_fn(decay)(average, weights, self._num_averaged)
            for kept, buffer in zip(self.average.buffers(), network.buffers(), strict=True):
                kept.copy_(buffer)
        self._num_averaged += 1

    def weights(self) -> dict[str, torch.Tensor]:
        """The averaged state_dict of the network; its BatchNorm statistics are those of the last step's weights."""
        return self.average.state_dict()

    def state_dict(self) -> dict[str, Any]:
        """With the names that torch's AveragedModel gives them, as in older positions."""
        average = {f"module.{name}": tensor for name, tensor in self.average.state_dict().items()}
        return {"average": {"n_averaged": torch.tensor(self._num_averaged)} | average}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        average = dict(state_dict["average"])
        self._num_averaged = int(average.pop("n_averaged"))
        self.average.load_state_dict({name.removeprefix("module."): tensor for name, tensor in average.items()})


def epoch_file(folder: Path, epoch: int) -> Path:
    """The file with the weights of an epoch (counted from 0). In its name epochs are counted from 1, as on the screen."""
    return folder / f"epoch-{epoch + 1:04d}.ckpt"


def weight_files(
    folder: Path, epochs: Iterable[int], own: State | None = None
) -> tuple[dict[int, Path], dict[Path, str]]:
    """best.ckpt and the files of `epochs`: the epoch that each intact one holds -> its path; and what the others lack.

    own: a network's state, whose names and shapes the weights must have. All epochs are counted from 0.
    """
    files: dict[int, Path] = {}
    flaws: dict[Path, str] = {}
    for path in [folder / BEST, *(epoch_file(folder, epoch) for epoch in epochs)]:
        if what := flaw(path) or (FOREIGN if own and _shapes(network_weights(path)) != _shapes(own) else None):
            flaws[path] = what
        else:
            files.setdefault(read_checkpoint(path)["epoch"], path)
    return files, flaws


def network_weights(path: Path) -> State:
    """The network's part of a LightningModule's state_dict, with merged adapters."""
    state = read_checkpoint(path)["state_dict"]
    own = {key.removeprefix("network."): value for key, value in state.items() if key.startswith("network.")}
    return merged(own)


def _shapes(state: State) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in state.items()}
