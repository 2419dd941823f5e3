"""Splits: stratified, stable, given back by a file, and refused where they cannot be trained on."""

from __future__ import annotations

from collections import Counter

import pytest

from src.engine.images.labelled_images import LabelledImages
from src.engine.images.splits import SplitSettings, check_splits, choose_split, stratified_split
from src.engine.runs.errors import UserError


def members(labels, splits, split):
    return Counter(labels[index] for index in splits[split])


def test_the_split_has_a_seed_of_its_own(caplog):
    names, labels = [str(index) for index in range(60)], ["cat", "dog"] * 30

    def split(seed: int, own: int | None, stated: list[str] | None = None) -> dict[str, list[int]]:
        return choose_split(names, labels, stated, SplitSettings(seed, 0.2, 0.2, split_seed=own))

    assert split(0, 1) == split(1, None) == split(2, 1) != split(0, None)
    split(0, 1, ["train", "val"] * 30)
    assert "data.split_seed=1 has no effect: the data states its splits" in caplog.text


def test_every_class_gets_its_share():
    labels = ["a"] * 100 + ["b"] * 20 + ["c"] * 3
    splits = stratified_split(labels, 0, 0.15, 0.15)
    assert members(labels, splits, "val") == {"a": 15, "b": 3, "c": 1}
    assert members(labels, splits, "test") == {"a": 15, "b": 3, "c": 1}
    assert sorted(index for members_ in splits.values() for index in members_) == list(range(123))


def test_the_split_follows_the_seed_and_another_class_does_not_move_it():
    labels = ["a"] * 50 + ["b"] * 50
    assert stratified_split(labels, 0, 0.2, 0.2) == stratified_split(labels, 0, 0.2, 0.2)
    assert stratified_split(labels, 1, 0.2, 0.2) != stratified_split(labels, 0, 0.2, 0.2)
    more = stratified_split([*labels, *["c"] * 50], 0, 0.2, 0.2)
    assert [index for index in more["val"] if index < 100] == stratified_split(labels, 0, 0.2, 0.2)["val"]


def test_no_test_split_where_none_is_asked_for():
    assert stratified_split(["a"] * 10, 0, 0.2, 0.0)["test"] == []


def test_a_split_file_is_followed(tmp_path, caplog):
    file = tmp_path / "split.csv"
    file.write_text("path,label,split\nx/1,x,val\nx/2,x,train\ngone,x,test\n")
    found = choose_split(["x/1", "x/2", "x/3"], ["x"] * 3, None, SplitSettings(0, 0.15, 0.15, file=file))
    assert found == {"train": [1], "val": [0], "test": []}
    assert "1 of 3 images are left out, since" in caplog.text
    assert f"that {file} lists are gone: gone" in caplog.text


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("path\nx/1\n", "no column split"),
        ("path,split\n", "no rows"),
        ("path,split\nx/1,holdout\n", "'holdout' is not a split"),
        ("path,label,split\nx/1,y,val\n", "x/1 is of class x here and of class y"),
        ("path,split\nother,val\n", "none of the 1 images"),
        ("path,split\nx/1,val\n./x/1,train\n", "./x/1 stands twice"),
        ("path,label,split\nx/1,x,train\nz/1,z,train\nz/2,z,val\n", "no image of class z is left, of 2"),
    ],
)
def test_a_wrong_split_file_is_refused(tmp_path, text, named):
    file = tmp_path / "split.csv"
    file.write_text(text)
    with pytest.raises(UserError, match=named.replace("(", r"\(")):
        choose_split(["x/1"], ["x"], None, SplitSettings(0, 0.15, 0.15, file=file))


def test_a_missing_val_split_is_dealt_from_train():
    labels = ["a", "b"] * 20
    found = choose_split(
        [str(i) for i in range(40)], labels, ["train"] * 30 + ["test"] * 10, SplitSettings(0, 0.15, 0.15)
    )
    assert found["test"] == list(range(30, 40))
    assert members(labels, found, "val") == {"a": 2, "b": 2}


@pytest.mark.parametrize(
    ("classes", "labels", "splits", "named"),
    [
        (["a"], [0, 0], {"train": [0], "val": [1], "test": []}, "only one class: a"),
        (["a", "b"], [0, 1, 0], {"train": [0, 1], "val": [2], "test": []}, "class b has no image in the val split"),
        (
            ["a", "b", "c"],
            [0, 1, 2],
            {"train": [0], "val": [1], "test": []},
            "classes b, c have no image in the train",
        ),
        (["a", "b"], [0, 1] * 3, {"train": [0, 1], "val": [2, 3], "test": [4]}, "class b has no image in the test"),
    ],
)
def test_a_class_missing_from_a_split_is_named(classes, labels, splits, named):
    with pytest.raises(UserError, match=named):
        check_splits(LabelledImages(tuple(classes), [], labels, splits, read=None), "photos")
