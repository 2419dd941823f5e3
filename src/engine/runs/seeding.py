"""All randomness of the project, as pure functions: of (seed, epoch, index) and of (seed, step, rank).

Nothing here has a state that must be saved. The order of an epoch, an image's augmentation and a step's dropout follow
from a few integers, so a position in training is two of them (epoch, batch), the number of loader workers changes
nothing, and two processes with the same global batch see the same images with the same augmentation.

torch is imported by the functions that need it: the driver of a sweep uses `key` and does without torch's seconds.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def key(*parts: int | str) -> int:
    """A 63-bit seed from the parts; the same on every machine and in every process (unlike hash())."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A torch generator of its own, for draws that must not touch the global ones."""
    import torch

    return torch.Generator().manual_seed(key(*parts))


def epoch_order(seed: int, epoch: int, length: int) -> list[int]:
    """The order in which an epoch visits its images: a permutation of range(length)."""
    import torch

    return torch.randperm(length, generator=generator(seed, "order", epoch)).tolist()


def split_order(seed: int, label: str, length: int) -> list[int]:
    """The order in which one class is dealt out to test, val and train."""
    import torch

    return torch.randperm(length, generator=generator(seed, "split", label)).tolist()


def seed_everything(*parts: int | str) -> None:
    """Sets the global generators of torch (all devices), numpy and Python to a function of the parts."""
    import torch

    torch.manual_seed(key(*parts))
    seed_numpy_and_python(*parts)


def seed_numpy_and_python(*parts: int | str) -> None:
    """Sets the global generators of numpy and Python, in a process that does without torch."""
    value = key(*parts)
    np.random.seed(value % 2**32)
    random.seed(value)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Before every training step: dropout and whatever else the step draws become f(seed, step, rank).

    Of the CPU, and of the devices in use: for every other kind torch.manual_seed would note down the stack, in a fifth of the
    time of a step on features.
    """
    import torch

    value = key(seed, "step", step, rank)
    torch.default_generator.manual_seed(value)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(value)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(value)
    seed_numpy_and_python(seed, "step", step, rank)


def seed_image(seed: int, epoch: int, index: int) -> None:
    """Before an image is augmented: the global generators of the CPU become f(seed, epoch, index).

    A transform may draw from torch, numpy or Python: user-written ones do. Only CPU generators are touched, since augmentation
    runs in loader processes.
    """
    import torch

    torch.default_generator.manual_seed(key(seed, "picture", epoch, index))
    seed_numpy_and_python(seed, "picture", epoch, index)


@contextmanager
def generators_kept() -> Iterator[None]:
    """Afterwards the global generators of the CPU are as they were before: round a batch, since it takes 0.1 ms."""
    import torch

    saved = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(saved[0])
        np.random.set_state(saved[1])
        random.setstate(saved[2])


@contextmanager
def image_randomness(seed: int, epoch: int, index: int) -> Iterator[None]:
    """seed_image for one image alone."""
    with generators_kept():
        seed_image(seed, epoch, index)
        yield
