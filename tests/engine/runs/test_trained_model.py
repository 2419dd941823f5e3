"""A model/ folder in use: what it reads, and what it answers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import PIL
import pytest
import torch
from PIL import Image

from src import api
from src.engine.images.reading import read_image
from src.engine.runs.errors import UserError
from src.engine.runs.model_folder import save_model
from src.engine.runs.trained_model import TrainedModel
from src.models.building import rebuild
from src.models.network import build_network
from src.tasks.multiclass import Multiclass
from tests.conftest import write_images
from tests.engine.runs.small_training import SQUARE, network
from tests.engine.runs.test_model_readme import ARCHITECTURE, CARD

CPU = torch.device("cpu")


def small() -> TrainedModel:
    return TrainedModel(replace(CARD, preprocessing=SQUARE), network(), Multiclass())


def test_probabilities_are_those_of_the_network(tmp_path):
    write_images(tmp_path, {"": 1})
    model = small()
    images = model.read(tmp_path / "000.png").repeat(3, 1, 1, 1)
    assert (images.shape, images.dtype) == ((3, 3, 8, 8), torch.uint8)
    with torch.no_grad():
        expected = model.network(images).softmax(1)
    assert not model.network.training
    torch.testing.assert_close(model.predict(images), expected)


def test_a_batch_that_does_not_fit_is_computed_in_parts():
    model, whole = small(), small()
    sizes = []

    def look(module, inputs):
        sizes.append(len(inputs[0]))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    model.network.backbone.register_forward_pre_hook(look)
    images = torch.randint(256, (5, 3, 8, 8), dtype=torch.uint8)
    torch.testing.assert_close(model.logits(images), whole.logits(images))
    assert sizes == [5, 3, 2, 2, 1]


def test_a_loaded_model_is_the_saved_one(tmp_path):
    saved = build_network(ARCHITECTURE, CARD.preprocessing).eval()
    save_model(tmp_path, saved.state_dict(), CARD)
    model = TrainedModel.load(tmp_path, rebuild)
    assert (model.card, model.device, model.precision, model.folder) == (CARD, CPU, "fp32", tmp_path)
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        torch.testing.assert_close(model.logits(images), saved(images))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU is there")
def test_a_device_that_is_not_there_is_said(tmp_path):
    save_model(tmp_path, {"head.weight": torch.zeros(3, 2)}, CARD)
    with pytest.raises(UserError, match="gpu"):
        TrainedModel.load(tmp_path, rebuild, "gpu")


# Pillow 12 cannot read the uncompressed TIFF of YCbCr that it writes.
YCBCR = pytest.param("YCbCr", marks=pytest.mark.skipif(PIL.__version__ < "13", reason="Pillow 12"))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "LA", "1", "I;16", "CMYK", "F", YCBCR])
def test_a_pil_image_is_read_as_its_file_is(tmp_path, mode):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 4), dtype=np.uint8), "RGBA")
    file = tmp_path / ("image.tiff" if mode in ("CMYK", "F", "YCbCr") else "image.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    image = noise.convert("L").convert(mode) if mode == "I;16" else noise.convert(mode)
    image.save(file, **({"exif": exif} if file.suffix == ".png" else {}))
    model = TrainedModel(replace(CARD, preprocessing=SQUARE, classes=("a", "b", "c")), network(), Multiclass())
    from_file = model.read(file)
    with Image.open(file) as opened:
        assert torch.equal(model.read(opened), from_file)
    assert torch.equal(model.read(read_image(file, model.card.read_options)), from_file)
    assert api.predict(model, [file, file, file], batch_size=2).shape == (3, 3)
