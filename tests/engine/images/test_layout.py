"""What folders mean: splits, classes and what does not belong. Only names count here, so the images are empty files."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

from src.engine.images import scanning
from src.engine.images.folders import list_image_folder, list_images
from src.engine.images.formats import EXTENSIONS
from src.engine.images.layout import split_of
from src.engine.runs.errors import ExitCode, UserError

without_heic = pytest.mark.skipif(".heic" in EXTENSIONS, reason="with the extra heic they are images")


def tree(root: Path, *paths: str) -> Path:
    """Empty files: 'train/cat/3' makes 0.jpg, 1.jpg and 2.jpg there, anything else is a file's path."""
    for path in paths:
        folder, _, last = path.rpartition("/")
        names = [f"{number}.jpg" for number in range(int(last))] if last.isdigit() else [last]
        (root / folder).mkdir(parents=True, exist_ok=True)
        for name in names:
            (root / folder / name).touch()
    return root


def counted(root: Path, layout: str = "auto") -> dict:
    listing = list_image_folder(root, layout)
    return dict(Counter(zip(listing.splits or [None] * len(listing.names), listing.labels, strict=True)))


def refusal(root: Path, layout: str = "auto") -> str:
    with pytest.raises(UserError) as error:
        list_image_folder(root, layout)
    assert error.value.code == ExitCode.DATA
    text = error.value.render()
    assert len(text.splitlines()) <= 13
    return text


@pytest.mark.parametrize(
    ("name", "split"),
    [
        *(
            (word, "train")
            for word in (
                "train",
                "TRAIN",
                "Training",
                "seg_train",
                "train-2019",
                "train2017",
                "my.train",
                "TrainImages",
                "(train)",
            )
        ),
        *((word, "val") for word in ("val", "valid", "Validation", "dev", "images.val", "val_images", "valid 2")),
        *((word, "test") for word in ("test", "testing", "test_images", "seg_test", "Test Set", "test1")),
        *((word, "train") for word in ("trainval", "train_val")),
        *(
            (word, None)
            for word in ("trains", "trainer", "valley", "device", "contest", "testament", "cat", "2019", "-", "")
        ),
    ],
)
def test_words_that_name_a_split(name, split):
    assert split_of(name) == split


def test_splits_by_prefix_and_suffix(tmp_path):
    tree(tmp_path, "seg_train/sea/4", "seg_train/ice/3", "seg_test/sea/2", "seg_test/ice/2")
    assert counted(tmp_path) == {("train", "ice"): 3, ("train", "sea"): 4, ("test", "ice"): 2, ("test", "sea"): 2}


@pytest.mark.parametrize("flat", ["test/5", "test_images/5", "Testing/unknown/5", "val/3"])
def test_unlabelled_images_beside_a_training_folder_are_left_out_and_said(tmp_path, caplog, flat):
    tree(tmp_path, "train/cat/4", "train/dog/3", flat)
    assert counted(tmp_path) == {(None, "cat"): 4, (None, "dog"): 3}
    assert f"{tmp_path / flat.split('/')[0]} is left out" in caplog.text
    assert f"images={tmp_path / flat.split('/')[0]}" in caplog.text


def test_an_unlabelled_test_folder_beside_two_splits(tmp_path, caplog):
    tree(tmp_path, "train/cat/4", "train/dog/3", "val/cat/1", "val/dog/1", "test/9", "notes/a.txt")
    assert set(counted(tmp_path)) == {("train", "cat"), ("train", "dog"), ("val", "cat"), ("val", "dog")}
    assert "test is left out" in caplog.text
    assert "Beside the splits these folders hold no image: notes" in caplog.text


