"""src.embed: the features of images in a file."""

from __future__ import annotations

import csv

import numpy as np
import pytest
import torch

from src.engine.runs.trained_model import TrainedModel
from src.models.building import rebuild
from tests.conftest import SMALL, check_error, write_images


@pytest.fixture
def photos(command, tmp_path):
    """With a model in runs/x."""
    write_images(tmp_path / "photos", {"apple": 6, "pear": 5})
    words = (
        "data=image_folder",
        "data.root=photos",
        "data.image_size=32",
        "data.val_fraction=0.2",
        "trainer.max_steps=1",
    )
    assert command("train", *words, *SMALL[2:], "name=x").code == 0
    return tmp_path / "photos"


def test_features_are_what_the_models_head_takes(command, tmp_path, photos):
    (photos / "apple/broken.png").write_bytes(b"no image")
    done = command("embed", "run=runs/x", "images=photos", "batch_size=4", "num_workers=1")
    assert done.code == 0, done.text
    assert "broken.png" in done.text
    assert "1 files that cannot be read are left out" in done.out
    with np.load(tmp_path / "features.npz") as file:  # allow_pickle is off
        paths, features = file["paths"].tolist(), torch.tensor(file["features"])
    assert len(paths) == 11
    assert paths == sorted(paths)
    model = TrainedModel.load(tmp_path / "runs/x/model", rebuild)
    images = torch.stack([model.read(tmp_path / path) for path in paths])
    torch.testing.assert_close(model.network.head(features), model.logits(images), atol=1e-4, rtol=1e-4)

    assert command("embed", "model=runs/x/model", "images=photos", "out=table/f.csv").code == 0
    with (tmp_path / "table/f.csv").open(newline="") as lines:
        header, *rows = csv.reader(lines)
    assert header[:2] == ["path", "feature_0"]
    assert [row[0] for row in rows] == paths
    assert np.array([row[1:] for row in rows], dtype=np.float32) == pytest.approx(features.numpy(), abs=1e-5)
    assert command("embed", "run=runs/x", "images=photos", "out=table/f.csv").code == 0  # its own file is replaced
    assert command("embed", "run=runs/x", "images=photos").code == 0


def test_what_cannot_be_written_is_said_before_the_first_image(command, tmp_path, photos):
    for name in ("mine.npz", "mine.csv"):
        (tmp_path / name).write_bytes(b"somebody's")
        check_error(
            command("embed", "run=runs/x", "images=photos", f"out={name}"), 73, name, "not written by src.embed"
        )
        assert (tmp_path / name).read_bytes() == b"somebody's"
    check_error(command("embed", "run=runs/x", "images=photos", "out=f.txt"), 73, "f.txt", ".npz")
    (tmp_path / "folder.npz").mkdir()
    check_error(command("embed", "run=runs/x", "images=photos", "out=folder.npz"), 73, "is a folder")
    check_error(command("embed", "run=runs/x", "images=nowhere"), 66, "nowhere")


def test_a_folder_without_a_readable_image(command, tmp_path, photos):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/a.png").write_bytes(b"no image")
    check_error(command("embed", "run=runs/x", "images=broken"), 65, "none of the 1 images")
    assert not (tmp_path / "features.npz").exists()
