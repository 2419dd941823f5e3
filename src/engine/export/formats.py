"""The five formats: the file that each one writes, and the Python that gets from the file to logits.

src/export.py checks its words with this, so torch is not imported here. The code is printed at the end of an export, and
verification.py runs the very same lines.
"""

from __future__ import annotations

import difflib
import importlib.util
from dataclasses import dataclass

from src.engine.commands.user_command import corrected
from src.engine.runs.errors import ExitCode, UserError
from src.engine.runs.text import printable


@dataclass(frozen=True)
class Format:
    """load and call are Python, to be run in the export folder.

    load: needs nothing, and defines what call uses.
    call: from images, numpy uint8 (B, 3, S, S), to logits, numpy float32 (B, outputs).
    """

    name: str
    file: str
    about: str  # one line
    load: str
    call: str
    needs_project: bool  # whether load imports src/
    packages: tuple[str, ...] = ()  # of the extra of the same name in pyproject.toml


_CALL = """\
with torch.inference_mode():
    logits = network(torch.from_numpy(images)).numpy()
"""

_CARD = """\
import json
from pathlib import Path

import torch

from src.engine.runs.model_folder import ModelCard
from src.models.building import {function}

card = ModelCard.from_dict(json.loads(Path("model.json").read_text(encoding="utf-8")))
"""

STATE_DICT = Format(
    name="state_dict",
    file="model_state_dict.pt",
    about="the weights; load with weights_only=True, which runs no code, into this project's network",
    load=_CARD.format(function="rebuild")
    + 'network, task = rebuild(card, torch.load("model_state_dict.pt", weights_only=True))\n'
    + "network.eval().temperature = task.temperature\n",
    call=_CALL,
    needs_project=True,
)

WHOLE = Format(
    name="whole",
    file="model_whole.pt",
    about="the pickled network; not for sharing: it needs this source tree as it is, and other programs run any code in it",
    load=_CARD.format(function="load_whole") + 'network = load_whole(card, Path("model_whole.pt"))\n',
    call=_CALL,
    needs_project=True,
)

SAFETENSORS = Format(
    name="safetensors",
    file="model.safetensors",
    about="the weights, in a file that cannot hold code; with model.json a folder for src.predict model=",
    load="""\
from pathlib import Path

import torch

from src.engine.runs.trained_model import TrainedModel
from src.models.building import rebuild

model = TrainedModel.load(Path("."), rebuild, precision="fp32")
""",
    call="logits = model.logits(torch.from_numpy(images)).numpy()\n",
    needs_project=True,
)

TORCH_EXPORT = Format(
    name="torch_export",
    file="model.pt2",
    about="the computation and the weights, as a graph; needs torch, but not this project",
    load="""\
import torch

network = torch.export.load("model.pt2").module()
""",
    call=_CALL,
    needs_project=False,
)

ONNX = Format(
    name="onnx",
    file="model.onnx",
    about="the computation and the weights, for many programs; needs onnxruntime, not torch nor this project",
    load="""\
import onnxruntime

session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
""",
    call='logits = session.run(["logits"], {"images": images})[0]\n',
    needs_project=False,
    packages=("onnx", "onnxscript", "onnxruntime"),
)

FORMATS = {form.name: form for form in (STATE_DICT, WHOLE, SAFETENSORS, TORCH_EXPORT, ONNX)}


def choose_format(name: str | None, num_models: int = 1) -> Format:
    """The format of that name, whose packages are installed, and which can hold that many models. Raises UserError."""
    if name not in FORMATS:
        close = difflib.get_close_matches((name or "").lower(), FORMATS, n=1) or [SAFETENSORS.name]
        raise UserError(
            f"format={printable(name)} is not a format" if name else "format= is missing",
            why="\n".join(f"{form.name}: {form.about}" for form in FORMATS.values()),
            fix=corrected(f"format={close[0]}"),
        )
    form = FORMATS[name]
    if num_models > 1 and form.needs_project:
        raise UserError(
            f"format={name} cannot hold {num_models} models",
            where="run=",
            why="it has the weights of one network; a graph computes the mean of them all",
            fix=[corrected(f"format={graph.name}") for graph in (TORCH_EXPORT, ONNX)],
        )
    missing = [package for package in form.packages if importlib.util.find_spec(package) is None]
    if missing:
        raise UserError(
            f"format={name} needs {', '.join(missing)}, which {'are' if len(missing) > 1 else 'is'} not installed",
            why=f"{', '.join(form.packages)} are an extra of this project",
            fix=[f'pip install -e ".[{name}]"', corrected(f"format={TORCH_EXPORT.name}")],
            code=ExitCode.UNAVAILABLE,
        )
    return form
