"""Saves the model of a run in one file, and proves that the file gives the model's outputs.

    python -m src.export run=runs/NAME format=state_dict        the weights, as torch.save writes them
    python -m src.export run=runs/NAME format=whole             the pickled network: for your own use only
    python -m src.export run=runs/NAME format=safetensors       the weights, in a format that cannot hold code
    python -m src.export run=runs/NAME format=torch_export      the computation as a graph: needs torch, not this project
    python -m src.export run=runs/NAME format=onnx              the same for other programs: needs neither

Writes the file and model.json (classes, preprocessing, architecture) to runs/NAME/export/, or to out=FOLDER. The file is
loaded in a fresh process and its outputs are compared with the network's on pictures of the run, or on those of
images=FOLDER; a file that fails is not kept. Prints the Python that loads it.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from src.command_line import read_words
from src.errors import UserError, run_and_report
from src.exporting.formats import choose_format


@dataclass
class Words:
    run: str | None = None  # the run's folder; its model/ is exported
    format: str | None = None  # one of src.exporting.formats.FORMATS
    out: str | None = None  # where to write; default: export/ in the run's folder
    images: str | None = None  # pictures to compare the outputs on; default: the run's own


def work() -> None:
    words, overrides = read_words(Words, sys.argv[1:], "src.export", __doc__ or "", needed="run")
    if overrides:
        raise UserError(
            f"{overrides[0]} is not a setting of src.export",
            why="an export takes no data. settings; other pictures to compare on are images=FOLDER",
            fix=f"python -m src.export run={words.run} format={words.format or 'safetensors'} images=FOLDER",
        )
    run = Path(words.run or "")
    form = choose_format(words.format, run)
    from src.exporting.export_run import (
        export_run,
    )  # after the words are known to be right: torch takes seconds to import

    export_run(
        run, form, Path(words.out) if words.out else run / "export", Path(words.images) if words.images else None
    )


if __name__ == "__main__":
    sys.exit(run_and_report(work))
