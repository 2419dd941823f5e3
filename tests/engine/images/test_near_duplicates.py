"""Near-duplicates are found where they were planted, and nowhere else."""

from __future__ import annotations

import csv
import io

import numpy as np
import pytest
from PIL import Image, ImageEnhance
from sklearn.datasets import load_digits

from src.config import Data
from src.data.sources import load_images
from src.engine.images.near_duplicates import look_of, near_groups, near_pairs
from src.engine.runs.errors import UserError
from src.tasks.multiclass import Multiclass

SIZE = (120, 90)


def photo(seed: int) -> Image.Image:
    """Soft colour fields of all sizes, as a photo has them."""
    rng, layers = np.random.default_rng(seed), np.zeros((SIZE[1], SIZE[0], 3))
    for fields in (2, 4, 8, 16):
        layer = Image.fromarray(rng.integers(0, 256, (fields, fields, 3), dtype=np.uint8))
        layers += np.asarray(layer.resize(SIZE, Image.Resampling.BICUBIC), dtype=float) / 4
    return Image.fromarray(layers.astype(np.uint8))


def saved(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


CHANGES = {
    "saved again": lambda image: saved(image, 40),
    "smaller": lambda image: saved(image.resize((50, 37)), 80),
    "cropped": lambda image: image.crop((1, 1, SIZE[0] - 1, SIZE[1] - 1)),
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.1),
}


def test_changed_copies_are_found_among_photos_and_nothing_else():
    images = [photo(seed) for seed in range(150)]
    copies = [(seed, change(images[seed])) for seed in range(12) for change in CHANGES.values()]
    found = near_pairs([look_of(image) for image in (*images, *(copy for _, copy in copies))])
    assert {(seed, 150 + place) for place, (seed, _) in enumerate(copies)} <= {*found}
    source = [*range(150), *(seed for seed, _ in copies)]
    assert all(source[one] == source[other] for one, other in found)
    groups = near_groups([str(place) for place in range(len(source))], found)
    assert groups == [str(seed) for seed in source]


def test_images_that_are_alike_anyway_are_no_near_duplicates():
    """Digits of a class look alike; a plain image looks like every other plain one."""
    digits = [Image.fromarray((image * 15).astype(np.uint8)).convert("RGB") for image in load_digits().images[:1000]]
    assert len({place for pair in near_pairs([look_of(image) for image in digits]) for place in pair}) < 100
    plain = [look_of(Image.new("RGB", SIZE, (level, level, level))) for level in (0, 128, 255)]
    assert plain == [""] * 3
    assert near_pairs(plain) == []


@pytest.fixture
def folder(tmp_path):
    """Two classes of 20 photos; each of the first six has a copy in a file of its own."""
    for seed in range(40):
        path = tmp_path / "photos" / ("cat" if seed % 2 else "dog") / f"{seed:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        photo(seed).save(path)
        if seed < 6:
            photo(seed).save(path.with_name(f"{seed}_copy.jpg"), quality=70)
    return tmp_path / "photos"


def load(folder, seed=0, **data):
    (folder.parent / "run").mkdir(exist_ok=True)
    places = {"cache_dir": folder.parent / "memory", "bad_list": folder.parent / "run/bad_images.txt"}
    return load_images(Data(source="image_folder", root=str(folder), **data), Multiclass(), seed, **places)


def test_a_run_lists_them_says_where_they_leak_and_keeps_them_together(folder, caplog):
    caplog.set_level("INFO")
    for seed in range(5):
        if "in two splits" not in caplog.text:
            load(folder, seed)
    assert "6 pairs of images look the same" in caplog.text
    assert "data.group=near_duplicates keeps them together" in caplog.text
    with (folder.parent / "run/near_duplicates.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    assert all(row["label"] == row["other label"] for row in rows)
    caplog.clear()
    for seed in range(5):
        images = load(folder, seed, group="near_duplicates")
        split_of = {images.names[index]: split for split, members in images.splits.items() for index in members}
        assert all(split_of[row["path"]] == split_of[row["other"]] for row in rows)
    assert "40 for 46 images, by near_duplicates" in caplog.text
    assert "in two splits" not in caplog.text


def test_a_near_duplicate_in_another_given_split_is_named(folder):
    for part in ("train", "val"):
        for name in ("cat", "dog"):
            (folder / part / name).mkdir(parents=True)
    for path in sorted(folder.glob("[cd]*/*.*")):
        path.rename(folder / ("val" if "copy" in path.name else "train") / path.parent.name / path.name)
    for name in ("cat", "dog"):
        (folder / name).rmdir()
    with pytest.raises(UserError, match=r"6 of 40 groups are in more than one split: train/cat/01.png \(train, val\)"):
        load(folder, group="near_duplicates")
