"""Files that are equal byte for byte: dealt together, refused with two labels or in two splits, counted in one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from src.config import Data
from src.data.sources import load_images
from src.engine.images.labelled_images import LabelledImages
from src.engine.images.splits import stratified_split
from src.engine.runs.errors import UserError
from src.tasks.multiclass import Multiclass
from tests.conftest import write_images


def load(root: Path, seed: int = 0, run_split: Path | None = None, **settings) -> LabelledImages:
    data = Data(**({"source": "image_folder", "root": str(root)} | settings))
    places = {"cache_dir": root.parent / "memory", "bad_list": root.parent / "run" / "bad_images.txt"}
    return load_images(data, Multiclass(), seed, **places, run_split=run_split)


def copy(root: Path, source: str, *targets: str) -> None:
    for target in targets:
        shutil.copy(root / source, root / target)


@pytest.mark.parametrize("seed", range(6))
def test_copies_go_to_one_split_at_every_seed(tmp_path, seed, caplog):
    root = write_images(tmp_path / "p", {"cats": 10, "dogs": 10}, size=8)
    for number in range(6):
        copy(root, f"cats/{number:03d}.png", f"cats/copy_{number}.png", f"cats/again_{number}.png")
    images = load(root, seed)
    split_of = {name: split for name, _, split in images.rows()}
    for number in range(6):
        assert len({split_of[f"cats/{name}"] for name in (f"{number:03d}.png", f"copy_{number}.png")}) == 1
    assert len(images.splits["val"]) >= 2
    assert "18 images are copies, byte for byte, of 6 different ones" in caplog.text


def test_a_set_without_copies_is_split_as_before():
    labels = ["a"] * 20 + ["b"] * 7
    assert stratified_split(labels, 3, 0.2, 0.2, [str(i) for i in range(27)]) == stratified_split(labels, 3, 0.2, 0.2)
    # as the version gave it that did not look for copies
    assert stratified_split(labels, 0, 0.2, 0.2)["val"] == [0, 11, 14, 18, 26]


def test_copies_are_dealt_together_where_val_is_taken_from_train(tmp_path):
    write_images(tmp_path / "p/train", {"cats": 9, "dogs": 9}, size=8)
    root = write_images(tmp_path / "p/test", {"cats": 2, "dogs": 2}, size=8, seed=1).parent
    for number in range(9):
        copy(root, f"train/cats/{number:03d}.png", f"train/cats/copy_{number}.png")
    assert len({name for name, label, split in load(root).rows() if (label, split) == ("cats", "val")}) == 2


@pytest.mark.parametrize("seed", range(4))
def test_two_labels_are_refused_at_every_seed_and_listed(tmp_path, seed):
    root = write_images(tmp_path / "p", {"cats": 12, "dogs": 12}, size=8)
    for number in range(7):
        copy(root, f"cats/{number:03d}.png", f"dogs/copy {number}.png")
    with pytest.raises(UserError, match="7 images have two labels") as error:
        load(root, seed)
    text = error.value.render()
    assert "cats/000.png (cats) = dogs/copy 0.png (dogs)" in text
    assert "and 3 more" in text
    assert f"rm '{root}/dogs/copy 0.png'" in text
    listed = (tmp_path / "run/copies.txt").read_text()
    assert listed.count("\n\n") == 6
    assert "dogs\tdogs/copy 6.png\n" in listed
    assert str(tmp_path / "run/copies.txt") in text


def test_copies_in_two_given_splits_are_listed(tmp_path):
    write_images(tmp_path / "p/train", {"cats": 6, "dogs": 4}, size=8)
    root = write_images(tmp_path / "p/val", {"cats": 4, "dogs": 4}, size=8, seed=1).parent
    for number in range(6):
        copy(root, f"train/cats/{number:03d}.png", f"val/cats/copy_{number}.png")
    with pytest.raises(UserError, match="6 images are in more than one split") as error:
        load(root)
    assert "and 2 more" in error.value.render()
    assert "val\tval/cats/copy_5.png\n" in (tmp_path / "run/copies.txt").read_text()


def test_a_run_that_began_before_these_rules_goes_on(tmp_path, caplog):
    """Its split.csv says which images it has: two labels, or a folder that has two readings now, do not stop it."""
    root = write_images(tmp_path / "p", {"cats": 6, "dogs": 6, "test": 6}, size=8)
    copy(root, "cats/000.png", "dogs/copy.png")
    rows = [(f"{name}/{number:03d}.png", name) for name in ("cats", "dogs", "test") for number in range(6)]
    lines = [
        f"{path},{label},{'val' if '05' in path else 'train'}" for path, label in [*rows, ("dogs/copy.png", "dogs")]
    ]
    split = tmp_path / "split.csv"
    split.write_text("\n".join(["path,label,split", *lines]) + "\n")
    images = load(root, run_split=split)
    assert images.classes == ("cats", "dogs", "test")
    assert len(images.names) == 19
    assert "split.csv says which images it has" in caplog.text
    with pytest.raises(UserError, match="test/ may be a class"):
        load(root, split_file=str(split))


def test_a_link_to_a_class_is_not_answered_with_removing_its_files(tmp_path):
    root = write_images(tmp_path / "p", {"cats": 4, "dogs": 4}, size=8)
    (root / "felines").symlink_to(root / "cats")
    with pytest.raises(UserError, match="4 images have two labels") as error:
        load(root)
    assert error.value.fix[0] == f"ls -ld {root}/cats {root}/felines   # a link: remove the link"


def test_the_files_of_a_table_are_named_where_they_lie(tmp_path):
    root = write_images(tmp_path / "photos", {"cats": 4, "dogs": 4}, size=8)
    copy(root, "cats/000.png", "dogs/000.png")
    (tmp_path / "tables").mkdir()
    table = tmp_path / "tables/labels.csv"
    table.write_text("path,label\n" + "".join(f"{c}/{i:03d}.png,{c}\n" for c in ("cats", "dogs") for i in range(4)))
    with pytest.raises(UserError, match="1 image has two labels") as error:
        load(root, source="table", table=str(table))
    assert error.value.fix[0].startswith(f"rm {root}/dogs/000.png ")
