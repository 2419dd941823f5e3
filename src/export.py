"""Saves the model of a run in one file, and proves that the file gives the model's outputs.

    python -m src.export run=runs/NAME format=state_dict        the weights, as torch.save writes them
    python -m src.export run=runs/NAME format=whole             the pickled network: for your own use only
    python -m src.export run=runs/NAME format=safetensors       the weights, in a format that cannot hold code
    python -m src.export run=runs/NAME format=torch_export      the computation as a graph: needs torch, not this project
    python -m src.export run=runs/NAME format=onnx              the same for other programs: needs neither

Writes the file and model.json (classes, preprocessing, architecture) to runs/NAME/export/, or to out=FOLDER. The file is
loaded in a fresh process and its outputs are compared with the network's on images of the run, or on those of
images=FOLDER; a file that fails is not kept. Prints the Python that loads it.
"""

from __future__ import annotations

from src.engine.runs import signals

if __name__ == "__main__":
    signals.end_at_once()  # what follows takes a while to import

import sys
from dataclasses import dataclass

from src import rules  # noqa: F401 (registers the settings)
from src.engine.commands.words import read_words
from src.engine.export.formats import choose_format
from src.engine.runs.errors import run_and_report
from src.engine.runs.imports import importing
from src.engine.runs.run_dir import refuse_links
from src.engine.runs.run_lookup import find_run
from src.engine.runs.run_settings import merged, stored_settings
from src.engine.runs.text import path_in


@dataclass
class Words:
    run: str  # the run's folder; its model/ is exported
    format: str | None = None  # one of src.engine.export.formats.FORMATS
    out: str | None = None  # where to write; default: export/ in the run's folder
    images: str | None = None  # images to compare the outputs on; default: the run's own


def work() -> None:
    words, _ = read_words(Words, sys.argv[1:], "src.export", __doc__ or "", needed="run")
    form = choose_format(words.format)
    run = find_run(words.run)
    if words.out is None:
        refuse_links(run, "export*", "export/*")
    settings = {} if words.images else merged(stored_settings(run), {})
    with importing():  # after the words are known to be right: torch takes seconds
        from src.data import sources
        from src.engine.export.export_run import export_model
        from src.engine.export.images import images_below, images_of_run
        from src.engine.runs.trained_model import TrainedModel
        from src.models.building import rebuild

    model = TrainedModel.load(run / "model", rebuild, precision="fp32")
    if words.images:
        examples = images_below(path_in(words.images), model)
    else:
        examples = images_of_run(run, settings, model, sources)
    export_model(model, examples, form, path_in(words.out) if words.out else run / "export")


if __name__ == "__main__":
    sys.exit(run_and_report(work))
