"""The self-contained model/: weights as safetensors and model.json with all that is needed to use them. No pickle.

Written at the end of a run, read by evaluate, predict and whoever copied the folder elsewhere.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from safetensors.torch import load_file, save
from torch import Tensor

from src.errors import ExitCode, UserError
from src.preprocessing import Preprocessing, ReadOptions
from src.run_dir import sha256, write_atomically, write_json

FORMAT = 1


@dataclass(frozen=True)
class ModelCard:
    """model.json: what the weights are, how a picture becomes their input, what their outputs mean."""

    architecture: dict[str, Any]
    preprocessing: Preprocessing
    classes: tuple[str, ...]
    task: str
    background: tuple[int, int, int]
    max_megapixels: float
    channels_last: bool
    precision: str
    metrics: dict[str, float]
    bits: int = 16  # of 16-bit channels, see ReadOptions; models of older runs were trained with all 16

    @property
    def read_options(self) -> ReadOptions:
        """How the pictures were read that the network was trained on."""
        return ReadOptions(self.background, self.max_megapixels, self.bits)

    def to_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "preprocessing": self.preprocessing.to_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelCard:
        known = {name: values[name] for name in cls.__dataclass_fields__ if name in values}
        known["preprocessing"] = Preprocessing.from_dict(known["preprocessing"])
        known["classes"], known["background"] = tuple(known["classes"]), tuple(known["background"])
        return cls(**known)


def save_model(folder: Path, state: Mapping[str, Tensor], card: ModelCard) -> None:
    """Writes model.safetensors, then model.json with its SHA-256: a model.json that exists belongs to whole weights."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / "model.safetensors"
    write_atomically(weights, lambda file: file.write(save(_unshared(state))))
    versions = {"python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__}
    write_json(
        folder / "model.json", {"format": FORMAT, **card.to_dict(), "versions": versions, "sha256": sha256(weights)}
    )


def _unshared(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state_dict in main memory, without two names for the same memory, which safetensors refuses."""
    tensors: dict[str, Tensor] = {}
    memory: set[int] = set()
    for name, tensor in state.items():
        value = tensor.detach().cpu().contiguous()
        tensors[name] = value.clone() if value.untyped_storage().data_ptr() in memory else value
        memory.add(value.untyped_storage().data_ptr())
    return tensors


def load_model(folder: Path) -> tuple[ModelCard, dict[str, Tensor]]:
    """The card and the weights of a model folder. Raises UserError for a folder that is none, or is damaged."""
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
        values = json.loads(file.read_text(encoding="utf-8"))
        card = ModelCard.from_dict(values)
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(file, f"{type(error).__name__}: {error}") from error
    if values["format"] != FORMAT:
        raise _damaged(file, f"it has format {values['format']}, this program reads format {FORMAT}")
    if sha256(weights) != values["sha256"]:
        raise _damaged(weights, "its SHA-256 is not the one in model.json")
    return card, load_file(weights)


def _damaged(path: Path, why: str) -> UserError:
    return UserError(
        f"{path} is not what was written",
        where=str(path.absolute()),
        why=why,
        fix="copy the folder again from the run that made it",
        code=ExitCode.DATA,
    )