@pytest.mark.parametrize(
    ("paths", "named", "fixes"),
    [
        (["train/cat/3", "train/dog/3"], "train/ is the only folder", ["data.root={root}/train"]),
        (
            ["data/cat/3", "data/dog/3", "test/cat/3"],
            "test/ and data/",
            ["data.layout=classes", "mv {root}/data {root}/train"],
        ),
        ([".cat/3", ".dog/3"], "2 hidden or system entries left out: 1 .cat, 1 .dog", ["find {root}"]),
        (["test/cat/3", "test/dog/3"], "test/ is the only folder", ["data.root={root}/test"]),
        (["val/cat/3", "test/cat/3"], "no train folder", ["data.root={root}/val", "data.layout=classes"]),
        (["train/9", "test/5"], "hold images, but no class folders", ["data=table", "data.layout=classes"]),
        (["cat/3", "dog/3", "test/5"], "test/ may be a class", ["data.layout=classes", "mv "]),
        (["cat/3", "dog/3", "test-tube/5"], "test-tube/ may be a class", ["data.layout=classes", "mv "]),
        (
            ["train/cat/3", "train/dog/3", "val/cat/1", "val/dog/1", "more/cat/3"],
            "side by side: train/, val/ and more/",
            ["data.layout=classes", "data.layout=splits", "data.root={root}/train"],
        ),
        (
            ["bus/3", "car/3", "train/steam/3", "train/diesel/3"],
            "side by side: train/ and bus/, car/",
            ["data.layout=classes"],
        ),
        (["train/cat/3", "val/cat/3", "validation/cat/2"], "val/, validation/ are all val", ["mv "]),
        (
            ["images/train/cat/3", "images/val/cat/3"],
            "lie in images/",
            ["data.root={root}/images", "data.layout=classes"],
        ),
        (["images/train/cat/3", "images/train/dog/3"], "lie in images/train/", ["data.root={root}/images/train"]),
        (["a/b/train/cat/3", "a/b/val/cat/3"], "lie in a/b/", ["data.root={root}/a/b"]),
        (["images/train2017/3", "images/val2017/3"], "lie in images/, a level deeper", ["data.root={root}/images"]),
        (["archive/cat/3", "archive/dog/3", "__MACOSX/archive/cat/3"], "lie in archive/", ["data.root={root}/archive"]),
        (["cat/train/3", "cat/val/2", "dog/train/3", "dog/val/2"], "inside the class folder cat/", ["cp -r"]),
    ],
)
def test_more_than_one_reading_is_refused_with_the_command_for_each(tmp_path, paths, named, fixes):
    text = refusal(tree(tmp_path, *paths))
    assert named in text
    for fix in fixes:
        assert fix.format(root=tmp_path) in text


@pytest.mark.parametrize(
    ("folders", "named"),
    [
        (("images/cat", "images/dog", "test"), "images/ has folders in it"),
        (("traindata/cat", "traindata/dog", "testdata/cat", "testdata/dog"), "hold the same folders"),
        (("fold1/cat", "fold1/dog", "fold2/cat", "fold2/dog"), "hold the same folders"),
        (("train/train/cat", "train/train/dog", "test/test/cat", "test/test/dog"), "test/test/, train/train/"),
    ],
)
def test_folders_that_remind_of_splits_are_asked_about(tmp_path, folders, named):
    assert named in refusal(tree(tmp_path, *(f"{folder}/3" for folder in folders)))


def test_the_commands_of_a_refusal_work(tmp_path):
    tree(tmp_path, "train/cat/3", "train/dog/3", "val/cat/1", "val/dog/1", "more/2")
    assert set(counted(tmp_path, "classes")) == {(None, "train"), (None, "val"), (None, "more")}
    assert counted(tmp_path, "splits")[("val", "dog")] == 1
    assert counted(tmp_path / "train") == {(None, "cat"): 3, (None, "dog"): 3}
    inside_out = tree(tmp_path / "in out", "cat/train/3", "cat/val/2", "dog/train/3", "dog/val/2")
    with pytest.raises(UserError) as error:
        list_image_folder(inside_out)
    assert os.system(error.value.fix[0]) == 0
    assert counted(tmp_path / "in out-by-split")[("train", "dog")] == 3


def test_a_flat_train_folder_among_classes_is_a_class(tmp_path):
    tree(tmp_path, "bus/3", "car/3", "train/4", "bullet_train/2")
    assert {label for _, label in counted(tmp_path)} == {"bus", "car", "train", "bullet_train"}


SYSTEM = [
    *("@eaDir", "#recycle", "@Recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found", "__MACOSX"),
    *(".ipynb_checkpoints", ".thumbnails", ".Trash-1000", ".AppleDouble", ".git", ".dvc", "__pycache__", ".@__thumb"),
]


def test_words_that_may_be_classes_are_classes(tmp_path):
    tree(tmp_path, "compost/3", "recycled/3", "thumbnails/3")
    assert counted(tmp_path) == {(None, "compost"): 3, (None, "recycled"): 3, (None, "thumbnails"): 3}


def test_folders_and_files_of_other_programs_are_left_out_and_counted(tmp_path, caplog):
    tree(tmp_path, "cat/3", "dog/3", *(f"{name}/1" for name in SYSTEM), *(f"cat/{name}/0.jpg/1" for name in SYSTEM))
    tree(tmp_path, "cat/._0.jpg", "cat/Thumbs.db", "dog/desktop.ini", "dog/.DS_Store", "dog/notes.txt")
    assert counted(tmp_path) == {(None, "cat"): 3, (None, "dog"): 3}
    assert f"{2 * len(SYSTEM) + 4} hidden or system entries left out" in caplog.text
    assert "2 #recycle, 2 $RECYCLE.BIN" in caplog.text
    assert "1 file in" in caplog.text
    caplog.clear()
    assert len(list_images(tmp_path / "cat")) == 3
    assert "hidden or system entries" in caplog.text


