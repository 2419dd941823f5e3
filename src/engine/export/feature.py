"""python -m src.export: a run's model as one file."""

from __future__ import annotations

from src.engine import features

features.add(
    features.Feature(
        name="export",
        about="python -m src.export: a model as state_dict, whole, safetensors, torch_export or onnx, checked",
        files=("src/export.py", "docs/export.md"),
        help={"programs": "python -m src.export run=runs/NAME format=onnx"},
    )
)
