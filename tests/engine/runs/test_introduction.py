"""The first lines of a run: which classes it learns, and whether some are too small."""

from __future__ import annotations

from src.engine.images.labelled_images import LabelledImages
from src.engine.runs.introduction import class_counts, uneven_classes


def images(**counts: int) -> LabelledImages:
    labels = [number for number, count in enumerate(counts.values()) for _ in range(count)]
    members = list(range(len(labels)))
    splits = {"train": members, "val": [], "test": []}
    return LabelledImages(tuple(counts), [str(i) for i in members], labels, splits, lambda index: None)


def test_up_to_ten_classes_are_named_with_their_counts():
    assert class_counts(images(cats=1200, dogs=8)) == "cats 1,200, dogs 8"
    assert class_counts(images(**{f"c{n}": n + 1 for n in range(10)})).count(",") == 9


def test_of_more_the_largest_and_the_smallest():
    shown = class_counts(images(**{f"c{n}": n + 1 for n in range(16)}))
    assert shown == "largest c15 16, c14 15, c13 14, c12 13, c11 12; smallest c4 5, c3 4, c2 3, c1 2, c0 1"


def test_names_cannot_steer_the_terminal():
    assert class_counts(images(**{"a\x1b[31m": 3, "b\u202e": 2})) == "a\\x1b[31m 3, b\\u202e 2"


def test_uneven_classes_are_said_in_a_sentence():
    assert uneven_classes(images(a=20, b=9)) == ""
    assert uneven_classes(images(a=4, b=5)) == ""
    text = uneven_classes(images(a=171, b=1, c=8))
    assert "2 of 3 have fewer than 10 training images (b 1, c 8), a has 171" in text
