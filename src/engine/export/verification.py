"""Loads an export in a fresh process, as whoever gets the file will, and compares its outputs with the network's."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import numpy as np

from src.engine.commands.user_command import corrected
from src.engine.export.formats import Format
from src.engine.project import PROJECT
from src.engine.runs.errors import ExitCode, UserError

# float32 sums in another order differ by 1e-6 or so; a wrong weight, layer or normalisation by far more.
TOLERANCE = 1e-4


# All images at once, then the first alone: an export that only takes the number of images it was made with fails.
_SCRIPT = """\
import sys

import numpy

{guard}
{load}
images = numpy.load(sys.argv[1])
outputs = []
for images in (images, images[:1]):
{call}
    outputs.append(logits)
numpy.save(sys.argv[2], numpy.concatenate(outputs))
"""
_WITHOUT_PROJECT = 'sys.modules["src"] = None  # any import of the project is an error'


def verify(form: Format, folder: Path, images: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference between the outputs of the export in `folder` and the network's.

    images: uint8 (B, 3, S, S); expected: the network's logits, float32 (B, outputs). The difference is relative to the
    largest logit, or absolute where all are below 1: a probability changes by as much. Raises UserError if the export
    cannot be loaded or differs by more than TOLERANCE.
    """
    outputs = _outputs_in_fresh_process(form, folder, images)
    expected = np.concatenate([expected, expected[:1]])
    if outputs.shape != expected.shape:
        raise _refused(form, f"its outputs have the shape {outputs.shape} instead of {expected.shape}")
    difference = float(np.abs(outputs - expected).max() / max(1.0, np.abs(expected).max()))
    if not difference <= TOLERANCE:  # nan too
        raise _refused(
            form, f"its outputs differ by {difference:.1e}, relative to the largest; {TOLERANCE:.0e} is allowed"
        )
    return difference


def _outputs_in_fresh_process(form: Format, folder: Path, images: np.ndarray) -> np.ndarray:
    script = _SCRIPT.format(
        guard="" if form.needs_project else _WITHOUT_PROJECT, load=form.load, call=textwrap.indent(form.call, " " * 4)
    )
    environment = dict(os.environ)
    if form.needs_project:
        environment["PYTHONPATH"] = os.pathsep.join([str(PROJECT), os.environ.get("PYTHONPATH", "")])
    with tempfile.TemporaryDirectory() as name:
        inputs, outputs = Path(name) / "images.npy", Path(name) / "logits.npy"
        np.save(inputs, images)
        done = subprocess.run(
            [sys.executable, "-c", script, str(inputs), str(outputs)],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            errors="replace",
        )
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or [f"the process ended with {done.returncode}"])[-1]
            raise _refused(form, f"a fresh process cannot use it: {last[:300]}")
        return np.load(outputs)


def _refused(form: Format, why: str) -> UserError:
    other = "torch_export" if form.name == "safetensors" else "safetensors"
    return UserError(
        f"{form.file} does not give what the network gives, and was not kept",
        why=why,
        fix=corrected(f"format={other}"),
        code=ExitCode.BUG,  # of torch, onnxruntime or this project; still, another format may do
    )
