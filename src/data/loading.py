"""Datasets and loaders: from the list of pictures to batches of bytes. Training, evaluate and predict share them."""

from __future__ import annotations

import os
import signal

import torch
from torch.utils.data import DataLoader, Dataset

from src import seeding
from src.config import Data
from src.cores import cpu_cores
from src.data.pictures import Pictures
from src.data.sampler import PartSampler
from src.data.transforms import Transform, eval_transform
from src.preprocessing import Preprocessing

Item = tuple[torch.Tensor, int]


class TrainDataset(Dataset[Item]):
    """key (epoch, index) -> uint8 (3, S, S), label; the augmentation is f(seed, epoch, index)."""

    def __init__(self, pictures: Pictures, transform: Transform, seed: int) -> None:
        self.pictures, self.transform, self.seed = pictures, transform, seed

    def __getitem__(self, key: tuple[int, int]) -> Item:
        epoch, index = key
        with seeding.picture_randomness(self.seed, epoch, index):
            return self.transform(self.pictures.read(index)), self.pictures.labels[index]


class EvalDataset(Dataset[Item]):
    """The i-th picture of a split -> uint8 (3, S, S), label."""

    def __init__(self, pictures: Pictures, split: str, transform: Transform) -> None:
        self.pictures, self.indices, self.transform = pictures, pictures.splits[split], transform

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> Item:
        index = self.indices[place]
        return self.transform(self.pictures.read(index)), self.pictures.labels[index]


def eval_loader(
    pictures: Pictures,
    split: str,
    preprocessing: Preprocessing,
    data: Data,
    workers: int,
    *,
    rank: int = 0,
    world: int = 1,
) -> DataLoader:
    """Batches (uint8 (B, 3, S, S), int64 (B,)) of a split in the order of the list; used by training and by evaluate.

    rank, world: which part of every batch, where several processes measure together.
    """
    dataset = EvalDataset(pictures, split, eval_transform(preprocessing))
    return DataLoader(
        dataset,
        batch_sampler=PartSampler(len(dataset), data.batch_size, rank=rank, world=world),
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=leave_signals_to_the_trainer,
        generator=torch.Generator(),  # starting an iterator draws a number: not from the global generator
    )


def leave_signals_to_the_trainer(worker: int) -> None:
    """In a loader process: a group of its own, so that Ctrl-C in a terminal, or a kill of the trainer's group, does not
    reach it. The trainer answers those: it finishes its step, for which it may need the next batch, and ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setpgid"):  # not on Windows
        os.setpgid(0, 0)


def num_workers(data: Data, pictures: Pictures, processes: int = 1) -> int:
    """Loader processes of one of the processes that train on this machine: its share of data.num_workers, or of the cores."""
    if data.num_workers is None:
        total = 0 if pictures.in_memory else min(cpu_cores(), 16)
    else:
        total = data.num_workers
    return -(-total // processes)
