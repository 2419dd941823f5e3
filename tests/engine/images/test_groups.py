"""Groups stay in one split, and encoded images from elsewhere are treated like files."""

from __future__ import annotations

import io
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
from PIL import Image

from src.config import Data
from src.data import sources
from src.engine.images.groups import Together, groups_of_paths
from src.engine.images.labelled_images import ImageSet, Listing
from src.engine.images.splits import stratified_split
from src.engine.runs.errors import UserError
from src.tasks.multiclass import Multiclass

LABELS = ["cat", "dog"] * 60
GROUPS = [f"patient {index // 5}" for index in range(120)]  # each with images of both classes


def split_of(splits: dict[str, list[int]]) -> dict[int, str]:
    return {index: split for split, members in splits.items() for index in members}


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((16, 12), 40 + value).convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("seed", range(5))
def test_a_group_is_dealt_to_one_split_and_the_fractions_are_those_of_images(seed):
    splits = Together(GROUPS).deal(stratified_split, LABELS, seed, 0.2, 0.2)
    assert sorted(index for members in splits.values() for index in members) == list(range(120))
    where = split_of(splits)
    assert all(len({where[index] for index in range(first, first + 5)}) == 1 for first in range(0, 120, 5))
    assert all(20 <= len(splits[name]) <= 25 for name in ("val", "test"))  # 24 images would be a fifth
    torn = split_of(Together().deal(stratified_split, LABELS, seed, 0.2, 0.2))
    assert any(len({torn[index] for index in range(first, first + 5)}) > 1 for first in range(0, 120, 5))


@pytest.mark.parametrize("seed", range(3))
def test_uneven_groups_and_rare_classes_are_dealt_out_evenly(seed):
    """30 persons with 1 to 30 images, of which three have one image each of a rare class."""
    groups = [f"person {number}" for number in range(30) for _ in range(number + 1)]
    labels = ["rare" if index in (50, 200, 400) else "often" for index in range(len(groups))]
    splits = Together(groups).deal(stratified_split, labels, seed, 0.15, 0.15)
    assert all(sum(labels[index] == "rare" for index in members) == 1 for members in splits.values())
    assert [len(splits[name]) for name in ("val", "test")] == pytest.approx([70, 70], abs=15)  # 15 % of 465
    folds = Together(groups).folds(labels, seed, 5)
    assert sorted(index for fold in folds for index in fold) == list(range(len(groups)))
    assert [len(fold) for fold in folds] == pytest.approx([93] * 5, abs=8)
    assert max(sum(labels[index] == "rare" for index in fold) for fold in folds) == 1
    assert all({groups[index] for index in one}.isdisjoint(groups[i] for i in other) for one, other in pairwise(folds))
    assert Together(groups).folds(labels, seed + 1, 5) != folds


def test_a_copy_joins_its_two_groups_and_without_groups_a_split_is_what_it_was():
    digests = [str(index) for index in range(120)]
    digests[7], digests[118] = digests[0], digests[0]
    where = split_of(Together(GROUPS, digests).deal(stratified_split, LABELS, 3, 0.2, 0.2))
    assert len({where[index] for index in (*range(10), *range(115, 120))}) == 1
    alone = Together(None, digests).deal(stratified_split, LABELS, 3, 0.2, 0.2)
    assert alone == stratified_split(LABELS, 3, 0.2, 0.2, digests)


def test_a_group_that_is_torn_apart_is_refused():
    with pytest.raises(UserError, match=r"1 of 2 groups are in more than one split: b \(train, val\)"):
        Together(list("aabb")).check({"train": [0, 1, 2], "val": [3], "test": []}, "labels.csv")


@pytest.fixture
def load(tmp_path, monkeypatch):
    """load(a listing or set) -> its LabelledImages, as data=own gives them."""

    def run(found: Listing | ImageSet, **data):
        monkeypatch.setattr(sources, "find_images", lambda *_: found)
        settings = Data(source="src.mine", **data)
        return sources.load_images(
            settings, Multiclass(), 0, cache_dir=tmp_path / "memory", bad_list=tmp_path / "bad.txt"
        )

    return run


def content(images: dict[str, bytes], name: str) -> bytes:
    return images[name]


def listing(images: dict[str, bytes], **more) -> Listing:
    labels = ["cat" if int(name) % 2 else "dog" for name in images]
    return Listing(Path("x.db"), list(images), labels, content=partial(content, images), **more)


