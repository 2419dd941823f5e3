"""From a run's model to one verified file: the work of src/export.py."""

from __future__ import annotations

import logging
import shutil
import tempfile
from pathlib import Path

from torch import Tensor

from src.engine.export.formats import Format
from src.engine.export.verification import TOLERANCE, verify
from src.engine.export.writers import WRITERS
from src.engine.runs.ensemble import Ensemble
from src.engine.runs.files import make_folder, write_atomically, write_json
from src.engine.runs.trained_model import TrainedModel

log = logging.getLogger(__name__)


def export_model(model: TrainedModel, examples: Tensor, form: Format, out: Path) -> None:
    """Writes the file of the format and model.json to `out`, verified on the examples, uint8 (N, 3, S, S).

    model: as read from its folder, in fp32 on the CPU. Raises UserError, and then leaves `out` as it was.
    """
    assert model.folder is not None
    make_folder(out, "out")
    expected = model.logits(examples).numpy()

    with tempfile.TemporaryDirectory(prefix=".unverified-", dir=out) as name:
        draft = Path(name)
        if isinstance(model, Ensemble):
            write_json(draft / "model.json", model.card.to_dict())
        else:
            shutil.copyfile(model.folder / "model.json", draft / "model.json")
        WRITERS[form.name](model, draft / form.file)
        difference = verify(form, draft, examples.numpy(), expected)
        names = sorted(file.name for file in draft.iterdir())
        for file in names:
            _copy(draft / file, out / file)
    _report(form, [out / file for file in names if file != "model.json"], model, len(examples), difference)


def _copy(source: Path, target: Path) -> None:
    with source.open("rb") as content:
        write_atomically(target, lambda file: shutil.copyfileobj(content, file))


def _report(form: Format, files: list[Path], model: TrainedModel, count: int, difference: float) -> None:
    """What was written, how far it can be trusted, and how to use it."""
    out, size = files[0].parent, model.card.preprocessing.image_size
    project = "with this project" if form.needs_project else "without this project"
    for file in files:
        log.info(f"export    {file}: {file.stat().st_size / 2**20:.1f} MiB")
    log.info(f"          {form.about}")
    log.info(f"beside    {out / 'model.json'}: classes, preprocessing, architecture")
    log.info(f"verified  on {count} images, in a fresh process {project}: largest difference {difference:.1e},")
    log.info(f"          relative to the largest output; {TOLERANCE:.0e} is allowed")
    log.info(f"load it   in {out}, with images as numpy uint8 (B, 3, {size}, {size}):")
    log.info(f"\n{form.load}{form.call}".rstrip())
