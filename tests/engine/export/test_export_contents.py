"""What an exported graph carries beside its weights, and docs/export.md's way to use it without this project."""

from __future__ import annotations

import json
import re
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from src.engine.export.writers import WRITERS
from src.engine.images.reading import read_image
from src.engine.images.resizing import eval_transform
from src.engine.runs.model_folder import ModelCard
from src.engine.runs.trained_model import TrainedModel
from src.engine.weights.preprocessing import Preprocessing
from src.models.network import Architecture, build_network
from src.tasks.multiclass import Multiclass
from tests.engine.images.odd_images import orientation_exif

ROOT = Path(__file__).parents[3]
CLASSES = ("größe", "b", "c")
STEPS = Preprocessing(64, 0.875, "bilinear", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.fixture(scope="module")
def model() -> TrainedModel:
    torch.manual_seed(0)
    architecture = Architecture("shufflenet_v2_x0_5", "linear", 3)
    network = build_network(architecture, STEPS)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # the mean over all batches
    with torch.no_grad():  # statistics of a few images, so that outputs differ as those of a trained network do
        small = torch.randint(0, 256, (32, 3, 8, 8), dtype=torch.uint8)
        network.train()(torch.nn.functional.interpolate(small, (64, 64), mode="bilinear"))
        network.head.weight.mul_(2)
    card = ModelCard(architecture.to_dict(), STEPS, CLASSES, "multiclass", (255, 255, 255), 100.0, True, "fp32", {})
    return TrainedModel(card, network, Multiclass())


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("contents")
    WRITERS["onnx"](model, folder / "model.onnx")
    WRITERS["torch_export"](model, folder / "model.pt2")
    return folder


def test_the_files_say_what_they_are(folder):
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    of_pt2 = dict.fromkeys(("task", "classes", "preprocessing"), "")
    torch.export.load(folder / "model.pt2", extra_files=of_pt2)
    for about in (session.get_modelmeta().custom_metadata_map, of_pt2):
        assert json.loads(about["task"]) == "multiclass"
        assert tuple(json.loads(about["classes"])) == CLASSES
        assert Preprocessing.from_dict(json.loads(about["preprocessing"])) == STEPS


def test_no_path_of_this_machine_is_in_the_files(folder):
    with zipfile.ZipFile(folder / "model.pt2") as archive:
        of_pt2 = b"".join(archive.read(name) for name in archive.namelist())
    of_onnx = (folder / "model.onnx").read_bytes()
    for place in (str(Path.cwd()), str(ROOT), sys.prefix, str(Path(torch.__file__).parent), str(folder), ".py"):
        assert place.encode() not in of_pt2
        assert place.encode() not in of_onnx
    assert len(str(Path.home())) < 3 or str(Path.home()).encode() + b"/" not in of_pt2 + of_onnx


def write_images(folder: Path) -> list[Path]:
    random = np.random.default_rng(0)
    paths = []
    for index, (width, height) in enumerate([(400, 300), (301, 500), (50, 37), (41, 60), (64, 200), (73, 73)]):
        small = random.integers(0, 256, (height // 6 + 2, width // 6 + 2, 3), dtype=np.uint8)
        image = np.asarray(Image.fromarray(small).resize((width, height))).astype(int)
        noisy = (image + random.integers(-30, 31, image.shape)).clip(0, 255).astype(np.uint8)
        paths.append(folder / f"{index}.png")
        Image.fromarray(noisy).save(paths[-1])
    alpha = np.tile(np.linspace(0, 255, 400).astype(np.uint8), (300, 1))
    rgb = np.asarray(Image.open(paths[0]))
    for name, image in {
        "alpha.png": np.dstack([rgb, alpha]),
        "empty_alpha.png": np.dstack([rgb, alpha * 0]),
        "scan.tif": rgb[..., 0].astype(np.uint16) * 16,
    }.items():
        Image.fromarray(image).save(folder / name)
        paths.append(folder / name)
    Image.fromarray(rgb).save(folder / "turned.jpg", exif=orientation_exif(6))
    return [*paths, folder / "turned.jpg"]


@pytest.mark.parametrize(
    "steps",
    [
        STEPS,
        replace(STEPS, interpolation="bicubic"),
        replace(STEPS, interpolation="bicubic", crop_ratio=0.9, rounding="floor"),
        replace(STEPS, crop_ratio=1.0),
        replace(STEPS, crop_mode="squash"),
        replace(STEPS, crop_mode="border"),
        replace(STEPS, crop_ratio=1.15, rounding="floor"),
    ],
)
def test_the_page_gives_the_probabilities_of_predict(model, folder, tmp_path, monkeypatch, steps):
    pytest.importorskip("onnxruntime")
    card = replace(model.card, preprocessing=steps, bits=12)
    (tmp_path / "model.json").write_text(json.dumps(card.to_dict()), encoding="utf-8")
    (tmp_path / "model.onnx").write_bytes((folder / "model.onnx").read_bytes())
    paths = write_images(tmp_path)
    paths[0].rename(tmp_path / "image.jpg")
    paths[0] = tmp_path / "image.jpg"

    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "export.md").read_text(), re.DOTALL):
        exec(block, scope)
    assert tuple(scope["classes"]) == CLASSES
    images = np.stack([scope["preprocess"](scope["read"](path)) for path in paths])
    found = scope["answers"](scope["session"].run(["logits"], {"images": images})[0])

    ours = torch.stack([eval_transform(steps)(read_image(path, card.read_options)) for path in paths])
    # Where torch has no kernel for bytes it computes in floats: a level more or less in a few pixels.
    exact = steps.interpolation == "bicubic" or torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    assert np.abs(images.astype(int) - ours.numpy()).max() <= (0 if exact else 1)
    with torch.inference_mode():
        expected = model.kind.probabilities(model.network(ours)).numpy()
    assert expected.std(axis=0).max() > 0.05  # outputs that are all alike would be equal to anything
    if exact:  # a network of random weights makes much of a single level
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)
