"""A large image takes little memory to decode and convert, and a strip at a time gives the same pixels as all at once."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from src.engine.images import strips
from src.engine.images.reading import ImageError, decode_image, read_image
from src.engine.weights.preprocessing import ReadOptions
from tests.warm import ROOT, command_environment

SIDE = 5100  # 26 megapixels
LARGE = {
    "float.tif": ("F", 3.5, {"compression": "tiff_adobe_deflate"}),
    "whole.tif": ("I", 70000, {}),
    "alpha.png": ("LA", (3, 100), {"compress_level": 1}),
    "lossless.webp": ("RGB", (10, 200, 30), {"lossless": True, "method": 0}),
}


def peak_mib() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) / 1024


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells a peak that can begin anew")
def test_a_large_image_takes_eleven_bytes_a_pixel_and_some_strips(tmp_path):
    """Of 100 megapixels that is less than 1 GiB. Before, a float TIFF took 37 bytes a pixel and a WebP 18."""
    for name, (mode, colour, options) in LARGE.items():
        Image.new(mode, (SIDE, SIDE), colour).save(tmp_path / name, **options)
        Path("/proc/self/clear_refs").write_text("5")
        before = peak_mib()
        read_image(tmp_path / name, ReadOptions())
        assert peak_mib() - before < 11 * SIDE**2 / 2**20 + 140, name


def test_a_strip_at_a_time_gives_the_same_pixels(monkeypatch):
    """Of all formats, whole and damaged, which scripts/fuzz_images.py makes."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import fuzz_images

    def read(content: bytes) -> tuple:
        try:
            decoded = decode_image(content, "x", ReadOptions((10, 200, 30), bits=0))
        except ImageError as error:
            return (str(error),)
        return decoded.image.size, decoded.image.tobytes(), decoded.findings

    for ending, content in fuzz_images.originals():
        whole = read(content)
        with monkeypatch.context() as small:
            small.setattr(strips, "_PIXELS", 100)
            assert read(content) == whole, ending


def test_no_more_megapixels_are_decoded_at_once_than_there_is_room_for():
    budget, now, most = strips.MegapixelBudget(100), [], []

    def decode(megapixels: float) -> None:
        with budget.reserved(megapixels):
            now.append(megapixels)
            most.append(sum(now))
            time.sleep(0.02)
            now.remove(megapixels)

    threads = [threading.Thread(target=decode, args=(megapixels,)) for megapixels in (60, 30, 60, 10, 50, 120)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(most) == 6
    assert sorted(most)[-1] == 120, "one that is larger than the budget is decoded alone"
    assert all(total <= 100 or total == 120 for total in most)


def test_a_tiff_whose_strip_is_too_large_is_refused(tmp_path, monkeypatch):
    from src.engine.images import reading

    Image.fromarray(np.zeros((64, 64), np.float32)).save(tmp_path / "x.tif", compression="tiff_adobe_deflate")
    assert read_image(tmp_path / "x.tif", ReadOptions()).shape == (3, 64, 64)
    monkeypatch.setattr(reading, "MOST_BYTES", 64 * 64 * 4)
    with pytest.raises(ImageError, match=r"x\.tif: its pixels lie in strips of 0 MiB: save it with smaller ones"):
        read_image(tmp_path / "x.tif", ReadOptions())


def test_the_fuzz_of_a_few_images_finds_nothing():
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts/fuzz_images.py"), "--count", "20", "--seed", "3"],
        env=command_environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    total = done.stdout.splitlines()[-1].split()
    assert total[0] == "all"
    assert sum(map(int, total[1:3])) == 20