def test_encoded_images_are_checked_skipped_and_split_like_files(load, tmp_path):
    images = {str(number): png(number) for number in range(30)}
    loaded = load(listing(images, groups=[str(number // 3) for number in range(30)]))
    assert loaded.read(4).shape == (3, 12, 16)
    assert loaded.root is None
    assert all(loaded.digests)
    assert not (tmp_path / "memory").exists()
    where = split_of(loaded.splits)
    assert all(len({where[index] for index in range(first, first + 3)}) == 1 for first in range(0, 30, 3))

    images["3"] = images["3"][:40]
    del images["8"]
    broken = listing(images)
    with pytest.raises(UserError, match="1 of 29 images cannot be read") as caught:
        load(broken)
    assert "3: the file ends too early" in caught.value.render() or "3: " in caught.value.where
    kept = load(broken, on_bad_image="skip")
    assert len(kept.names) == 28
    assert "3" not in kept.names

    images = {str(number): png(number) for number in range(30)}
    images["2"] = images["1"]
    with pytest.raises(UserError, match="1 image has two labels") as caught:
        load(listing(images))
    assert "have your source leave the wrong ones out" in caught.value.render()


def test_an_error_of_the_owners_code_while_it_reads_names_the_image(load):
    images = {str(number): png(number) for number in range(10)}
    given = listing(images)
    del images["4"]
    with pytest.raises(UserError) as caught:
        load(given)
    assert "4: cannot be read (KeyError: '4')" in caught.value.render()


def test_the_groups_of_an_image_set_and_of_a_table(load, tmp_path):
    pixels = partial(Listing.bytes_of, None)
    given = ImageSet("drawn", ("cat", "dog"), [index % 2 for index in range(120)], pixels, groups=GROUPS)
    where = split_of(load(given).splits)
    assert all(len({where[index] for index in range(first, first + 5)}) == 1 for first in range(0, 120, 5))
    with pytest.raises(UserError, match="groups are in more than one split"):
        load(replace(given, splits=["train", "val"] * 60))
    with pytest.raises(UserError, match="near-duplicates are looked for in files only"):
        load(given, group="near_duplicates")
    by_name = split_of(load(replace(given, groups=None), group=r"drawn/\d{4}").splits)
    assert all(len({by_name[index] for index in range(first, first + 10)}) == 1 for first in range(0, 120, 10))


def test_a_table_with_groups(tmp_path, caplog):
    caplog.set_level("INFO")
    rows = ["path,label,group"]
    for number in range(40):
        (tmp_path / f"{number}.png").write_bytes(png(number))
        rows.append(f"{number}.png,{'cat' if number % 2 else 'dog'},{number // 4}")
    table = tmp_path / "labels.csv"
    table.write_text("\n".join(rows))
    data = Data(source="table", table=str(table))
    loaded = sources.load_images(data, Multiclass(), 0, cache_dir=tmp_path / "memory")
    where = split_of(loaded.splits)
    assert all(len({where[index] for index in range(first, first + 4)}) == 1 for first in range(0, 40, 4))
    assert "10 for 40 images, by group" in caplog.text
    table.write_text("\n".join(rows).replace("group", "Machine"))
    by_column = sources.load_images(replace(data, group="Machine"), Multiclass(), 0, cache_dir=tmp_path / "memory")
    assert by_column.splits == loaded.splits
    by_path = sources.load_images(replace(data, group=r"^\d"), Multiclass(), 0, cache_dir=tmp_path / "memory")
    assert len({split_of(by_path.splits)[index] for index in (1, *range(10, 20))}) == 1
    assert groups_of_paths(["a/tom_1.jpg", "a/7.jpg"], r"(\w+)_|(\d)", "a") == ["tom", "7"]
    with pytest.raises(UserError, match="40 of 40 images have no group by"):
        sources.load_images(replace(data, group="patient"), Multiclass(), 0, cache_dir=tmp_path / "memory")
    with pytest.raises(UserError, match="is no regular expression"):
        sources.load_images(replace(data, group="(a"), Multiclass(), 0, cache_dir=tmp_path / "memory")
    table.write_text("\n".join(rows))
    table.write_text("\n".join([*rows[:5], "5.png,cat,"]))
    with pytest.raises(UserError, match="a row without a group"):
        sources.load_images(data, Multiclass(), 0, cache_dir=tmp_path / "memory")
