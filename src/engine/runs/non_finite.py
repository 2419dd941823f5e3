"""What a run does when a loss or a gradient is nan or inf (trainer.on_nan): it ends, skips the step, or goes back.

stop:    the run ends with exit code 77. The last position and the best epoch are from before the step.
skip:    there is no update: weights, statistics of BatchNorm, optimizer and train/* are as if the batch had not existed.
         The schedule and the moving average of the weights count it as a step.
restore: the weights of the last epoch's end, or of the start, come back. The optimizer begins anew with a tenth of the
         learning rate, and the data goes on with the next batch. The weights to go back to are part of each position.

skip and restore end as stop does after MOST_IN_A_ROW bad steps, without a good step in between (skip) or an epoch that ends
with one (restore).

It is noticed after the backward pass, before the weights change. A loss that is not finite makes all its gradients nan
(src/models/losses.py), so that in strategy=ddp the averaged gradients tell every process, and the loss of strategy=pipeline
is nan where any stage's gradients are not finite: all decide alike, without a message of their own. fp16 is the exception:
its GradScaler tries scales until gradients overflow and skips those steps itself. There the loss decides, and gradients
only once the scale is so small that it is not to blame.

A step on a CPU pays for this with a norm of the gradients, 1 % of its time or less. On a GPU, stop looks at a step's norm
while the next step is under way, and before anything is saved or measured; skip and restore wait for it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from src.engine.commands.user_command import corrected, typed_name, typed_words
from src.engine.images.sampler import share_of
from src.engine.runs.errors import ExitCode, UserError
from src.engine.runs.files import NAMES
from src.engine.runs.run_names import free_name
from src.engine.runs.text import printable
from src.engine.steps.engine_module import engine_module
from src.engine.steps.step_snapshot import StepSnapshot

log = logging.getLogger(__name__)

MOST_IN_A_ROW = 5
LR_FACTOR = 0.1  # of every learning rate, each time that the weights go back
SHOWN = 3  # images of the batch that are named in the message; all are in the file
FILE = "non_finite.txt"


@dataclass
class _Step:
    numbers: Tensor  # (2,): the loss, and the norm of the gradients
    number: int  # counted from 1
    epoch: int  # counted from 0, as the batch is
    batch: int
    rates: dict[str, float]
    arrived: torch.cuda.Event | None = None  # from the GPU


class NonFinite(L.Callback):
    """See above. folder: the run's. Raises UserError (DIVERGED) in every process, at the same step."""

    def __init__(self, policy: str, folder: Path) -> None:
        self.policy, self.folder = policy, folder
        self.in_a_row = self.total = 0  # bad steps
        self._last_was_good = True
        self._before: StepSnapshot | None = None  # skip
        self._weights: dict[str, Tensor] | None = None  # restore: of the last epoch's end, or of the start
        self._waiting: _Step | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.policy == "restore" and self._weights is None:
            self._keep_weights(trainer)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._before = None  # a new phase may train other BatchNorm layers

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._batch = batch_idx
        if self.policy == "skip":
            self._before = self._before or StepSnapshot(pl_module, trainer.strategy.root_device)
            self._before.keep()

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        rates = {group["name"].removesuffix("/no_decay"): group["lr"] for group in optimizer.param_groups}
        numbers = self._numbers(trainer, pl_module, optimizer)
        step = _Step(numbers, trainer.global_step + 1, trainer.current_epoch, self._batch, rates)
        if numbers.device.type == "cuda" and self.policy == "stop":
            step.numbers, step.arrived = numbers.to("cpu", non_blocking=True), torch.cuda.Event()
            step.arrived.record()
        self._settle(trainer)
        self._waiting = step
        if not self.may_wait(step):
            self._settle(trainer)

    def may_wait(self, step: _Step) -> bool:
        """Whether the verdict may come one step later."""
        return step.arrived is not None

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._settle(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.policy != "restore":
            return
        if not trainer.strategy.reduce_boolean_decision(_first_non_finite(pl_module.state_dict()) is None):
            self._go_back(trainer, f"after the last step of epoch {trainer.current_epoch + 1} weights are not finite")
            return
        if self._last_was_good:
            self.in_a_row = 0
        self._keep_weights(trainer)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """The position on disk is one to go on from: an update may overflow although its gradients are finite."""
        self._settle(trainer)
        if name := _first_non_finite(checkpoint["state_dict"]):
            raise self._diverged(trainer, f"{name} is not finite after step {trainer.global_step}")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.total and trainer.is_global_zero:
            log.warning(f"steps that came to nothing: {self.total}; their images are in {self.folder / FILE}")

    def state_dict(self) -> dict[str, Any]:
        return {"in_a_row": self.in_a_row, "total": self.total, "weights": self._weights}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.in_a_row, self.total, self._weights = (state_dict[key] for key in ("in_a_row", "total", "weights"))

    def _numbers(self, trainer: L.Trainer, module: L.LightningModule, optimizer: Optimizer) -> Tensor:
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        loss = engine_module(module).step_loss.float()
        if scaler is None or scaler.get_scale() < 1:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        else:
            norm = torch.zeros((), device=loss.device)
        if scaler is not None and share_of(trainer).world > 1:  # the gradients do not tell: they may have overflowed
            loss = loss.clone()
            dist.all_reduce(loss, dist.ReduceOp.SUM)
        return torch.stack([loss.to(norm.device), norm.float()])

    def _settle(self, trainer: L.Trainer) -> None:
        """Judges the step whose numbers were not awaited yet."""
        step, self._waiting = self._waiting, None
        if step is None:
            return
        if step.arrived is not None:
            step.arrived.synchronize()
        loss, norm = step.numbers.tolist()
        if math.isfinite(loss) and math.isfinite(norm):
            self._last_was_good = True
            if self.policy == "skip":
                self.in_a_row = 0
            return
        what = f"step {step.number}: the loss is {loss}"
        if math.isfinite(loss):
            module = trainer.lightning_module
            gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
            name = None if self.may_wait(step) else _first_non_finite(gradients)  # by now they are the next step's
            what = f"step {step.number}: a gradient is {norm}{f' ({name})' if name else ''}, the loss is {loss:.4g}"
        if trainer.world_size > 1:  # the gradients of all are summed, and a pipeline's loss has news of all stages
            what += f" in process {trainer.global_rank}; another may have caused it"
        where = self._place(trainer, step, what)
        if self.policy == "stop":
            raise self._diverged(trainer, what, where)
        self._go_back(trainer, what, where)

    def _place(self, trainer: L.Trainer, step: _Step, what: str) -> str:
        """Where it happened, for the message; the names of all images of the batch go into a file."""
        names = trainer.datamodule.names_of_batch(step.epoch, step.batch)
        batch = f"epoch {step.epoch + 1}, batch {step.batch + 1} of {trainer.num_training_batches}"
        if trainer.is_global_zero:
            with suppress(OSError), (self.folder / FILE).open("w" if self.policy == "stop" else "a", **NAMES) as file:
                file.writelines(f"{line}\n" for line in (what, batch, *names))
        rates = [f"{part} {rate:.3g}" for part, rate in step.rates.items()]
        rates = rates if len(rates) <= SHOWN else [rates[0], "...", rates[-1]]
        more = f" and {len(names) - SHOWN} more, listed in {self.folder / FILE}" if len(names) > SHOWN else ""
        images = ", ".join(map(printable, names[:SHOWN]))
        return f"{batch}; learning rate: {', '.join(rates)}\nimages: {images}{more}"

    def _go_back(self, trainer: L.Trainer, what: str, where: str = "") -> None:
        """Undoes the step (skip), or the epoch (restore)."""
        self.in_a_row, self.total, self._last_was_good = self.in_a_row + 1, self.total + 1, False
        if self.in_a_row >= MOST_IN_A_ROW:
            raise self._diverged(trainer, f"{what}, for the {MOST_IN_A_ROW}th time in a row", where)
        module = engine_module(trainer.lightning_module)
        module.step_counts = False
        module.zero_grad()  # optimizers pass over a parameter without a gradient
        if self.policy == "skip":
            self._before.restore()
            done = "the step is left out"
        else:
            trainer.strategy.load_model_state_dict({"state_dict": self._weights}, strict=True)
            for optimizer in trainer.optimizers:
                optimizer.state.clear()
                for group in optimizer.param_groups:
                    group["lr"] *= LR_FACTOR
            for schedule in module.schedules():
                if not isinstance(schedule, ReduceLROnPlateau):  # which has no base, and changes lr itself
                    schedule.base_lrs = [rate * LR_FACTOR for rate in schedule.base_lrs]
            done = "back to the last epoch's weights, with a tenth of the learning rate"
        if trainer.is_global_zero:
            log.warning(f"{what}: {done} ({self.in_a_row} in a row). {where}".replace("\n", "; "))

    def _keep_weights(self, trainer: L.Trainer) -> None:
        state = trainer.strategy.lightning_module_state_dict()
        self._weights = {name: tensor.detach().to("cpu", copy=True) for name, tensor in state.items()}

    def _diverged(self, trainer: L.Trainer, what: str, where: str = "") -> UserError:
        lr = min(trainer.lightning_module.optimizer_config.lr * LR_FACTOR, 0.1)  # a tenth of 1e30 would be no help
        other = [f"optimizer.lr={lr:.3g}"]
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            other.append("precision=fp32")
        name = [f"name={free_name(self.folder)}"] if typed_name() else []  # the run keeps its settings, and so its name
        fix = [corrected(change, *name) for change in other]
        if not {"-m", "--multirun"}.isdisjoint(typed_words()):
            fix = [corrected("trainer.on_nan=skip")]  # the values of lr are the sweep's to choose
        elif self.policy != "skip":
            skip = corrected("trainer.on_nan=skip", f"name={typed_name() or self.folder.name}")
            fix.append(f"{skip} # goes on without the step")
        return UserError(
            what,
            where=where,
            why="the learning rate is too high, or an image or a layer gives numbers that are too large. What was saved "
            f"before is kept in {self.folder / 'checkpoints'}; the repeated command meets the same step",
            fix=fix,
            code=ExitCode.DIVERGED,
        )


def _first_non_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor with a nan or inf in it; looked for one by one only where there is one."""
    floats = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    if math.isfinite(torch.nn.utils.get_total_norm(floats.values())):
        return None
    return next((name for name, tensor in floats.items() if not tensor.isfinite().all()), None)
