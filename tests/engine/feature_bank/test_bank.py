"""Head-only epochs train on features that are computed once, with the numbers of a training on images."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest

from src.engine.runs.files import sha256
from tests.conftest import SMALL, check_error, write_images
from tests.running import result, start, wait_for_rows

HEAD = ("freeze.preset=head_only", "optimizer.lr=0.05", *SMALL[2:])
PHOTOS = ("data=image_folder", "data.root=photos", "data.image_size=32", "data.num_workers=1", *HEAD)
PLAIN = (*PHOTOS, "data.augment=none")


@pytest.fixture
def photos(tmp_path) -> Path:
    return write_images(tmp_path / "photos", {"apple": 20, "pear": 20, "plum": 14})


def computed(done) -> list[int]:
    """How many images' features each line says are computed."""
    assert done.code == 0, done.text
    return [int(number) for number in re.findall(r"computing features of (\d+) (?:train|val|test) images", done.out)]


def metrics(run: Path) -> dict[str, float]:
    return result(run)["metrics"]


def test_the_numbers_are_those_of_a_training_on_images(command, tmp_path, photos):
    assert computed(command("train", *PLAIN, "name=features")) == [38, 8, 8]
    assert computed(command("train", *PLAIN, "name=images", "feature_bank.views=0")) == []
    runs = tmp_path / "runs"
    assert metrics(runs / "features") == pytest.approx(metrics(runs / "images"), abs=1e-4)
    rows = [(runs / name / "metrics.csv").read_text().splitlines() for name in ("features", "images")]
    assert len(rows[0]) == len(rows[1]) == 3
    assert command("evaluate", "run=runs/features").code == 0
    repeated = json.loads((runs / "features/evaluation.json").read_text())["metrics"]
    assert repeated == {name: value for name, value in metrics(runs / "features").items() if name.startswith("test/")}


def test_later_runs_find_the_features_and_compute_what_has_changed(command, tmp_path, photos):
    first = command("train", *PLAIN, "name=first")
    assert sum(computed(first)) == 54
    assert computed(command("train", *PLAIN, "name=again", "optimizer.lr=0.01")) == []
    moved = photos / "apple" / "moved.png"
    (photos / "apple" / "000.png").rename(moved)
    assert computed(command("train", *PLAIN, "name=moved")) == []
    write_images(tmp_path / "other", {"apple": 1}, seed=7)
    shutil.copy(tmp_path / "other/apple/000.png", moved)
    assert computed(command("train", *PLAIN, "name=changed")) == [1]
    for word in (
        "data.image_size=48",
        "model.backbone=resnet18",
        "data.crop_ratio=0.5",
        "seed=1",
    ):  # which draws the weights
        assert (
            sum(computed(command("train", *PLAIN, word, f"name={word.replace('=', '_')}", "trainer.max_epochs=1")))
            == 54
        )


def test_a_damaged_file_is_noticed_and_changes_no_number(command, tmp_path, photos):
    command("train", *PLAIN, "name=first")
    for path in (tmp_path / "runs/.features").rglob("*.safetensors"):
        content = bytearray(path.read_bytes())
        content[-5] ^= 16
        path.write_bytes(content)
    done = command("train", *PLAIN, "name=again")
    assert "damaged" in done.text
    assert computed(done)
    assert metrics(tmp_path / "runs/again") == metrics(tmp_path / "runs/first")


def test_epochs_cycle_through_augmented_views(command, tmp_path, photos):
    words = (*PHOTOS, "data.augment=standard", "trainer.max_epochs=5", "feature_bank.views=2")
    done = command("train", *words, "name=two")
    assert computed(done) == [38, 8, 38, 8]  # two views of train, one of val, one of test
    assert "view 2 of 2" in done.out
    assert computed(command("train", *words, "name=again")) == []
    assert 38 in computed(command("train", *words, "name=other", "seed=1"))


def test_a_phase_of_the_head_alone_is_followed_by_images(command, tmp_path, photos):
    words = (*PLAIN, "freeze.preset=last_n", "freeze.unfreeze_epoch=2", "trainer.max_epochs=3")
    done = command("train", *words, "name=features")
    assert computed(done)[:2] == [38, 8]
    assert command("train", *words, "name=images", "feature_bank.views=0").code == 0
    assert metrics(tmp_path / "runs/features") == pytest.approx(metrics(tmp_path / "runs/images"), abs=1e-2)


