"""Data that cannot be trained on: the real command says what is wrong, by name."""

from __future__ import annotations

import shutil
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torchvision
from PIL import Image

from src.config import Data
from src.data.sources import load_images
from src.engine.runs.errors import UserError
from src.tasks.multiclass import Multiclass
from tests.conftest import check_error, write_images

FOLDER = (
    "data=image_folder",
    "data.root=photos",
    "model.backbone=resnet18",
    "model.weights=none",
    "data.image_size=32",
)


def parts(root: Path, **classes: dict[str, int]) -> None:
    for seed, (part, counts) in enumerate(classes.items()):
        write_images(root / part, counts, seed=seed)


def one_class(root: Path) -> None:
    write_images(root, {"cats": 5})


def empty_class(root: Path) -> None:
    write_images(root, {"cats": 5, "dogs": 5})
    (root / "birds").mkdir()


def missing_from_val(root: Path) -> None:
    parts(root, train={"cats": 4, "dogs": 4}, val={"cats": 3})


def too_few_to_split(root: Path) -> None:
    write_images(root, {"cats": 9, "dogs": 1})


def leak(root: Path) -> None:
    parts(root, train={"cats": 4, "dogs": 4}, val={"cats": 3, "dogs": 3})
    shutil.copy(root / "train/cats/001.png", root / "val/cats/copied.png")


def no_images(root: Path) -> None:
    (root / "cats").mkdir(parents=True)
    (root / "cats" / "notes.txt").write_text("none here")


CASES = [
    (one_class, 65, ("only one class: cats",)),
    (empty_class, 65, ("birds",)),
    (missing_from_val, 65, ("dogs has no image in the val split",)),
    (too_few_to_split, 65, ("dogs has no image in the val split",)),
    (leak, 65, ("train/cats/001.png (train)", "val/cats/copied.png (val)")),
    (no_images, 65, ("no image was found in photos",)),
]


@pytest.mark.parametrize(("make", "code", "named"), CASES, ids=[case[0].__name__ for case in CASES])
def test_a_folder_that_cannot_be_trained_on(command, tmp_path, make, code, named):
    make(tmp_path / "photos")
    check_error(command("train", *FOLDER), code, *named)


def test_settings_that_the_data_contradicts(command, tmp_path):
    write_images(tmp_path / "photos", {"cats": 5, "dogs": 5, "emus": 5})
    check_error(
        command("train", *FOLDER, "model.num_classes=4"),
        65,
        "model.num_classes=4, but the data has 3 classes",
        "cats, dogs, emus",
    )
    check_error(command("train", *FOLDER, "task=binary"), 65, "task=binary, but the data has 3 classes")
    check_error(command("train", *FOLDER, "freeze.phases={0:[head],1:[layer9]}"), 64, "'layer9'", "layer4")
    check_error(command("train", *FOLDER, "model.backbone=resnet19"), 64, "resnet19", "resnet18")
    check_error(command("train", *FOLDER, "callbacks.extra=[{_target_: torch.load}]"), 64, "torch.load")


def test_a_set_that_cannot_be_downloaded(command):
    done = command("train", "data=torchvision", "data.name=CIFAR10", "model.weights=none")
    check_error(done, 69, "CIFAR10 is not in data and could not be downloaded")
    check_error(command("train", "data=torchvision", "data.name=cifar11"), 64, "did you mean CIFAR1")


def load(tmp_path: Path, **settings):
    return load_images(Data(**settings), Multiclass(), 0, cache_dir=tmp_path / "memory")


def test_sub_folders_train_val_and_test_are_used(tmp_path):
    parts(tmp_path / "p", train={"b": 4, "a": 5}, valid={"a": 2, "b": 2}, test={"a": 1, "b": 2})
    images = load(tmp_path, source="image_folder", root=str(tmp_path / "p"))
    assert images.classes == ("a", "b")
    assert {split: images.counts(split) for split in images.splits} == {
        "train": [5, 4],
        "val": [2, 2],
        "test": [1, 2],
    }


def test_a_class_may_be_called_test(tmp_path):
    write_images(tmp_path / "p", {"test": 6, "other": 6})
    assert load(tmp_path, source="image_folder", root=str(tmp_path / "p")).classes == ("other", "test")


