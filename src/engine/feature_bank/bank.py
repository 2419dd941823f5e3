"""The feature bank: what a frozen backbone makes of an image is computed once, and not in every epoch.

As long as only the head learns, an image's features (F,) follow from the image, its augmentation and the pretrained weights.
The bank computes them in the first epoch that sees them, keeps them in memory and in runs_dir/.features, where other runs and
the trials of a sweep find them, and gives the trainer batches of features in place of images (loader.py).

A view is an image as an epoch sees it: None as evaluation does, without augmentation; a number: with the augmentation of that
epoch. Epochs cycle through feature_bank.views of them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import PIL
import torch
import torch.distributed as dist
from rich.progress import track
from torch import Tensor, nn
from torch.nn.functional import pad

from src.engine import features
from src.engine.commands.schema import Config
from src.engine.feature_bank.records import FOLDER, GIB, Records, trim
from src.engine.feature_bank.views import ViewDataset, names_of, persists
from src.engine.images.image_loader import image_loader
from src.engine.images.loading import loader_settings
from src.engine.images.resizing import Transform, eval_transform
from src.engine.memory.memory import available_bytes
from src.engine.memory.out_of_memory import InParts
from src.engine.own import is_own
from src.engine.processes.ranks import Ranks
from src.engine.runs.job import Job
from src.engine.runs.task import RunTask
from src.engine.steps.precision import autocast
from src.engine.weights.low_rank import merged

log = logging.getLogger(__name__)

View = int | None
VERSION = 1  # of what is kept on the disk
AUGMENTED_VIEWS = 8  # as many lose no accuracy: docs/baseline.md
CHUNK = 16  # batches after which features are written to the disk
MEMORY = 2 * GIB  # bytes of views that stay in memory


@dataclass
class Table:
    """One view of all images. rows (images, F); has (images,): whether an image's row is there."""

    rows: Tensor
    has: Tensor