def test_a_killed_run_that_is_repeated_gives_the_undisturbed_result(command, tmp_path, photos):
    words = (*PLAIN, "trainer.max_epochs=60", "checkpoint.every_n_steps=1")
    assert command("train", *words, "name=whole", "runs_dir=elsewhere").code == 0
    process = start(tmp_path, *words, "name=killed")
    assert wait_for_rows(tmp_path / "runs/killed", 3, process)
    process.kill()
    process.communicate()
    shutil.rmtree(tmp_path / "runs/.features")  # as if the disk had not taken them
    done = command("train", *words, "name=killed")
    assert done.code == 0, done.text
    assert "continuing from" in done.out
    files = [tmp_path / run / "model/model.safetensors" for run in ("elsewhere/whole", "runs/killed")]
    assert sha256(files[0]) == sha256(files[1])


def test_an_image_that_broke_is_replaced_by_one_of_its_class(command, tmp_path, photos):
    """Between the check and the pass: the check is remembered by size and time."""
    words = (*PLAIN, "data.on_bad_image=skip")
    assert command("train", *words, "name=first", "feature_bank.views=0").code == 0
    broken = photos / "plum" / "003.png"
    stamp = broken.stat()
    content = broken.read_bytes()
    broken.write_bytes(bytes(len(content)))
    os.utime(broken, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    done = command("train", *words, "name=again")
    assert done.code == 0, done.text
    assert "plum/003.png" in done.text
    refused = command("train", *PLAIN, "name=refused")
    check_error(refused, 65, "003.png")


@pytest.mark.parametrize("word", ["data.augment=src.my_transforms.build", "model.module=src.my_module.Mixup"])
def test_of_parts_of_the_owner_nothing_is_kept_on_the_disk(tmp_path, word):
    from src.config import Config, Data, Model
    from src.engine.feature_bank.views import persists
    from src.engine.images.labelled_images import LabelledImages

    images = LabelledImages(("a",), ["x"], [0], {}, read=None, in_memory=True)
    key, _, value = word.partition("=")
    config = Config(data=Data(augment=value)) if key == "data.augment" else Config(model=Model(module=value))
    assert persists(config, images) == (key != "data.augment")
    assert persists(Config(), images)
    assert not persists(Config(), images.without_pixels())


def test_nothing_is_computed_where_nothing_asks_for_features(command, tmp_path, photos):
    assert computed(command("train", *PLAIN, "name=full", "freeze.preset=full")) == []
    assert computed(command("train", *PLAIN, "name=few", "trainer.limit_batches=1")) == []
    assert not (tmp_path / "runs/.features").exists()


@pytest.mark.slow
def test_several_processes_share_the_pass_and_the_numbers(command, tmp_path, photos):
    ddp = ("strategy=ddp", "trainer.devices=2", "trainer.accelerator=cpu")
    done = command("train", *PLAIN, *ddp, "name=two")
    assert computed(done) == [38, 8, 8]
    assert computed(command("train", *PLAIN, "name=one", "runs_dir=elsewhere")) == [38, 8, 8]
    assert metrics(tmp_path / "runs/two") == pytest.approx(metrics(tmp_path / "elsewhere/one"), abs=1e-3)
    files = [
        sum(1 for _ in (tmp_path / folder / ".features").rglob("*.safetensors")) for folder in ("runs", "elsewhere")
    ]
    assert files[0] == files[1]  # only the first process writes


def test_a_setting_without_effect_is_said(command, photos):
    done = command("train", *PLAIN, "feature_bank.views=4", "trainer.max_epochs=1")
    assert "feature_bank.views=4 has no effect" in done.text


def test_what_does_not_fit_is_said(command, tmp_path, photos):
    done = command("train", *PLAIN, "name=disk", "feature_bank.limit_gib=0.0001")
    assert "they are not kept on the disk" in done.out
    assert computed(done) == [38, 8, 8]
    assert not list((tmp_path / "runs").glob(".features/*"))


def test_features_that_would_fill_the_memory_are_not_collected(monkeypatch):
    from types import SimpleNamespace

    from src.engine.feature_bank import bank

    monkeypatch.setattr(bank, "FeatureBank", lambda *_: SimpleNamespace(nbytes=1000))
    job = SimpleNamespace(
        config=SimpleNamespace(
            strategy=SimpleNamespace(name="single"), baseline="show", feature_bank=SimpleNamespace(views=None)
        )
    )
    task = SimpleNamespace(freezing=SimpleNamespace(backbone_is_frozen=bool))
    for available, expected in ((3999, False), (4001, True), (None, True)):
        monkeypatch.setattr(bank, "available_bytes", lambda _, available=available: available)
        assert (bank.build_bank(job, task, None) is not None) == expected


def test_a_disk_that_takes_no_features_is_said_once(command, tmp_path, photos):
    """A file stands where their folder would be made; two batches of features and three splits are not kept."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/.features").write_text("in the way")
    done = command("train", *PLAIN, "name=x", "data.batch_size=2")
    assert computed(done) == [38, 8, 8]
    assert done.text.count("Features cannot be kept") == 1
