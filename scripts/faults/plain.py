"""The plain Lightning script as the program under test."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from scripts.faults.programs import PHOTOS, Done, Program, Settings, tensors_of
from tests import conftest


class Plain(Program):
    module, photos_in = "scripts.baselines.plain_lightning", ("train", "val")
    validation_of_epoch_2 = 6  # after two sanity-check steps and three of the first epoch

    def words_of(self, run: str, asked: Settings) -> list[str]:
        chosen = [f"--root={asked.root}", f"--out=runs/{run}", "--image-size=32", "--batch-size=8", f"--lr={asked.lr}"]
        chosen += [f"--epochs={asked.epochs}", f"--workers={asked.workers}", f"--devices={asked.devices}"]
        chosen += [f"--timeout={asked.timeout_seconds}"] if asked.timeout_seconds else []
        chosen += [f"--save-every={asked.save_every}"] if asked.save_every else []
        chosen += ["--frozen-batchnorm", "--dropout=0"] if asked.keep_batchnorm else []
        return [*chosen, *asked.flags]

    def write_photos(self, root: Path, classes: dict[str, int] = PHOTOS) -> Path:
        conftest.write_images(root / "train", {name: count * 2 // 3 for name, count in classes.items()})
        conftest.write_images(root / "val", {name: count // 3 for name, count in classes.items()}, seed=1)
        return root

    def path(self, run: str = "run") -> Path:
        return self.folder / "runs" / run

    def checkpoints(self, run: str = "run") -> Path:
        return self.path(run)

    def digests(self, run: str) -> dict[str, str]:
        return tensors_of(self.path(run) / "last.ckpt")

    def trained_to_the_end(self, done: Done) -> bool:
        return "`max_epochs=3` reached" in done.text

    def classes(self, run: str) -> list[str]:
        last = torch.load(self.checkpoints(run) / "last.ckpt", map_location="cpu", weights_only=True)
        return last["hyper_parameters"]["classes"]

    @staticmethod
    def read(file: str | Path) -> np.ndarray | None:
        from torchvision.datasets.folder import default_loader

        try:
            return np.array(default_loader(str(file)))
        except Exception:
            return None
