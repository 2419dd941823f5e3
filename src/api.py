"""The project from a notebook or another program: train, load, predict (docs/notebook.md).

from src import api
run = api.train("data=image_folder", "data.root=photos/", "name=pets")
model = api.load(run)
probabilities = api.predict(model, ["cat.jpg"])  # (1, number of classes), in the order of model.card.classes
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from PIL.Image import Image
from torch import Tensor

from src.engine.project import PROJECT
from src.engine.runs.run_names import new_name
from src.engine.runs.trained_model import TrainedModel
from src.models.building import rebuild


def train(*words: str) -> Path:
    """Runs `python -m src.train WORDS...` in a process of its own, prints what it prints, and returns the run's folder.

    Its memory, a GPU's too, is free again afterwards. Interrupting ends it as Ctrl-C does: repeat the words to continue.
    Raises subprocess.CalledProcessError with the exit code (docs/errors.md), after the message was printed.
    """
    typed = dict(word.split("=", 1) for word in words if "=" in word)
    name = typed.get("name") or new_name()
    command = [sys.executable, "-u", "-m", "src.train", *words, *([] if typed.get("name") else [f"name={name}"])]
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    assert process.stdout is not None
    try:
        for line in process.stdout:
            print(line, end="")
    except KeyboardInterrupt:  # a notebook interrupts itself alone
        process.send_signal(signal.SIGINT)
        for line in process.stdout:
            print(line, end="")
    if code := process.wait():
        raise subprocess.CalledProcessError(code, command)
    return Path(typed.get("runs_dir", "runs")) / name


def load(folder: str | Path, accelerator: str = "auto") -> TrainedModel:
    """The model of a run's folder, or of a model/ folder. Raises UserError."""
    folder = Path(folder)
    return TrainedModel.load(folder / "model" if (folder / "model").is_dir() else folder, rebuild, accelerator)


def predict(model: TrainedModel, images: Iterable[str | Path | Image | Tensor], batch_size: int = 32) -> Tensor:
    """Probabilities (N, number of classes), or the values of task=regression, float32, on the CPU.

    images: paths, PIL images, or tensors uint8 (3, H, W) of any size. Raises ImageError for a file that cannot be read.
    """
    found, batch = [], []
    for image in images:
        batch.append(model.read(image))
        if len(batch) == batch_size:
            found.append(model.predict(torch.stack(batch)))
            batch = []
    if batch:
        found.append(model.predict(torch.stack(batch)))
    return torch.cat(found) if found else torch.empty(0, len(model.card.classes))