def test_a_flat_folder_lies_one_level_too_high(tmp_path):
    tree(tmp_path, "photos/3", "photos/notes.txt")
    text = refusal(tmp_path / "photos")
    assert "3 images lie directly in" in text
    assert "one level too high" in text
    assert "mkdir" in text
    assert "data.root" not in text.partition("data=table")[0]
    tree(tmp_path, "other/3")
    assert f"data.root={tmp_path}   #" in refusal(tmp_path / "photos")


def test_images_beside_the_class_folders_are_counted(tmp_path, caplog):
    tree(tmp_path, "cat/3", "dog/3", "2")
    assert len(list_image_folder(tmp_path).names) == 6
    assert f"Images directly in {tmp_path}, in no class folder, left out: 2" in caplog.text


@without_heic
def test_a_class_full_of_phone_photos_is_never_to_be_removed(tmp_path):
    tree(tmp_path, "cat/3", "my dog/a.HEIC", "my dog/b.heic", "my dog/c.MOV")
    text = refusal(tmp_path)
    assert "my dog holds 2 .heic, 1 .mov (convert .heic to JPEG" in text
    assert 'pip install -e ".[heic]"' in " ".join(text.split())
    assert "ffmpeg" in text
    assert "rm" not in text.replace("format", "").split("trace")[0].split("fix")[1].split()
    assert f"mv '{tmp_path}/my dog'" in text


@without_heic
def test_only_phone_photos(tmp_path):
    assert "2 .heic (convert" in refusal(tree(tmp_path, "cat/a.heic", "dog/b.heic"))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        *(("Cats", "cats"), ("cats", "cats "), ("big  cat", "big cat")),
        *(("caf\u00e9", "cafe\u0301"), ("a\u00a0b", "a b"), ("x", "x\u200b")),
    ],
)
@pytest.mark.parametrize("parts", [("", ""), ("train/", "val/")])
def test_names_that_look_the_same_are_one_mistake_with_both_written_out(tmp_path, first, second, parts):
    tree(tmp_path, f"{parts[0]}{first}/3", f"{parts[1]}{second}/3")
    text = refusal(tmp_path)
    assert "differ only in case, blanks or Unicode form" in text
    assert ascii(first) in text
    assert ascii(second) in text


@pytest.mark.parametrize("read", [list_image_folder, list_images])
def test_a_folder_that_may_not_be_read_is_named(tmp_path, monkeypatch, read):
    """Tests may run as root, whom no permission stops: scandir refuses in its place."""
    tree(tmp_path, "cat/3", "dog/3", "dog/secret/2", "lost+found/1")
    scandir = os.scandir

    def refuse(path):
        if Path(path).name in ("secret", "lost+found"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(scanning.os, "scandir", refuse)
    with pytest.raises(UserError) as error:
        read(tmp_path)
    assert error.value.code == ExitCode.DATA
    assert f"{tmp_path}/dog/secret cannot be read: Permission denied" in error.value.found


def test_links_without_an_end(tmp_path):
    tree(tmp_path, "cat/3", "dog/3")
    (tmp_path / "cat" / "loop").symlink_to("loop")
    (tmp_path / "cat" / "loop.jpg").symlink_to("loop.jpg")
    (tmp_path / "dog" / "up").symlink_to(tmp_path)
    (tmp_path / "dog" / "again").symlink_to(tmp_path / "dog")
    assert counted(tmp_path) == {(None, "cat"): 4, (None, "dog"): 3}  # the check names loop.jpg as not readable


def test_names_that_are_not_utf8(tmp_path, caplog):
    tree(tmp_path, "cat/3", "dog/3")
    (tmp_path / "cat/0.jpg").rename(tmp_path / "cat" / os.fsdecode(b"Stra\xdfe.jpg"))
    (tmp_path / "dog").rename(tmp_path / os.fsdecode(b"H\xfcnde"))
    (tmp_path / os.fsdecode(b"H\xfcnde") / os.fsdecode(b"x.\xfc")).touch()
    assert set(counted(tmp_path)) == {(None, "cat"), (None, os.fsdecode(b"H\xfcnde"))}
    caplog.text.encode()  # can be printed
    assert len(list_images(tmp_path)) == 6
