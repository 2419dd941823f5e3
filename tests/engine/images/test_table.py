"""Tables as spreadsheets and scripts write them: separators, encodings, paths, labels and split words."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from src.engine.images.splits import SplitSettings, choose_split, read_split_file
from src.engine.images.table import list_table, read_csv
from src.engine.runs.errors import UserError
from src.engine.runs.files import write_atomically
from src.tasks.multiclass import Multiclass

IMAGES = ("a/0.jpg", "a/1.jpg", "b/0.jpg")


@pytest.fixture
def root(tmp_path) -> Path:
    for name in IMAGES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def listed(root: Path, content: str | bytes):
    table = root / "labels.csv"
    table.write_bytes(content.encode() if isinstance(content, str) else content)
    return list_table(table, None, Multiclass())


def refused(root: Path, content: str | bytes) -> str:
    with pytest.raises(UserError) as error:
        listed(root, content)
    return error.value.render()


PLAIN = "path,label\na/0.jpg,café\na/1.jpg,café\nb/0.jpg,thé\n"


@pytest.mark.parametrize(
    "content",
    [
        *(PLAIN.replace(",", separator) for separator in ";\t|"),
        *(PLAIN.encode(encoding) for encoding in ("utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252")),
        PLAIN.replace("\n", "\r\n"),
        "\r\n\n" + PLAIN,
        "sep=;\n" + PLAIN.replace(",", ";"),
        PLAIN.replace("path,label", " Path , LABEL"),
        PLAIN.replace("\n", ",,\n"),
        PLAIN.replace("\n", "\n\n,\n"),
        PLAIN.replace(",", ', "').replace("\n", '"\n').replace(', "', ',"'),
        PLAIN.replace("label\n", "label,note\n").replace("é\n", 'é,"two\nlines; with |"\n'),
        PLAIN.replace("a/", "./a/").replace("b/", ".//b///"),
        PLAIN.replace("/", "\\"),
        PLAIN.replace(",café", ", café ").replace(",thé", ",  thé"),
    ],
)
def test_one_table_in_many_forms(root, content):
    listing = listed(root, content)
    assert listing.names == list(IMAGES)
    assert listing.labels == ["café", "café", "thé"]


def test_absolute_paths(root, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "x.jpg"
    elsewhere.touch()
    assert listed(root, f"path,label\n{root}/a/0.jpg,x\n{root}//b/../b/0.jpg,y\n{elsewhere},y\n").names == [
        "a/0.jpg",
        "b/0.jpg",
        str(elsewhere),
    ]


@pytest.mark.parametrize("again", ["./a/0.jpg", "a//0.jpg", "a\\0.jpg", "a/../a/0.jpg", "{root}/a/0.jpg", "a/0.jpg "])
def test_one_image_cannot_have_two_labels(root, again):
    text = refused(root, f"path,label\na/0.jpg,cat\nb/0.jpg,dog\n{again.format(root=root)},dog\n")
    assert "1 images stand twice" in text
    assert "a/0.jpg: lines 2, 4" in text


def test_split_words_follow_the_rule_of_folders(root):
    assert listed(root, "path,label,split\na/0.jpg,x,Training\na/1.jpg,x,dev\nb/0.jpg,y,test_2019\n").splits == [
        "train",
        "val",
        "test",
    ]
    assert "line 3" in refused(root, "path,label,split\na/0.jpg,x,train\na/1.jpg,x,fold1\n")


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"path,label\na/0.jpg,x\n\na/1.jpg,\x81y\n", ("neither UTF-8 nor Windows-1252", "line 4")),
        ("path,label,label\na/0.jpg,x,y\n", ("has 2 columns label",)),
        ("path,label\na/0.jpg,x\na/1.jpg,x,y\n", ("a row with 3 cells", "line 3", "in quotes")),
        ('path,label\na/0.jpg,x\n"a/1.jpg,x\n', ("a row that is no CSV", "line 3")),
        ('path,label,note\n\na/0.jpg,x,"1\n2"\n\na/1.jpg,,\n', ("whose label cannot be used: label is ''", "line 6")),
        ("file;class\na/0.jpg;x\n", ("no column path", "it names file, class")),
        ("", ("no column path", "it names nothing")),
        ("# by hand\npath,label\na/0.jpg,x\n", ("no column path", "it names # by hand")),
        ("\n\r\npath,label\na/0.jpg,\n", ("line 4",)),
        ("path,label\na,x\n", ("line 2: a is a folder",)),
        ("path,label\n,\n\n", ("has no rows",)),
        ("path,label\na/0.jpg,Cat\na/1.jpg,cat\n", ("differ only in case", "'Cat' and 'cat'")),
        ("path,label\na/0.jpg,cat\na/1.jpg, cat\n", ("differ only in", "' cat' and 'cat'")),
        ("path,label\na/0.jpg,caf\u00e9\na/1.jpg,cafe\u0301\n", ("'cafe\\u0301' and 'caf\\xe9'",)),
        ("path,label\nA/0.JPG,x\na/1.jpg,x\n", ("1 of 2 images", "line 2: 'A/0.JPG', while the disk has 'a/0.jpg'")),
        ("path,label\na/0.jpg,x\nnowhere.jpg,x\n", ("line 3: nowhere.jpg", "data.root=photos/")),
        (
            "path,label\na/0,x\n",
            ("line 2: 'a/0', while the disk has 'a/0.jpg'", "write the paths as the files are named"),
        ),
        ("path,label\nC:\\me\\a\\0.jpg,x\n", ("line 2: C:\\me", "write the paths as the files are named")),
        ("path,label\n" + "x" * 5000 + ",y\n", ("1 of 1 images", "line 2: xxx")),
        (b"\xff\xfep\0a", ("cannot be read",)),
    ],
)
def test_mistakes_are_named_with_their_line(root, content, named):
    text = refused(root, content)
    for words in named:
        assert words in text


def test_paths_in_another_unicode_form_are_shown_with_escapes(root):
    (root / "cafe\u0301.jpg").touch()
    assert "'caf\\xe9.jpg', while the disk has 'cafe\\u0301.jpg'" in refused(root, "path,label\ncaf\u00e9.jpg,x\n")
    split = root / "split.csv"
    split.write_text("path,split\ncaf\u00e9.jpg,train\na/0.jpg,val\n")
    with pytest.raises(UserError) as error:
        choose_split(["a/0.jpg", "cafe\u0301.jpg"], ["x", "x"], None, SplitSettings(0, 0.15, 0.15, file=split))
    assert "'caf\\xe9.jpg', while the data has 'cafe\\u0301.jpg'" in error.value.render()


def test_names_that_are_not_utf8_come_back(root):
    """As run_dir.py writes split.csv, and as a table in Windows-1252 or with the raw bytes names the file."""
    name = os.fsdecode(b"Stra\xdfe.jpg")
    (root / name).touch()
    split = root / "split.csv"
    write_atomically(split, lambda file: file.write(b"path,label,split\nStra\xdfe.jpg,x,val\na/0.jpg,x,train\n"))
    assert set(read_split_file(split)) == {name, "a/0.jpg"}
    found = choose_split(["a/0.jpg", name], ["x", "x"], None, SplitSettings(0, 0.15, 0.15, file=split))
    assert found["val"] == [1]
    assert listed(root, b"path,label\nStra\xdfe.jpg,Stra\xdfe\n").names == [name]
    (root / name).rename(root / "Straße.jpg")
    listing = listed(root, b"path,label\nStra\xdfe.jpg,Stra\xdfe\n")
    assert (listing.names, listing.labels) == (["Straße.jpg"], ["Straße"])


def test_a_split_file_follows_the_same_rules(root):
    split = root / "split.csv"
    split.write_text(f"Path;Split;digest\n.\\a\\0.jpg;Training;1\n\n{root}/b/0.jpg;valid;2\n")
    settings = SplitSettings(0, 0.15, 0.15, file=split, root=root)
    assert choose_split(list(IMAGES), ["a", "a", "b"], None, settings) == {"train": [0], "val": [2], "test": []}
    split.write_text("path,split\na/0.jpg,train\na/0.jpg,test\n")
    with pytest.raises(UserError, match=r"a/0.jpg stands twice"):
        read_split_file(split)


def test_lines_are_those_of_the_file(root):
    (root / "x.csv").write_text('path,split\n\n"a\nb",train\n,\nc,val\n')
    assert [line for line, _ in read_csv(root / "x.csv", ("path",))] == [3, 6]
