"""evaluate on images that the run has learned from: known again by their bytes, said, and measured without."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest

from src.config import Data
from src.data.sources import load_images, load_unsplit
from src.engine.images.copies import seen_in_training
from src.engine.runs.files import write_csv
from src.tasks.multiclass import Multiclass
from tests.conftest import SMALL, write_images


@pytest.fixture
def run(tmp_path) -> Path:
    """A run's folder with nothing but its split.csv, of the images in photos/."""
    write_images(tmp_path / "photos", {"cats": 12, "dogs": 12}, size=8)
    data = Data(source="image_folder", root=str(tmp_path / "photos"))
    images = load_images(data, Multiclass(), 0, cache_dir=tmp_path / "runs/.checked")
    (tmp_path / "runs/x").mkdir()
    write_csv(tmp_path / "runs/x/split.csv", *images.table())
    return tmp_path / "runs/x"


def counts(run: Path, root: Path, split: str = "test") -> dict[str, int]:
    photos, runs = run.parent.parent / "photos", run.parent
    config = {"data": {"source": "image_folder", "root": str(photos)}, "runs_dir": str(runs)}
    images = load_unsplit(Data(source="image_folder", root=str(root)), Multiclass(), cache_dir=runs / "other")
    return {part: len(members) for part, members in seen_in_training(run, config, images, split).items()}


def test_files_are_known_again_under_other_names_and_in_other_places(run, tmp_path):
    (tmp_path / "photos").rename(tmp_path / "moved")
    (tmp_path / "moved/cats/000.png").rename(tmp_path / "moved/cats/renamed.png")
    write_images(tmp_path / "moved", {"cats": 3, "dogs": 0, "emus": 3}, size=8, seed=7)  # 3 others of the same names
    assert counts(run, write_images(tmp_path / "new", {"cats": 12, "dogs": 12}, size=8, seed=8)) == {
        "train": 0,
        "val": 0,
    }
    rows = list(csv.DictReader((run / "split.csv").open()))
    gone = {f"cats/{number:03d}.png" for number in range(3)} - {"cats/000.png"}
    expected = {
        part: sum(row["split"] == part and row["path"] not in gone for row in rows) for part in ("train", "val")
    }
    assert counts(run, tmp_path / "moved") == expected
    assert len(rows) == 24


@pytest.mark.parametrize("moved", [False, True])
def test_an_older_run_without_digests(run, tmp_path, moved, caplog):
    """They are made from the files where these are still there, or taken from the memory of the check."""
    rows = [row.rsplit(",", 2)[0] for row in (run / "split.csv").read_text().splitlines()]
    (run / "split.csv").write_text("\n".join(rows) + "\n")
    shutil.copytree(tmp_path / "photos", tmp_path / "copy")
    if moved:
        shutil.rmtree(tmp_path / "photos")
    assert counts(run, tmp_path / "copy") == {"train": 16, "val": 4}
    if moved:
        shutil.rmtree(run.parent / ".checked")
        assert counts(run, tmp_path / "copy") == {"train": 0, "val": 0}
        assert "24 of its 24 images are gone" in caplog.text


def test_evaluate_says_it_and_measures_the_others(command, tmp_path):
    write_images(tmp_path / "photos", {"cats": 10, "dogs": 10})
    words = [word for word in SMALL if not word.startswith("data.")]
    folder = (
        "data=image_folder",
        "data.root=photos",
        "data.image_size=32",
        "data.num_workers=0",
        "debug=true",
        "name=x",
    )
    assert command("train", *words, *folder).code == 0
    write_images(tmp_path / "new", {"cats": 6, "dogs": 6}, seed=9)
    rows = list(csv.DictReader((tmp_path / "runs/x/split.csv").open()))
    trained_on = next(row["path"] for row in rows if row["split"] == "train")
    shutil.copy(tmp_path / "photos" / trained_on, tmp_path / "new" / Path(trained_on).parent / "copied.png")
    (tmp_path / "photos").rename(tmp_path / "moved")
    done = command("evaluate", "run=runs/x", "data.root=new", "out=e")
    assert done.code == 0, done.text
    written = json.loads((tmp_path / "e/evaluation.json").read_text())
    assert "1 of these 13 images are not new to the run" in done.text
    assert "without them: 12 test images" in done.text
    assert written["seen_in_training"] == {"train": 1, "val": 0}
    assert written["unseen"]["images"] == 12
    assert "test/acc" in written["unseen"]["metrics"]