class FeatureBank:
    """transform: the augmentation of training. Only for a network whose backbone is as it was loaded."""

    def __init__(self, job: Job, task: RunTask, transform: Transform) -> None:
        config = job.config
        self.job, self.task, self.network, self.images = job, task, task.network, task.images
        self.transforms = {False: eval_transform(task.preprocessing), True: transform}
        augmented = config.data.augment != "none"
        views = config.feature_bank.views
        self.views = (AUGMENTED_VIEWS if augmented else 1) if views is None else views
        self.augmented = augmented
        self.trains = self.views > 0 and not needs_images(config)
        self.root = Path(config.runs_dir) / FOLDER
        self.weights = ""  # what the backbone is known by, as it was loaded; from the first features on
        self.persists = persists(config, task.images)
        self._tables: OrderedDict[View, Table] = OrderedDict()
        self._forward = InParts(self.network.features)
        self.width, self.kind = self._shape()
        self.nbytes = len(self.images.names) * self.width * self.kind.itemsize  # of a view
        if self.persists:
            limit = config.feature_bank.limit_gib
            if self.nbytes * (self.views + 1) > limit * GIB:
                log.info(
                    f"features of all views take over feature_bank.limit_gib={limit:g}: they are not kept on the disk"
                )
                self.persists = False
            elif job.ranks.is_first:
                trim(self.root, limit)

    @cached_property
    def names(self) -> list[str]:
        """What each image is known by on the disk."""
        return names_of(self.images)

    def covers(self, epoch: int) -> bool:
        """Whether training reads features in this epoch."""
        return self.trains and self.task.freezing.backbone_is_frozen(epoch)

    def view_of(self, epoch: int) -> View:
        """The view that training has of the images in an epoch."""
        return epoch % self.views if self.augmented else None

    def is_valid(self) -> bool:
        """Whether there are features, of the backbone as it still is."""
        return bool(self._tables) and digest_of_weights(self.network.backbone) == self.weights

    def table(self, indices: Sequence[int], view: View = None) -> Table:
        """Has the rows of these images, but of those that broke since they were checked. Computes what is missing; all
        processes of a run ask together."""
        table = self._tables.get(view) or self._load(view)
        self._tables[view] = table
        self._tables.move_to_end(view)
        wanted = torch.tensor(indices, dtype=torch.int64)
        missing = wanted[~table.has[wanted]]
        if len(missing):
            self._compute(missing.tolist(), view, table)
        while len(self._tables) > 1 and sum(one.rows.nbytes for one in self._tables.values()) > MEMORY:
            self._tables.popitem(last=False)
        return table

    def _load(self, view: View) -> Table:
        number = len(self.images.names)
        table = Table(torch.empty(number, self.width, dtype=self.kind), torch.zeros(number, dtype=torch.bool))
        self.weights = self.weights or digest_of_weights(self.network.backbone)
        if self.persists:
            places, rows = self._records(view).load(self._names(view))
            if places and rows is not None and rows.shape[1:] == (self.width,):
                table.rows[places] = rows.to(self.kind)
                table.has[places] = True
        if dist.is_initialized():  # all work on the same list, whatever each of them finds
            everywhere = table.has.to(self.job.device, torch.uint8)
            dist.all_reduce(everywhere, dist.ReduceOp.MIN)
            table.has = everywhere.bool().cpu()
        return table

    def _shape(self) -> tuple[int, torch.dtype]:
        """How many features an image has, and their type."""
        size = self.task.preprocessing.image_size
        with self._evaluating():
            rows = self._features(torch.zeros(1, 3, size, size, dtype=torch.uint8))
        return rows.shape[1], rows.dtype

    def _features(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, S, S) -> (B, F), on the CPU."""
        device = self.job.device
        with torch.no_grad(), autocast(self.job.config.precision.name, device):
            return self._forward(images.to(device, non_blocking=True)).cpu()

    def _compute(self, missing: Sequence[int], view: View, table: Table) -> None:
        """In batches whose members do not depend on how far an earlier start came, so that a repeated command computes
        the same to the bit. Of several processes each computes a share of every batch."""
        ranks = self.job.ranks if dist.is_initialized() else Ranks()  # after the training the first is alone
        size = self.job.config.data.batch_size
        batches = [missing[start : start + size] for start in range(0, len(missing), size)]
        split = next(name for name, members in self.images.splits.items() if missing[0] in members)
        of_view = "" if view is None else f", view {view + 1} of {self.views}"
        what = f"features of {len(missing)} {split} images{of_view}"
        log.info(f"computing {what}")
        visible = sys.stdout.isatty() and ranks.is_first
        with self._evaluating():
            shares = [batch[ranks.rank :: ranks.world] or batch[:1] for batch in batches]
            results = iter(track(self._results(shares, view), what, len(batches), transient=True, disable=not visible))
            for _ in range(0, len(batches), CHUNK):
                indices, rows = self._gathered([*islice(results, CHUNK)], table)
                table.rows[indices] = rows
                table.has[indices] = True
                if self.persists and ranks.is_first:
                    names = self._names(view)
                    records = self._records(view)
                    records.add([names[index] for index in indices], rows)
                    self.persists = records.folder is not None  # else the disk has not taken them, which is said once

    def _results(self, batches: Sequence[Sequence[int]], view: View) -> Iterator[tuple[Tensor, Tensor]]:
        """Per batch the indices of the images that could be read, and their features."""
        config = self.job.config
        dataset = ViewDataset(self.images, self.transforms[view is not None], config.seed, view)
        settings = loader_settings(config.data, self.images, self.job.ranks.local_world)
        for images, indices in image_loader(dataset, batches, settings, self.task.preprocessing.image_size):
            yield indices, self._features(images)

    def _gathered(self, results: list[tuple[Tensor, Tensor]], table: Table) -> tuple[list[int], Tensor]:
        """The indices and the features of all processes, in one tensor each."""
        indices = torch.cat([indices for indices, _ in results] or [torch.empty(0, dtype=torch.int64)])
        rows = torch.cat([rows for _, rows in results] or [table.rows[:0]])
        if not dist.is_initialized():
            return indices.tolist(), rows
        world, device = self.job.ranks.world, self.job.device
        length = torch.tensor(len(indices), device=device)
        dist.all_reduce(length, dist.ReduceOp.MAX)
        padding = int(length) - len(indices)
        both = [pad(indices, (0, padding), value=-1).to(device), pad(rows, (0, 0, 0, padding)).to(device)]
        gathered = []
        for values in both:
            parts = [torch.empty_like(values) for _ in range(world)]
            dist.all_gather(parts, values)
            gathered.append(torch.cat(parts).cpu())
        real = gathered[0] >= 0
        return gathered[0][real].tolist(), gathered[1][real]

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Inside, the backbone is on the device in eval mode."""
        backbone = self.network.backbone
        modes = {layer: layer.training for layer in backbone.modules()}
        self.network.to(self.job.device)
        backbone.eval()
        try:
            yield
        finally:
            for layer, mode in modes.items():
                layer.training = mode

    def _names(self, view: View) -> list[str]:
        """What images are called on the disk: by their content, and augmented ones by their place in the list as well,
        which the augmentation depends on."""
        return self.names if view is None else [f"{name}-{index}" for index, name in enumerate(self.names)]

    def _records(self, view: View) -> Records:
        """The folder of what was computed as this view is."""
        card, config = self.task.card, self.job.config
        made_with = {
            "version": VERSION, "torch": torch.__version__, "device": self.job.device.type, "precision": card.precision,
            "backbone": card.architecture["backbone"], "weights": self.weights,
            "preprocessing": card.preprocessing.to_dict(), "bits": card.bits, "background": card.background,
            "keep_side": card.keep_side, "channels_last": card.channels_last, "pillow": PIL.__version__,
        }  # fmt: skip
        if view is not None:
            made_with |= {"augment": config.data.augment, "seed": config.seed, "view": view}
        digest = hashlib.blake2b(json.dumps(made_with, sort_keys=True).encode(), digest_size=12).hexdigest()
        return Records(self.root / digest)


def build_bank(job: Job, task: RunTask, transform: Transform) -> FeatureBank | None:
    """None where nothing asks for features, where the network is in parts on several devices, and where the features of all
    images would fill the memory."""
    config = job.config
    trains = config.feature_bank.views != 0 and task.freezing.backbone_is_frozen(0) and not needs_images(config)
    if not features.shares_batches(config.strategy.name) or (config.baseline == "none" and not trains):
        return None
    bank = FeatureBank(job, task, transform)
    available = available_bytes(torch.device("cpu"))
    if available is not None and bank.nbytes > available / 4:
        log.info(f"no feature bank and no baseline: the features take {bank.nbytes / GIB:.1f} GiB")
        return None
    return bank


def needs_images(config: Config) -> bool:
    """Whether batches have to be images: the owner's module, strategy or callbacks may do something with them. And where only
    a few steps are made, the features of all images would take longer."""
    callbacks = any("src." in str(entry) for entry in config.callbacks.extra)
    own = callbacks or is_own(config.model.module) or is_own(config.strategy.name)
    return bool(own or config.trainer.limit_batches)


def digest_of_weights(backbone: nn.Module) -> str:
    """Of all tensors of a backbone, with adapters merged: those that have not learned make the same features."""
    digest = hashlib.blake2b(digest_size=16)
    state: dict[str, Any] = merged(backbone.state_dict())
    for name, tensor in state.items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
