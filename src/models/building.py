"""From the config to a network with pretrained weights."""

from __future__ import annotations

import importlib
import io
import pickle
from dataclasses import replace
from pathlib import Path

import torch

from src.config import Data, Model
from src.engine import features
from src.engine.commands.user_command import corrected
from src.engine.own import check_still_there
from src.engine.runs import seeding
from src.engine.runs.errors import ExitCode, UserError
from src.engine.runs.model_folder import ModelCard, damaged
from src.engine.runs.plain_values import check
from src.engine.steps.task_kind import TaskKind
from src.engine.weights.backbone_names import check_backbone_name, pretrained_preprocessing
from src.engine.weights.preprocessing import Preprocessing
from src.engine.weights.shape_errors import explain_shape_mismatch
from src.engine.weights.weight_files import unreadable
from src.engine.weights.weights import LoadResult, load_pretrained
from src.models.network import Architecture, TransferNetwork, build_network
from src.tasks.building import task_kind_of


def choose_preprocessing(model: Model, data: Data) -> Preprocessing:
    """What the weights were trained with, unless data.image_size or data.crop_ratio say otherwise. Raises UserError."""
    check_backbone_name(model.backbone)
    own = pretrained_preprocessing(model.backbone)
    return replace(own, image_size=data.image_size or own.image_size, crop_ratio=data.crop_ratio or own.crop_ratio)


def architecture_of(model: Model, kind: TaskKind, classes: tuple[str, ...]) -> Architecture:
    """The architecture for these classes. Raises UserError if model.num_classes says something else."""
    if model.num_classes is not None and model.num_classes != len(classes):
        shown = ", ".join(classes[:8]) + (", ..." if len(classes) > 8 else "")
        raise UserError(
            f"model.num_classes={model.num_classes}, but the data has {len(classes)} classes",
            where=f"the classes are {shown}",
            why='labels run from 0 to num_classes-1; on a GPU a label outside appears as "device-side assert triggered"',
            fix=[corrected(f"model.num_classes={len(classes)}"), corrected(remove=["model.num_classes"])],
            code=ExitCode.DATA,
        )
    outputs = kind.outputs(classes)
    return Architecture(
        model.backbone, model.head, outputs, model.hidden, model.dropout, model.backbone_options, model.head_options
    )


def build_pretrained(
    model: Model, kind: TaskKind, classes: tuple[str, ...], preprocessing: Preprocessing, seed: int
) -> tuple[TransferNetwork, LoadResult]:
    """The network with its pretrained backbone and a new head, and what was loaded. Raises UserError."""
    seeding.seed_everything(seed, "new layers")
    architecture = architecture_of(model, kind, classes)
    backbone = features.backbone(model)
    network = build_network(architecture, preprocessing, channels_last=model.channels_last, backbone=backbone)
    loaded = load_pretrained(
        network.backbone,
        model.backbone,
        model.weights,
        keep_classifier=architecture.keep_classifier,
        min_match=model.min_match,
        image_size=preprocessing.image_size,
    )
    _try_forward(network, preprocessing.image_size)
    return network, loaded


def rebuild(
    card: ModelCard, state: dict[str, torch.Tensor], folder: Path = Path("model")
) -> tuple[TransferNetwork, TaskKind]:
    """The network and the task of a model/ folder, as it was trained: nothing is taken from today's config.

    Raises UserError, which names the folder, where the weights are not those of the card's network.
    """
    kind = task_kind_of(card, folder)
    try:
        architecture = Architecture.from_dict(card.architecture)
        check(architecture, "architecture.")
        for name in (architecture.backbone, architecture.head):
            check_still_there(name, folder)
        kind.check_values(card.classes)
        outputs = kind.outputs(card.classes)
        claimed = card.architecture["outputs"]
        saved = [tensor.shape[0] for name, tensor in state.items() if name.startswith("head.") and tensor.ndim == 2][-1]
        if not outputs == claimed == saved:  # before a layer of any size is made
            raise ValueError(f"{len(card.classes)} classes, {claimed} and {saved} outputs contradict")
        network = _untrained(card)
        network.load_state_dict(state)
    except (UserError, RuntimeError, ValueError, TypeError, LookupError) as error:
        if isinstance(error, UserError) and error.code == ExitCode.UNAVAILABLE:  # timm is not installed
            raise
        why = f"its weights and its architecture do not fit each other: {error}"
        raise damaged(folder / "model.json", why) from error
    return network, kind


def load_whole(card: ModelCard, file: Path) -> TransferNetwork:
    """A pickled network. The file may name only classes that the card's network has too, so that no code of the file's own
    runs. Raises UserError for a file that names others."""
    own = io.BytesIO()
    torch.save(_untrained(card), own)
    own.seek(0)
    names = [name.rpartition(".") for name in torch.serialization.get_unsafe_globals_in_checkpoint(own)]
    classes = [getattr(importlib.import_module(module), name) for module, _, name in names]
    try:
        with torch.serialization.safe_globals(classes):
            return torch.load(file, weights_only=True)
    except pickle.UnpicklingError as error:
        raise unreadable(file, error) from None  # torch's own text advises to let all code in


def _untrained(card: ModelCard) -> TransferNetwork:
    architecture = Architecture.from_dict(card.architecture)
    return build_network(architecture, card.preprocessing, channels_last=card.channels_last)


@torch.no_grad()
def _try_forward(network: TransferNetwork, image_size: int) -> None:
    """One image through the network: a head that does not fit is explained before anything else is spent."""
    images = torch.zeros(1, 3, image_size, image_size, dtype=torch.uint8)
    try:
        network.eval()(images)
    except RuntimeError as error:
        raise explain_shape_mismatch(error, network, images) or error from error
