"""The self-contained model/: weights as safetensors and model.json with all that is needed to use them. No pickle.

Written at the end of a run, read by evaluate, predict and whoever copied the folder elsewhere.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torchvision
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from src.engine.commands.user_command import corrected
from src.engine.runs.errors import ExitCode, UserError
from src.engine.runs.files import sha256, write_atomically, write_json
from src.engine.runs.plain_values import check, limited, read_json
from src.engine.runs.reading import read_safetensors
from src.engine.runs.text import printable
from src.engine.weights.preprocessing import Preprocessing, ReadOptions

FORMAT = 1
OF_THE_FOLDER = ("format", "versions", "sha256", "checksum")  # keys of model.json beside those of the card


@dataclass(frozen=True)
class ModelCard:
    """model.json: what the weights are, how an image becomes their input, what their outputs mean."""

    architecture: dict[str, Any]
    preprocessing: Preprocessing
    classes: tuple[str, ...] = limited(
        length=(1, 10**5)
    )  # or labels, or quantities: what the task tells about an image
    task: str = limited()
    background: tuple[int, int, int] = limited(range=(0, 255))
    max_megapixels: float = limited(range=(0.001, 10_000))
    channels_last: bool
    precision: str = limited(options=("fp32", "fp16", "bf16"))
    metrics: dict[str, float | None]
    # Used bits of 16-bit channels, see ReadOptions; models of older runs were trained with all 16.
    bits: int = limited(16, range=(0, 16))
    keep_side: int = limited(0, range=(0, 10**5))  # see ReadOptions; older runs read images as large as they are
    task_values: dict[str, tuple[float, ...]] = field(default_factory=dict)  # such as thresholds: TaskKind.values
    task_options: dict[str, Any] = field(default_factory=dict)  # arguments of an own task

    @property
    def read_options(self) -> ReadOptions:
        """How the images were read that the network was trained on."""
        return ReadOptions(self.background, self.max_megapixels, self.bits, self.keep_side)

    def to_dict(self) -> dict[str, Any]:
        """Without what only some tasks have."""
        values = {**self.__dict__, "preprocessing": self.preprocessing.to_dict()}
        return {key: value for key, value in values.items() if not (key.startswith("task_") and value == {})}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelCard:
        """Raises ValueError, KeyError or TypeError for values that `to_dict` never writes."""
        unknown = values.keys() - cls.__dataclass_fields__.keys() - {*OF_THE_FOLDER}
        if unknown:
            raise ValueError(f"{', '.join(sorted(unknown))[:100]} is not known")
        own = {name: values[name] for name in cls.__dataclass_fields__ if name in values}
        own["preprocessing"] = Preprocessing.from_dict(own["preprocessing"])
        for key in ("classes", "background"):
            own[key] = tuple(own[key]) if isinstance(own[key], list | tuple) else own[key]
        if isinstance(rows := own.get("task_values"), dict):
            own["task_values"] = {key: tuple(row) if isinstance(row, list) else row for key, row in rows.items()}
        card = cls(**own)
        check(card)
        if not all(0.001 <= number <= 1000 for number in card.task_values.get("temperature", ())):
            raise ValueError("the temperature is not from 0.001 to 1000")
        if len({*card.classes}) != len(card.classes):
            raise ValueError("a class stands in it twice")
        return card


def save_model(folder: Path, state: Mapping[str, Tensor], card: ModelCard) -> None:
    """Writes model.safetensors, then model.json with its SHA-256: a model.json that exists belongs to whole weights.

    Raises UserError (DIVERGED) for weights that hold nan or inf.
    """
    if spoilt := [name for name, tensor in state.items() if tensor.is_floating_point() and not tensor.isfinite().all()]:
        raise UserError(
            f"the weights to package are not finite: {spoilt[0]}, and {len(spoilt) - 1} more tensors",
            where=str(folder.parent.absolute()),
            why="training diverged, or began with such weights",
            fix=[corrected("optimizer.lr=1e-4"), corrected("checkpoint.select=best")],
            code=ExitCode.DIVERGED,
        )
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / "model.safetensors"
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    write_atomically(weights, lambda file: file.write(save(copies)))  # safetensors refuses tensors that share memory
    versions = {"python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__}
    values = {"format": FORMAT, **card.to_dict(), "versions": versions, "sha256": sha256(weights)}
    write_json(folder / "model.json", values | {"checksum": _checksum(values)})


def _checksum(values: dict[str, Any]) -> str:
    """SHA-256 of the values of model.json without the checksum, whatever the layout of the file."""
    rest = {key: value for key, value in values.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def load_model(folder: Path) -> tuple[ModelCard, dict[str, Tensor]]:
    """The card and the weights of a model/ folder. Raises UserError for a folder without a model, or a damaged one."""
    file, weights = folder / "model.json", folder / "model.safetensors"
    if not (file.is_file() and weights.is_file()):
        missing = file.name if not file.is_file() else weights.name
        raise UserError(
            f"{folder} holds no model: {missing} is missing",
            where=str(folder.absolute()),
            why="a run writes its model/ when it ends; one that was interrupted has none yet",
            fix="ls -d runs/*/model",
            code=ExitCode.NO_INPUT,
        )
    try:
        values = read_json(file)
        if values["format"] != FORMAT:
            raise ValueError(f"it has format {str(values['format'])[:60]}, this program reads format {FORMAT}")
        if values.get("checksum", checksum := _checksum(values)) != checksum:  # older runs have none
            raise ValueError("its checksum is not the one it was written with")
        card = ModelCard.from_dict(values)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise damaged(file, f"{type(error).__name__}: {error}") from error
    if sha256(weights) != values.get("sha256"):
        raise damaged(weights, "its SHA-256 is not the one in model.json")
    try:
        state = read_safetensors(weights)
    except (ValueError, SafetensorError) as error:
        raise damaged(weights, f"it is no file of tensors: {error}") from error
    if broken := [name for name, value in state.items() if not torch.isfinite(value).all()]:
        raise damaged(weights, f"nan or inf in {len(broken)} of {len(state)} tensors, such as {broken[0][:60]}")
    return card, state


def damaged(path: Path, why: str) -> UserError:
    """The error for a file of a model/ folder that cannot be used."""
    return UserError(
        f"{printable(path)} is not what was written",
        where=printable(path.absolute()),
        why=printable(why[:300]),
        fix="copy the folder again from the run that made it",
        code=ExitCode.DATA,
    )
