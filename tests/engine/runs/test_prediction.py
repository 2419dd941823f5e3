"""What predict does before its first image, and the table that it shows."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from src.engine.images.folders import list_images
from src.engine.runs.errors import UserError
from src.engine.runs.prediction import check_out, show
from src.tasks.multiclass import Multiclass


def test_the_folder_of_out_is_made_and_tried(tmp_path):
    assert check_out(tmp_path / "a b/c/p.csv") is False
    assert (tmp_path / "a b/c").is_dir()
    with pytest.raises(UserError, match="is a folder"):
        check_out(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be made or written to") as caught:
        check_out(tmp_path / "file/p.csv")
    assert caught.value.code == 73


def test_only_an_earlier_prediction_is_replaced(tmp_path):
    file = tmp_path / "p.csv"
    file.write_text("path,class,probability,class_1,error\n")
    assert check_out(file) is True
    file.write_text("image,label\n")
    with pytest.raises(UserError, match="was not written by"):
        check_out(file)


def test_the_table_keeps_the_end_of_paths_and_no_markup(caplog, monkeypatch):
    monkeypatch.setenv("COLUMNS", "70")
    caplog.set_level("INFO")
    path = f"/photos/{'deep/' * 30}[red]猫\x1b[31m.png"
    broken = ["/photos/a.png", "", "", "", "", "", "", "/photos/a.png: empty file"]
    names = ["[/]", "b"]
    header = ["path", *Multiclass().header(names), "error"]
    show([[path, "[/]", "0.963805", "[/]", "0.963805", "b", "0.036195", ""], broken], header, Multiclass(), names)
    header, first, second = caplog.messages
    assert header.split() == ["path", "class", "probability", "next", "1"]
    assert "/[red]猫\\x1b[31m.png  [/]" in first
    assert "0.964" in first
    assert second.endswith("empty file")
    assert len(first) < 80


def test_other_images_have_a_file_of_their_own(tmp_path):
    from src.engine.runs.evaluation import _name_of

    def name(**changes: str) -> tuple[str, bool]:
        changes = {key.replace("_", ".", 1): value for key, value in changes.items()}
        changed = [f"{key}={value}" for key, value in changes.items()]
        found = _name_of(tmp_path, "evaluation_test", changes, changed)
        (tmp_path / f"{found[0]}.json").write_text(f'{{"changed": {str(changed).replace(chr(39), chr(34))}}}')
        return found

    assert name() == ("evaluation_test", False)
    assert name(data_batch_size="4") == ("evaluation_test", True)
    assert name(data_num_images="30") == ("evaluation_test_num_images_30", False)
    assert name(data_root="a/new photos/") == ("evaluation_test_new_photos", False)
    assert name(data_root="b/new photos") == ("evaluation_test_new_photos-2", False)
    assert name(data_root="b/new photos") == ("evaluation_test_new_photos-2", True)


def test_images_that_are_no_folder_and_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    for path in (tmp_path / "pipe.jpg", Path(os.devnull)):
        with pytest.raises(UserError, match="is neither a folder nor a file") as caught:
            list_images(path)
        assert caught.value.code == 65
