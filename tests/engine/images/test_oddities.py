"""What the check says about a set of images, and what it decides for all of them."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from src.config import Data
from src.data.sources import load_images
from src.engine.images import checking
from src.engine.images.checking import check_images
from src.engine.images.labelled_images import Listing
from src.engine.images.oddities import bits_used, report
from src.engine.images.reading import ReadOptions
from src.engine.runs.files import write_csv
from src.engine.runs.prediction import ImageFiles
from src.tasks.multiclass import Multiclass
from tests.engine.images.odd_images import colour_ramp
from tests.engine.images.tiff_files import tiff
from tests.engine.runs.test_model_folder import CARD

TWELVE = np.linspace(0, 4095, 24 * 32).reshape(24, 32).astype(np.uint16)


def write_odd_set(folder: Path) -> list[str]:
    large = Image.fromarray(colour_ramp()).resize((400, 300))
    images = {f"usual_{index}.png": large.point(lambda level, index=index: level // (index + 1)) for index in range(3)}
    images["black.png"] = Image.new("RGB", (400, 300))
    images["almost_white.png"] = Image.fromarray(np.random.default_rng(0).integers(250, 256, (300, 400, 3), np.uint8))
    images["empty.png"] = Image.fromarray(np.dstack([np.asarray(large), np.zeros((300, 400), np.uint8)]))
    images["icon.png"] = large.resize((16, 16))
    images["heights.tif"] = Image.fromarray(np.linspace(-9999, 900, 120_000).reshape(300, 400).astype(np.float32))
    holes = np.linspace(100, 900, 120_000).reshape(300, 400).astype(np.float32)
    holes[0] = -9999
    images["holes.tif"] = Image.fromarray(holes)
    images["scan.tif"] = Image.fromarray(TWELVE).resize((400, 300), Image.Resampling.NEAREST)
    compressed = tiff(np.dstack([TWELVE] * 3), 2, planes=True, compress=True)
    images["dark.tif"] = Image.fromarray(TWELVE // 64).resize((400, 300), Image.Resampling.NEAREST)
    folder.mkdir(parents=True, exist_ok=True)
    for name, image in images.items():
        image.save(folder / name)
    (folder / "planes.tif").write_bytes(compressed)
    return [*images, "planes.tif"]


def said(folder: Path, names: list[str], memory: Path | None, caplog: pytest.LogCaptureFixture) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.INFO):
        checked = check_images(Listing(folder, names), ReadOptions(), memory, 1)
        report(checked, bits_used(checked))
    return [record.getMessage() for record in caplog.records]


def test_each_oddity_is_said_once_with_its_count_and_again_from_memory(tmp_path, caplog, monkeypatch):
    names = write_odd_set(tmp_path / "set")
    lines = said(tmp_path / "set", names, tmp_path / "memory.json", caplog)
    expected = [
        ("2 of 12 images show a single colour", "black.png"),
        ("1 of 12 images have an alpha channel that is 0 everywhere", "empty.png"),
        ("1 of 12 images have values that stand for no data", "holes.tif"),
        ("2 of 12 images hold floats, negative or 32-bit numbers", "heights.tif"),
        ("2 of 12 images are as small as icons: at most 64 pixels", "icon.png"),
        ("3 of 12 images have 16-bit channels: 0 to 4095", "scan.tif"),
        ("1 of 12 images are TIFFs with compressed colour planes: only the upper 8 of 16", "planes.tif"),
        ("1 of 12 images use at most 6 of the 12 bits", "dark.tif"),
    ]
    assert len(lines) == len(expected)
    for line, (start, example) in zip(lines, expected, strict=True):
        assert line.startswith(start)
        assert line.endswith(f"for example {example}")
    monkeypatch.setattr(checking, "decode_image", None)  # nothing is decoded again
    assert said(tmp_path / "set", names, tmp_path / "memory.json", caplog) == lines


def test_usual_images_say_nothing(tmp_path, caplog):
    names = write_odd_set(tmp_path)[:3]
    Image.fromarray(TWELVE * 16).resize((400, 300)).save(tmp_path / "full.tif")
    assert said(tmp_path, [*names, "full.tif"], None, caplog) == []
    small = [f"small_{index}.png" for index in range(4)]
    for index, name in enumerate(small):  # a set of small images is not odd
        Image.fromarray(colour_ramp() // (index + 1)).resize((16, 16)).save(tmp_path / name)
    assert said(tmp_path, small, None, caplog) == []


def test_all_images_of_a_set_are_read_with_the_bits_of_the_set(tmp_path):
    for label in ("a", "b"):
        (tmp_path / "set" / label).mkdir(parents=True)
        for index in range(6):
            dark = TWELVE // (8 if label == "b" else 1) + np.uint16(index)
            Image.fromarray(dark.clip(0, 4095)).save(tmp_path / "set" / label / f"{index}.tif")
    data = Data(source="image_folder", root=str(tmp_path / "set"))

    def load(bits: int | None):
        data.bits = bits
        return load_images(data, Multiclass(), 0, cache_dir=tmp_path / "memory")

    images = load(None)
    assert images.bits == 12
    assert images.read(images.names.index("a/0.tif")).max() == 255
    assert images.read(images.names.index("b/0.tif")).max() == 32  # an eighth
    assert load(16).bits == 16
    assert load(16).read(0).max() == 16


def test_a_run_that_goes_on_reads_with_the_bits_it_began_with(tmp_path, caplog):
    for label in ("a", "b"):
        (tmp_path / "set" / label).mkdir(parents=True)
        for index in range(6):
            Image.fromarray((TWELVE + np.uint16(index + 6 * (label == "a"))).clip(0, 4095)).save(
                tmp_path / "set" / label / f"{index}.png"
            )
    data = Data(source="image_folder", root=str(tmp_path / "set"))
    places = {"cache_dir": tmp_path / "memory"}
    write_csv(tmp_path / "split.csv", *load_images(data, Multiclass(), 0, **places).table())
    Image.fromarray(TWELVE * 16).save(tmp_path / "set/a/new.png")  # not of the run
    Image.fromarray(TWELVE // 64).save(tmp_path / "set/a/dark.png")
    split = tmp_path / "split.csv"
    caplog.clear()
    assert load_images(data, Multiclass(), 0, **places, run_split=split).bits == 12
    assert "almost black" not in caplog.text
    older = [row.rsplit(",", 2)[0] for row in (tmp_path / "split.csv").read_text().splitlines()]
    (tmp_path / "split.csv").write_text("\n".join(older))
    assert (
        load_images(data, Multiclass(), 0, **places, run_split=split).bits == 16
    )  # of a version that divided all images by 257
    other = replace(data, split_file=str(split))
    assert load_images(other, Multiclass(), 0, **places).bits == 12  # another run with its split


@pytest.mark.parametrize(("read_with", "word"), [(8, "what is above is white"), (16, "almost black"), (12, "")])
def test_predict_says_once_that_images_use_other_bits_than_those_of_the_training(tmp_path, caplog, read_with, word):
    paths = [tmp_path / f"{index}.tif" for index in range(3)]
    for path in paths:
        Image.fromarray(TWELVE).save(path)
    files = ImageFiles(paths, replace(CARD, bits=read_with))
    with caplog.at_level(logging.WARNING):
        assert all(isinstance(files[place][1], torch.Tensor) for place in range(3))
    assert [word in record.getMessage() for record in caplog.records] == [True] * bool(word)
