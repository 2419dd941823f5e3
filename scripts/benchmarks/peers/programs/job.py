"""The two jobs, and what every program of this folder is told: PROGRAM DATA WEIGHTS OUT JOB."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

BATCH = 32
SEED = 0
CLASSES = 8
WEIGHT_DECAY = 0.01
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Job:
    """AdamW at a constant learning rate. Images: shorter side to `size`, centre square, normalised with MEAN and STD."""

    name: str
    size: int  # pixels
    epochs: int
    lr: float
    head_only: bool  # the backbone is frozen, its BatchNorm too


JOBS = {job.name: job for job in (Job("head", 224, 5, 1e-2, True), Job("full", 128, 2, 1e-3, False))}


@dataclass(frozen=True)
class Arguments:
    data: Path  # with train/CLASS/*.jpg and val/CLASS/*.jpg
    weights: Path  # state dict of torchvision's resnet18
    out: Path  # gets the state dict of the finished model, with the same names
    job: Job


def read_arguments() -> Arguments:
    data, weights, out, job = sys.argv[1:]
    return Arguments(Path(data), Path(weights), Path(out), JOBS[job])
