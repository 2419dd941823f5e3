"""Saves the model of a run in one file, and proves that the file gives the model's outputs.

    python -m src.export run=runs/NAME format=state_dict        the weights, as torch.save writes them
    python -m src.export run=runs/NAME format=whole             the pickled network: for your own use only
    python -m src.export run=runs/NAME format=safetensors       the weights, in a format that cannot hold code
    python -m src.export run=runs/NAME format=torch_export      the computation as a graph: needs torch, not this project
    python -m src.export run=runs/NAME format=onnx              the same for other programs: needs neither
    python -m src.export run=runs/cv format=onnx                the mean of all folds' models, or of run=[runs/a,runs/b]

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
from src.engine.export.target import target_folder
from src.engine.runs.errors import run_and_report
from src.engine.runs.imports import importing
from src.engine.runs.run_lookup import find_runs_or_models
from src.engine.runs.run_settings import merged, stored_settings
from src.engine.runs.text import path_in


@dataclass
class Words:
    run: str  # the run's folder, whose model/ is exported, or [one,another]
    format: str | None = None  # one of src.engine.export.formats.FORMATS
    out: str | None = None  # where to write; default: export/ in the run's folder
    images: str | None = None  # images to compare the outputs on; default: the run's own


def work() -> None:
    words, _ = read_words(Words, sys.argv[1:], "src.export", __doc__ or "", needed="run")
    choose_format(words.format)
    runs, folders = find_runs_or_models(words.run, None, "src.export")
    form = choose_format(words.format, len(runs))
    out = target_folder(words.run, runs, words.out)
    settings = {} if words.images else merged(stored_settings(runs[0]), {})
    with importing():  # after the words are known to be right: torch takes seconds
        from src.data import sources
        from src.engine.export.export_run import export_model
        from src.engine.export.images import images_below, images_of_run
        from src.engine.runs.ensemble import combined
        from src.engine.runs.trained_model import TrainedModel
        from src.models.building import rebuild

    model = combined([TrainedModel.load(folder, rebuild, precision="fp32") for folder in folders], "none")
    if words.images:
        examples = images_below(path_in(words.images), model)
    else:
        examples = images_of_run(runs[0], settings, model, sources)
    export_model(model, examples, form, out)


if __name__ == "__main__":
    sys.exit(run_and_report(work))
