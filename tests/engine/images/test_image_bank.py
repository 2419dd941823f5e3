"""The image bank: the same pixels as from the files, whatever happens to its own files."""

from __future__ import annotations

import logging
import multiprocessing
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from src.config import Data
from src.data.sources import load_images
from src.engine.images import image_bank
from src.engine.images.image_bank import ImageBank
from src.engine.images.labelled_images import LabelledImages
from src.engine.images.reading import read_image
from src.engine.weights.preprocessing import ReadOptions
from src.tasks.multiclass import Multiclass
from tests.conftest import command_environment

IMAGES = 12


def draw(path: Path, seed: int, size: tuple[int, int] = (160, 130)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    levels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3))
    Image.fromarray(levels.astype(np.uint8)).save(path, quality=90)


@pytest.fixture
def photos(tmp_path) -> Path:
    for number in range(IMAGES):
        draw(tmp_path / "photos" / "ab"[number % 2] / f"{number:02d}.jpg", number)
    return tmp_path / "photos"


def load(photos: Path, trains: bool = True, **data) -> LabelledImages:
    runs = photos.parent / "runs"
    bad_list = runs / "bad.txt" if trains else None
    settings = Data(source="image_folder", root=str(photos), **data)
    return load_images(settings, Multiclass(), 0, cache_dir=runs / ".checked", bad_list=bad_list)


def bank_files(photos: Path) -> list[Path]:
    return sorted((photos.parent / "runs/.images").rglob("images-*.safetensors"))


def check_pixels(images: LabelledImages) -> None:
    for index in range(len(images.names)):
        assert torch.equal(images.read(index), read_image(images.location(index), ReadOptions()))


def decoded(images: LabelledImages, monkeypatch) -> list[str]:
    """The images that are not in the bank. Looks at all of them."""
    opened: list[str] = []
    whole = image_bank.ImageBank.read

    def read(bank: ImageBank, digest: str):
        pixels = whole(bank, digest)
        opened.extend([digest] if pixels is None else [])
        return pixels

    monkeypatch.setattr(image_bank.ImageBank, "read", read)
    for index in range(len(images.names)):
        images.read(index)
    monkeypatch.undo()
    return [images.names[images.digests.index(digest)] for digest in opened]


def test_pixels_are_those_of_the_files_and_no_file_is_opened(photos, monkeypatch):
    draw(photos / "a/long.png", 77, (700, 40))
    turned = Image.open(photos / "a/00.jpg")
    turned.getexif()[274] = 6
    turned.save(photos / "a/turned.jpg", exif=turned.getexif())
    Image.new("RGBA", (150, 150), (9, 200, 9, 99)).save(photos / "b/clear.png")
    images = load(photos)
    check_pixels(images)
    assert decoded(images, monkeypatch) == []
    expected = [read_image(images.location(index), ReadOptions()) for index in range(len(images.names))]
    for path in photos.rglob("*.*"):
        path.write_bytes(b"")
    assert all(torch.equal(images.read(index), pixels) for index, pixels in enumerate(expected))


def test_later_runs_find_it_and_only_what_is_new_or_changed_is_added(photos, caplog):
    caplog.set_level(logging.INFO)
    load(photos)
    assert f"{IMAGES} decoded images are kept" in caplog.text
    caplog.clear()
    draw(photos / "a/00.jpg", 99)
    draw(photos / "a/new.jpg", 100)
    (photos / "b/01.jpg").rename(photos / "b/moved.jpg")
    images = load(photos)
    assert "2 decoded images are kept" in caplog.text
    check_pixels(images)
    caplog.clear()
    check_pixels(load(photos))
    assert "image bank" not in caplog.text


def test_one_that_is_removed_is_filled_again_although_the_check_is_remembered(photos, monkeypatch):
    images = load(photos)
    for path in bank_files(photos):
        path.unlink()
    assert len(decoded(images, monkeypatch)) == IMAGES  # the run goes on, by the files
    check_pixels(images)
    assert decoded(load(photos), monkeypatch) == []


def test_evaluate_and_reports_read_it_and_never_fill_it(photos, monkeypatch):
    load(photos, trains=False)
    assert bank_files(photos) == []
    load(photos)
    assert decoded(load(photos, trains=False), monkeypatch) == []


def test_other_ways_to_read_have_another_one(photos):
    Image.new("RGBA", (150, 150), (9, 200, 9, 99)).save(photos / "b/clear.png")
    load(photos)
    images = load(photos, background=[0, 0, 0])
    index = images.names.index("b/clear.png")
    assert torch.equal(images.read(index), read_image(images.location(index), ReadOptions((0, 0, 0))))
    assert len(bank_files(photos)) == 2


def test_images_of_16_bits_small_and_huge_ones_are_decoded(photos, monkeypatch):
    """How 16 bits are read depends on the other images."""
    grey = (np.arange(200 * 200).reshape(200, 200) % 4096).astype(np.uint16)
    Image.fromarray(grey).save(photos / "a/deep.png")
    draw(photos / "b/small.png", 5, (100, 100))
    monkeypatch.setattr(image_bank, "LARGEST", 300 * 300)
    draw(photos / "b/huge.png", 6, (400, 300))
    images = load(photos)
    assert images.bits == 12
    assert sorted(decoded(images, monkeypatch)) == ["a/deep.png", "b/huge.png", "b/small.png"]
    index = images.names.index("a/deep.png")
    assert torch.equal(images.read(index), read_image(images.location(index), ReadOptions(bits=12)))