def test_a_table_with_and_without_splits(tmp_path):
    write_images(tmp_path / "p", {"a": 6, "b": 6})
    rows = [f"{name}/{index:03d}.png,{name}" for name in "ab" for index in range(6)]
    table = tmp_path / "p" / "labels.csv"
    table.write_text("path,label\n" + "\n".join(rows) + "\n")
    assert len(load(tmp_path, source="table", table=str(table)).splits["val"]) == 2
    words = ["train", "train", "train", "val", "val", "test"] * 2
    table.write_text(
        "path,label,split\n" + "\n".join(f"{row},{word}" for row, word in zip(rows, words, strict=True)) + "\n"
    )
    images = load(tmp_path, source="table", table=str(table))
    assert {split: len(members) for split, members in images.splits.items()} == {"train": 6, "val": 4, "test": 2}
    elsewhere = tmp_path / "elsewhere.csv"
    shutil.move(table, elsewhere)
    assert len(load(tmp_path, source="table", table=str(elsewhere), root=str(tmp_path / "p")).names) == 12


def test_the_split_of_a_run_can_be_given_back(tmp_path):
    root = write_images(tmp_path / "p", {"a": 10, "b": 10})
    first = load(tmp_path, source="image_folder", root=str(root))
    from src.engine.runs.files import write_csv

    write_csv(tmp_path / "split.csv", ("path", "label", "split"), first.rows())
    write_images(root, {"a": 12, "b": 12})  # two new ones of each, which another split would mix in
    again = load(tmp_path, source="image_folder", root=str(root), split_file=str(tmp_path / "split.csv"))
    assert again.rows() == first.rows()


def write_mnist(root: Path, counts: dict[str, int]) -> None:
    """Files in MNIST's own format (idx: magic number, sizes, bytes), where torchvision looks for them."""
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for part, count in counts.items():
        digits = (np.arange(count) % 10).astype(np.uint8)
        pixels = np.repeat(digits, 28 * 28) * 20
        (folder / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, count, 28, 28) + pixels.tobytes())
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, count) + digits.tobytes())


def test_a_torchvision_set_that_is_there_is_used_without_a_network(command, tmp_path):
    write_mnist(tmp_path / "sets", {"train": 80, "t10k": 30})
    words = ("data=torchvision", "data.name=MNIST", "data.root=sets", *FOLDER[2:], "debug=true", "logger=csv", "name=x")
    done = command("train", *words)
    assert done.code == 0, done.text
    assert "images    110 in 10 classes: 70 train, 10 val, 30 test" in done.out
    assert command("evaluate", "run=runs/x").code == 0


def test_the_images_of_a_torchvision_set_come_out_right(tmp_path):
    write_mnist(tmp_path / "sets", {"train": 80, "t10k": 30})
    images = load(tmp_path, source="torchvision", name="MNIST", root=str(tmp_path / "sets"))
    place = images.names.index("MNIST/test/000003")
    assert images.read(place).shape == (3, 28, 28)
    assert images.read(place).unique().tolist() == [60]
    assert images.classes[images.labels[place]].startswith("3")


def test_a_package_that_torchvision_needs_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)  # as if it were not installed
    with pytest.raises(UserError, match="PCAM with the package h5py") as error:
        load(tmp_path, source="torchvision", name="PCAM", root=str(tmp_path))
    assert error.value.fix == ["pip install h5py"]


def test_a_set_that_torchvision_no_longer_downloads_is_read_where_it_is(tmp_path, monkeypatch):
    """StanfordCars raises on download=True before it looks at what is there."""
    asked = []

    def cars(root, split, download):
        asked.append(download)
        if download:
            raise ValueError("The original URL is broken")
        if not (Path(root) / "stanford_cars").is_dir():
            raise RuntimeError("Dataset not found")
        return [(Image.new("RGB", (8, 8)), number % 2) for number in range(20)]

    monkeypatch.setattr(torchvision.datasets, "StanfordCars", cars)
    with pytest.raises(UserError, match="could not be downloaded") as error:
        load(tmp_path, source="torchvision", name="StanfordCars", root=str(tmp_path / "my sets"))
    assert asked == [False, True]
    assert f"'{tmp_path}/my sets'" in error.value.fix[1]
    (tmp_path / "my sets/stanford_cars").mkdir(parents=True)
    assert len(load(tmp_path, source="torchvision", name="StanfordCars", root=str(tmp_path / "my sets")).names) == 40
