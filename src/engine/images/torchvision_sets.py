"""Public data sets that torchvision downloads, as a list of images: data=torchvision data.name=Flowers102."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torchvision import datasets
from torchvision.transforms.v2.functional import pil_to_tensor

from src.engine.commands.user_command import corrected
from src.engine.images.labelled_images import ImageSet
from src.engine.images.reading import ImageError, to_rgb
from src.engine.runs.errors import ExitCode, UserError
from src.engine.runs.text import printable, shell_word

_BY_TRAIN = {"train": {"train": True}, "test": {"train": False}}
_BY_SPLIT = {"train": {"split": "train"}, "test": {"split": "test"}}
_THREE = {"train": {"split": "train"}, "val": {"split": "val"}, "test": {"split": "test"}}
SETS: dict[str, dict[str, dict[str, Any]]] = {  # split -> keywords of the set's constructor
    "CIFAR10": _BY_TRAIN,
    "CIFAR100": _BY_TRAIN,
    "MNIST": _BY_TRAIN,
    "FashionMNIST": _BY_TRAIN,
    "Flowers102": _THREE,
    "FGVCAircraft": _THREE,
    "DTD": _THREE,
    "PCAM": _THREE,
    "OxfordIIITPet": {"train": {"split": "trainval"}, "test": {"split": "test"}},
    "Food101": _BY_SPLIT,
    "STL10": _BY_SPLIT,
    "SVHN": _BY_SPLIT,
    "GTSRB": _BY_SPLIT,
    "StanfordCars": _BY_SPLIT,
    "EuroSAT": {"train": {}},
}


def open_torchvision_set(name: str, root: Path, background: tuple[int, int, int]) -> ImageSet:
    """The set's parts in a row, downloaded to root if they are not there. Raises UserError."""
    if name not in SETS:
        close = difflib.get_close_matches(name.lower(), [known.lower() for known in SETS], n=1, cutoff=0.4)
        guess = next((known for known in SETS if close and known.lower() == close[0]), "CIFAR10")
        raise UserError(
            f"data.name={name} is not a set that is known here; did you mean {guess}?",
            where="src/engine/images/torchvision_sets.py",
            why=f"known are {', '.join(SETS)}",
            fix=corrected("data=torchvision", f"data.name={guess}"),
        )
    parts = {split: _open(name, root, keywords) for split, keywords in SETS[name].items()}
    labels = [label for part in parts.values() for label in _labels(part)]
    places = [(split, index) for split, part in parts.items() for index in range(len(part))]
    return ImageSet(
        name,
        _classes(parts["train"], labels),
        labels,
        partial(_read, [(parts[split], index) for split, index in places], background),
        splits=[split for split, _ in places] if len(parts) > 1 else None,
        in_memory=False,
        names=[f"{name}/{split}/{index:06d}" for split, index in places],
        where=f"data.name={name}",
    )


def _open(name: str, root: Path, keywords: dict[str, Any]) -> Any:
    """One part of the set, downloaded if it is not there and torchvision can download it."""
    make: Callable[..., Any] = getattr(datasets, name)
    failure: Exception | None = None
    for download in (False, True):  # first without: with it, some sets raise before they look at what is there
        try:
            return make(root=str(root), download=download, **keywords)
        except (ImportError, OSError, RuntimeError, ValueError) as error:
            # torchvision raises RuntimeError in the place of some ImportErrors, which are its context then.
            cause = error if isinstance(error, ImportError) else error.__context__
            if isinstance(cause, ImportError):
                package = (cause.name or str(cause)).partition(".")[0]
                raise UserError(
                    f"torchvision reads {name} with the package {package}, which is not installed",
                    where=f"data.name={name}",
                    why=str(cause),
                    fix=f"pip install {shell_word(package)}",
                    code=ExitCode.UNAVAILABLE,
                ) from error
            failure = error
    code = f"from torchvision.datasets import {name}; {name}({str(root)!r}, download=True)"
    line = (str(failure).strip().splitlines() or [""])[0]
    raise UserError(
        f"{name} is not in {root} and could not be downloaded",
        where=str(root.absolute()),
        why=f"{type(failure).__name__}: {line}\nwithout the network the set must be put there by hand",
        fix=[
            f"where there is network: python -c {shell_word(code)}",
            f"then copy its folder {shell_word(root)} here and repeat the command",
            "python -m src.train data=digits   # needs no network",
        ],
        code=ExitCode.UNAVAILABLE,
    ) from failure


def _labels(part: Any) -> list[int]:
    for attribute in ("targets", "labels", "_labels"):
        values = getattr(part, attribute, None)
        if values is not None:
            return [int(value) for value in values]
    samples = getattr(part, "_samples", None)  # (path, label) pairs
    if samples is not None:
        return [int(label) for _, label in samples]
    return [int(part[index][1]) for index in range(len(part))]


def _classes(part: Any, labels: list[int]) -> tuple[str, ...]:
    names = getattr(part, "classes", None)
    if names and len(names) > max(labels):
        return tuple(re.sub(r"\s+", " ", str(name)) for name in names)
    width = len(str(max(labels)))
    return tuple(f"class {label:0{width}d}" for label in range(max(labels) + 1))


def _read(images: list[tuple[Any, int]], background: tuple[int, int, int], index: int) -> torch.Tensor:
    part, place = images[index]
    try:
        image, _ = part[place]
        return pil_to_tensor(to_rgb(image, background))
    except (OSError, SyntaxError, ValueError) as error:  # a file that broke, or went away
        raise ImageError(printable(f"{type(part).__name__}, image {place}: cannot be read ({error})")) from error
