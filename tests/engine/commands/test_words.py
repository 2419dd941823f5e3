"""The words of evaluate, predict and export: text is text, numbers and choices are checked, a fix is the user's command."""

from __future__ import annotations

import importlib
import shlex

import pytest

from src.engine.commands.words import read_words
from src.engine.runs.errors import UserError

PREDICT, EMBED, EVALUATE, EXPORT = (
    ("src.predict", "images", False),
    ("src.embed", "images", False),
    ("src.evaluate", "run", True),
    ("src.export", "run", False),
)


@pytest.fixture
def read(monkeypatch):
    """read(program, *words) -> (Words, changes), as if the words had been typed."""

    def as_typed(program, *words):
        name, needed, data = program
        monkeypatch.setenv("TRAIN_COMMAND", shlex.join(["python", "-m", name, *words]))
        return read_words(importlib.import_module(name).Words, words, name, "usage", needed, data)

    return as_typed


TEXTS = [
    "IMG #2.jpg", "a: b", "p {1}: x", "*.jpg", "[1] a.jpg", "@x", "!x", "Bücher/ü.png", "a=b", "'q'", '"q"', "%d",
    "null", "1e3", "true", "고양이", "${oc.env:HOME}", "&a", "- x", "a\\b", " blank ",
]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_taken_as_the_shell_gave_it(read, text):
    words, _ = read(PREDICT, f"run={text}", f"images={text}", f"out={text}")
    assert (words.run, words.images, words.out) == (text, text, text)
    _, changes = read(EVALUATE, "run=x", f"data.root={text}")
    assert changes == {"data.root": text}


def test_a_tilde_is_expanded(read, monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    assert read(PREDICT, "run=~/r", "images=~/p")[0].images == "/somewhere/p"
    assert read(EVALUATE, "run=x", "data.root=~/p")[1] == {"data.root": "/somewhere/p"}


def test_numbers_and_lists_have_their_types(read):
    words, _ = read(PREDICT, "run=x", "images=y", "batch_size=7", "num_workers=null")
    assert (words.batch_size, words.num_workers) == (7, None)
    _, changes = read(EVALUATE, "run=x", "data.batch_size=auto", "data.background=[0,0,0]", "data.max_megapixels=2")
    assert changes == {"data.batch_size": "auto", "data.background": [0, 0, 0], "data.max_megapixels": 2.0}


MISTAKES = [  # the program, its words, what the answer names, the corrected words
    (PREDICT, "run=x images=y batch_size=big", "batch_size=big", "run=x images=y batch_size=64"),
    (PREDICT, "run=x images=y batch_size=0", "from 1 to", "run=x images=y batch_size=64"),
    (PREDICT, "run=x images=y batch_size=2.5", "whole number", "run=x images=y batch_size=64"),
    (PREDICT, "run=x num_workers=-1 images=y", "from 0 to 256", "run=x num_workers=0 images=y"),
    (PREDICT, "run=x images=", "images= is empty", "run=x"),
    (PREDICT, "run=x images=y accelerator=cuda", "auto, cpu, gpu, mps", "run=x images=y accelerator=gpu"),
    (PREDICT, "run=x image=y", "did you mean images?", "run=x images=y"),
    (PREDICT, "run=x images=y data.batch_size=4", "did you mean batch_size?", "run=x images=y batch_size=4"),
    (PREDICT, "run=x images=y images=z", "given twice", "run=x images=z"),
    (PREDICT, "--run x --images y", "'--run x' cannot be read", "run=x images=y"),
    (PREDICT, "run=x --images=y", "without dashes", "run=x images=y"),
    (PREDICT, "run=x photos/", "cannot be read", "run=x images=photos/"),
    (EVALUATE, "runs/x", "cannot be read", "run=runs/x"),
    (EVALUATE, "run=x split=validation", "did you mean split=val?", "run=x split=val"),
    (EVALUATE, "run=x split=tset", "did you mean split=test?", "run=x split=test"),
    (EVALUATE, "run=x batch_size=4", "did you mean data.batch_size?", "run=x data.batch_size=4"),
    (EVALUATE, "run=x data.num_workers=abc", "data.num_workers=abc", "run=x data.num_workers=2"),
    (EVALUATE, "run=x data.max_megapixels=many", "a number", "run=x data.max_megapixels=100.0"),
    (EVALUATE, "run=x data.augment=none", "has no effect", "run=x"),
    (EVALUATE, "run=x data.image_size=64 split=val", "has no effect", "run=x split=val"),
    (EVALUATE, "run=x data.on_bad_image=ignore", "error, skip", "run=x data.on_bad_image=error"),
    (EVALUATE, "modell=x/model", "did you mean model?", "model=x/model"),
    (EVALUATE, "run=x data.background=white", "out of range", "run=x 'data.background=[255,255,255]'"),
    (EVALUATE, "run=x data.background=[0", "out of range", "run=x 'data.background=[255,255,255]'"),
    pytest.param(
        EXPORT, "run=x fromat=onnx", "did you mean format?", "run=x format=onnx", marks=pytest.mark.needs("export")
    ),
    pytest.param(
        EXPORT, "run=x data.root=y", "is not a setting of src.export", "run=x", marks=pytest.mark.needs("export")
    ),
]


@pytest.mark.parametrize(
    ("program", "words", "named", "fixed"),
    MISTAKES,
    ids=lambda value: value if isinstance(value, str) and "=" in value else "",
)
def test_a_mistake_is_named_and_the_fix_is_the_command_corrected(read, program, words, named, fixed):
    with pytest.raises(UserError) as caught:
        read(program, *shlex.split(words))
    assert named in caught.value.render()
    assert caught.value.fix == [f"python -m {program[0]} {fixed}"]


@pytest.mark.needs("export")
def test_export_names_the_format_that_was_meant(read, monkeypatch):
    from src.engine.export.formats import choose_format

    monkeypatch.setenv("TRAIN_COMMAND", "python -m src.export 'run=my run' format=onxx")
    with pytest.raises(UserError) as caught:
        choose_format("onxx")
    assert caught.value.fix == ["python -m src.export 'run=my run' format=onnx"]


def test_paths_alone_are_told_apart(read, tmp_path):
    (tmp_path / "config.yaml").touch()
    with pytest.raises(UserError) as caught:
        read(PREDICT, str(tmp_path), "photos/", "batch_size=2")
    assert caught.value.fix == [f"python -m src.predict batch_size=2 run={tmp_path} images=photos/"]
