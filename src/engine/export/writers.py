"""From a model folder to the file of each format."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from src.engine.export.formats import ONNX, SAFETENSORS, STATE_DICT, TORCH_EXPORT, WHOLE
from src.engine.runs.trained_model import TrainedModel

_ABOUT = ("task", "classes", "task_values", "preprocessing", "background", "bits")
_ANY_BATCH = ({0: torch.export.Dim("batch", min=1)},)


def _write_state_dict(model: TrainedModel, path: Path) -> None:
    torch.save(model.network.state_dict(), path)


def _write_whole(model: TrainedModel, path: Path) -> None:
    torch.save(model.network, path)


def _write_safetensors(model: TrainedModel, path: Path) -> None:
    assert model.folder is not None
    shutil.copyfile(model.folder / "model.safetensors", path)  # the bytes whose SHA-256 model.json has


def _write_torch_export(model: TrainedModel, path: Path) -> None:
    program = torch.export.export(model.as_network(), _example(model), dynamic_shapes=_ANY_BATCH)
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # names the files of this machine
    with warnings.catch_warnings():
        # It is said of every channels_last weight. The bytes and the strides are written, so nothing is lost.
        warnings.filterwarnings("ignore", message="No complete tensor found in the group")
        torch.export.save(program, path, extra_files=_about(model))


def _write_onnx(model: TrainedModel, path: Path) -> None:
    """One file; above 1.5 GiB of weights the exporter puts them beside it, since protobuf ends at 2 GiB."""
    program = torch.onnx.export(
        model.as_network(),
        _example(model),
        dynamo=True,
        dynamic_shapes=_ANY_BATCH,
        input_names=["images"],
        output_names=["logits"],
        external_data=False,
        verbose=False,
    )
    assert program is not None
    for graph in (program.model.graph, *program.model.functions.values()):
        for node in graph.all_nodes():
            node.metadata_props.clear()  # stack traces, which name the files of this machine
    program.model.metadata_props.update(_about(model))
    program.save(path, external_data=False)


def _about(model: TrainedModel) -> dict[str, str]:
    """What a file needs beside its weights to be used, as JSON texts."""
    card = model.card.to_dict()
    return {name: json.dumps(card[name], ensure_ascii=False) for name in _ABOUT if name in card}


def _example(model: TrainedModel) -> tuple[torch.Tensor]:
    """Two images: a batch of one would be taken for a number that never changes."""
    size = model.card.preprocessing.image_size
    return (torch.zeros(2, 3, size, size, dtype=torch.uint8),)


WRITERS: dict[str, Callable[[TrainedModel, Path], None]] = {
    STATE_DICT.name: _write_state_dict,
    WHOLE.name: _write_whole,
    SAFETENSORS.name: _write_safetensors,
    TORCH_EXPORT.name: _write_torch_export,
    ONNX.name: _write_onnx,
}