def test_what_there_is_no_room_for_is_decoded_and_said(photos, monkeypatch, caplog):
    for number in range(IMAGES):  # 1.1 MiB each
        draw(photos / "ab"[number % 2] / f"{number:02d}.jpg", number, (700, 560))
    caplog.set_level(logging.INFO)
    images = load(photos, cache_mib=5)
    assert f"no room for {IMAGES - 4} images (data.cache_mib=5)" in caplog.text
    assert len(decoded(images, monkeypatch)) == IMAGES - 4
    check_pixels(images)
    caplog.clear()
    load(photos, cache_mib=5)  # nothing is decoded for a bank that is full
    assert "image bank" not in caplog.text
    load(photos.rename(photos.with_name("others")), cache_mib=5)  # of two sets the one used longest ago goes
    assert sum(path.stat().st_size for path in bank_files(photos)) <= 5 * 2**20


def test_off_reads_and_writes_nothing(photos):
    images = load(photos, image_bank="off")
    assert bank_files(photos) == []
    check_pixels(images)


def test_a_flipped_bit_anywhere_changes_no_pixel(photos, caplog):
    load(photos)
    [path] = bank_files(photos)
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    for position in [*range(0, header, 97), *range(header, len(content), len(content) // 7), len(content) - 1]:
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        check_pixels(load(photos, trains=False))
        path.write_bytes(content)
    assert "is damaged; its images are decoded again" in caplog.text


@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.99])
def test_a_file_that_is_cut_off_changes_no_pixel(photos, share):
    """Also while a run reads it."""
    images = load(photos)
    [path] = bank_files(photos)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    check_pixels(images)
    path.write_bytes(content[: int(share * len(content))])
    check_pixels(load(photos))
    check_pixels(load(photos))


FILL = """
import logging, resource, signal, sys
logging.basicConfig(level="INFO")
from pathlib import Path
from src.engine.images import image_bank
from tests.engine.images.test_image_bank import check_pixels, load
image_bank.CHUNK = 100_000
"""


def fill(photos: Path, code: str = "") -> subprocess.Popen:
    program = f"{FILL}\n{code}\ncheck_pixels(load(Path({str(photos)!r})))\n"
    return subprocess.Popen(
        [sys.executable, "-c", program], env=command_environment(), stderr=subprocess.PIPE, text=True
    )


def test_a_full_disk_is_said_once_and_no_reason_to_stop(photos):
    process = fill(
        photos,
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (90_000, 90_000))",
    )
    _, text = process.communicate(timeout=120)
    assert process.returncode == 0, text
    assert text.count("Images cannot be kept") == 1
    assert bank_files(photos) == []
    assert not list((photos.parent / "runs").rglob("*.tmp"))


def test_a_run_that_is_killed_while_it_writes_leaves_only_whole_files(photos, monkeypatch):
    """The third file is not synced when the process is killed; what it had begun goes when the next run tidies up."""
    kill = """
import os
from src.engine.runs import files
whole, calls = files._sync, []
def sync(handle):
    calls.append(handle)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    whole(handle)
files._sync = sync
"""
    process = fill(photos, kill)
    assert process.wait(120) == -signal.SIGKILL
    assert len(bank_files(photos)) == 2
    assert len(list((photos.parent / "runs/.images").rglob("*.tmp"))) == 1
    images = load(photos)
    check_pixels(images)
    assert decoded(images, monkeypatch) == []
    assert not list((photos.parent / "runs/.images").rglob("*.tmp"))


def test_two_runs_at_once_fill_one_bank(photos, monkeypatch):
    """The second one decodes for itself, and neither waits."""
    slow = "whole = image_bank.Filling._write; import time\n"
    slow += "def write(self):\n    time.sleep(0.5); whole(self)\nimage_bank.Filling._write = write"
    processes = [fill(photos, slow) for _ in range(2)]
    for process in processes:
        _, text = process.communicate(timeout=120)
        assert process.returncode == 0, text
    assert decoded(load(photos), monkeypatch) == []
    bank = ImageBank(photos.parent / "runs/.images", photos, ReadOptions(), 4096)
    rows = sum(path.stat().st_size for path in bank_files(photos)) // (3 * 160 * 130)
    assert len(bank.places) == IMAGES
    assert rows == IMAGES, "an image is kept twice"


def test_loader_processes_and_a_copy_of_the_bank_read_the_same(photos):
    """Where processes are not forked they get a copy."""
    images = load(photos)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        for index, pixels in enumerate(pool.map(images.read, range(3))):
            assert torch.equal(pixels, images.read(index))


def test_a_run_is_the_same_with_and_without(command, tmp_path, photos):
    words = ("data=image_folder", f"data.root={photos}", "data.image_size=32", "model.weights=none", "seed=3")
    words += ("freeze.preset=full", "trainer.max_epochs=2", "data.batch_size=4", "baseline=none", "data.num_workers=2")
    words += ("model.backbone=mobilenet_v3_small",)
    for name, more in (("without", ("data.image_bank=off",)), ("filling", ()), ("filled", ())):
        done = command("train", *words, *more, f"name={name}")
        assert done.code == 0, done.text
        assert ("image bank: 12 decoded" in done.out) == (name == "filling")
    weights = {
        (tmp_path / "runs" / name / "model/model.safetensors").read_bytes() for name in ("without", "filling", "filled")
    }
    assert len(weights) == 1


def test_settings_without_effect_are_said(command, photos):
    done = command("train", "debug=true", "data.cache_mib=100", "name=digits")
    assert "data.cache_mib=100.0 has no effect with data=digits" in done.text
    done = command(
        "train", "debug=true", "data=image_folder", f"data.root={photos}", "data.image_size=32", "data.image_bank=off",
        "data.cache_mib=100", "model.weights=none",
    )  # fmt: skip
    assert "data.cache_mib=100.0 has no effect with data.image_bank=off" in done.text
