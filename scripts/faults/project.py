"""This project's command line as the program under test."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Sequence
from contextlib import chdir
from pathlib import Path
from typing import Any

import numpy as np

from scripts.faults.injecting import Fault
from scripts.faults.programs import PHOTOS, Done, Program, Settings, tensors_of
from scripts.faults.registry import Guard
from tests import conftest


class Project(Program):
    module, photos_in = "src.train", ("",)
    validation_of_epoch_2 = 3

    def words_of(self, run: str, asked: Settings) -> list[str]:
        chosen = [
            f"name={run}", "data=image_folder", f"data.root={asked.root}", "data.image_size=32", "data.batch_size=8",
            f"data.num_workers={asked.workers}", "model.backbone=shufflenet_v2_x0_5", "model.weights=none",
            f"optimizer.lr={asked.lr}", f"trainer.max_epochs={asked.epochs}", "trainer.threads=1", "trainer.accelerator=cpu",
            "freeze.preset=full", "logger=csv", "baseline=none",
        ]  # fmt: skip
        chosen += ["strategy=ddp", f"trainer.devices={asked.devices}"] if asked.devices > 1 else []
        chosen += [f"strategy.timeout_seconds={asked.timeout_seconds}"] if asked.timeout_seconds else []
        chosen += [f"checkpoint.every_n_steps={asked.save_every}"] if asked.save_every else []
        chosen += ["freeze.batchnorm=keep"] if asked.keep_batchnorm else []
        keys = [word.partition("=")[0] for word in asked.words]
        return [word for word in chosen if word.partition("=")[0] not in keys] + [*asked.words]

    def write_photos(self, root: Path, classes: dict[str, int] = PHOTOS) -> Path:
        return conftest.write_images(root, classes)

    def path(self, run: str = "run") -> Path:
        return self.folder / "runs" / run

    def checkpoints(self, run: str = "run") -> Path:
        return self.path(run) / "checkpoints"

    def digests(self, run: str) -> dict[str, str]:
        path = self.path(run)
        found = tensors_of(self.checkpoints(run) / "last.ckpt") | tensors_of(self.checkpoints(run) / "best.ckpt")
        files = [path / name for name in ("split.csv", "confusion.csv", "model/model.safetensors")]
        found |= {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
        return found | numbers_of(path / "metrics.csv")

    def trained_to_the_end(self, done: Done) -> bool:
        return "epoch 3/3" in done.out

    def classes(self, run: str) -> list[str]:
        return json.loads((self.path(run) / "model" / "model.json").read_text())["classes"]

    @staticmethod
    def read(file: str | Path) -> np.ndarray | None:
        from src.engine.images.reading import ImageError, read_image
        from src.engine.weights.preprocessing import ReadOptions

        try:
            return read_image(file, ReadOptions()).permute(1, 2, 0).numpy()
        except ImageError:
            return None

    def result(self, run: str = "run") -> dict[str, Any]:
        return json.loads((self.path(run) / "result.json").read_text())

    def check_error(self, done: Done, code: int, *named: str) -> None:
        """One screen of error message with this exit code, which names the culprits; its suggested commands parse."""
        with chdir(self.folder):
            conftest.check_error(done, code, *named)


class Unguarded(Project):
    """This project with a row's guard switched off: the negative control."""

    guard: Guard

    def train(self, *faults: Fault, words: Sequence[str] = (), **settings: Any) -> Done:
        return super().train(*faults, *self.guard.faults, words=(*words, *self.guard.words), **settings)

    def undisturbed(self, **settings: Any) -> dict[str, str]:
        return Project(self.folder, self.cache).undisturbed(**settings)

    def undisturbed_folder(self, **settings: Any) -> Path:
        return Project(self.folder, self.cache).undisturbed_folder(**settings)


def numbers_of(metrics: Path) -> dict[str, str]:
    """Columns of metrics.csv without times and memory. A resumed epoch has the numbers of an undisturbed one."""
    with metrics.open(newline="") as file:
        rows = list(csv.DictReader(file))
    columns = [name for name in rows[0] if name.startswith(("epoch", "step", "train/", "val/", "lr/"))]
    return {f"metrics.csv:{name}": " ".join(row[name] for row in rows) for name in columns}
