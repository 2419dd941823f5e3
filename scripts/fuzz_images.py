"""Reads damaged and crafted images the way training does, and counts the outcomes.

    python scripts/fuzz_images.py                       300 images, about a minute on two cores
    python scripts/fuzz_images.py --count 3000 --seed 1

Each image is a small one of a supported format, mutated at random: flipped bits, a truncation, wrong header bytes, a wrong
length or count, missing or repeated parts. A few reader processes take one image after another, with 10 seconds for each.
Exit code 1 if an image crashed the reader (a signal, or an exception other than ImageError), took longer than 10 s or more
than 1 GiB; such images are kept in a folder.
"""

from __future__ import annotations

import argparse
import io
import os
import queue
import random
import resource
import select
import subprocess
import sys
import tempfile
import threading
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
SECONDS, MIB = 10.0, 1024
ENDS = ("read", "refused", "crash", "over 10 s", "over 1 GiB")
PIXELS = np.random.default_rng(0).integers(0, 256, (24, 31, 4), dtype=np.uint8)


def originals() -> Iterator[tuple[str, bytes]]:
    """(suffix, content) of small images of all formats and the usual pixel modes."""
    colour, alpha = Image.fromarray(PIXELS[..., :3]), Image.fromarray(PIXELS)
    grey, palette, ink = colour.convert("L"), colour.quantize(16), colour.convert("CMYK")
    sixteen = Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257)
    numbers, floats = sixteen.convert("I"), Image.fromarray(PIXELS[..., 0] / np.float32(255))
    exif = Image.Exif()
    exif[274] = 6
    frames = {"save_all": True, "append_images": [colour.rotate(90)]}
    for image in (colour, grey, ink):
        yield from _saved(image, "JPEG", {}, {"progressive": True, "exif": exif})
    for image in (colour, alpha, grey, palette, sixteen, colour.convert("1")):
        yield from _saved(image, "PNG", {}, {"exif": exif})
    yield from _saved(palette, "PNG", {"transparency": bytes(range(16))})
    yield from _saved(palette, "GIF", {}, frames)
    yield from _saved(alpha, "WEBP", {}, {"lossless": True}, frames)
    for image in (colour, grey, palette):
        yield from _saved(image, "BMP", {})
    for image in (colour, alpha, grey, palette, ink, sixteen, numbers, floats):
        yield from _saved(image, "TIFF", {}, {"compression": "tiff_adobe_deflate"}, {"compression": "tiff_lzw"})
    yield from _saved(colour, "TIFF", {"compression": "jpeg"}, {"exif": exif})
    yield from _saved(colour, "AVIF", {"speed": 10})
    for image in (colour, grey, sixteen):
        yield from _saved(image, "PPM", {})


def _saved(image: Image.Image, form: str, *options: dict) -> Iterator[tuple[str, bytes]]:
    for chosen in options:
        file = io.BytesIO()
        image.save(file, form, **chosen)
        yield form.lower(), file.getvalue()


def mutated(content: bytes, draw: random.Random) -> bytes:
    """The file with one to three changes."""
    data = bytearray(content)
    for _ in range(draw.randint(1, 3)):
        place, length = draw.randrange(len(data)), draw.randint(1, 40)
        kind = draw.choice(("flip", "cut", "header", "lie", "zero", "twice", "gone"))
        if kind == "flip":
            for _ in range(draw.randint(1, 30)):
                data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        elif kind == "cut":
            del data[max(1, place) :]
        elif kind == "header":
            data[draw.randrange(min(64, len(data)))] = draw.randrange(256)
        elif kind == "lie":  # overwrites 2 or 4 bytes near the start, where lengths and counts are
            size, order = draw.choice((2, 4)), draw.choice(("little", "big"))
            value = draw.choice((0, 1, 255, 9999, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1)) % 256**size
            start = draw.randrange(min(400, len(data)))
            data[start : start + size] = value.to_bytes(size, order)
        elif kind == "zero":
            data[place : place + length] = bytes(len(data[place : place + length]))
        elif kind == "twice":
            data[place:place] = data[place : place + length]
        else:
            del data[place : place + length]
        data = data or bytearray(b"\0")
    return _with_checksums(bytes(data)) if draw.random() < 0.7 else bytes(data)


def _with_checksums(data: bytes) -> bytes:
    """Recomputes a PNG's chunk checksums, so that the damage reaches the decoder."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data
    done, place = bytearray(data), 8
    while place + 12 <= len(data):
        end = place + 8 + int.from_bytes(data[place : place + 4])
        done[end : end + 4] = zlib.crc32(data[place + 4 : end]).to_bytes(4) if end + 4 <= len(data) else b""
        place = end + 4
    return bytes(done)


class Reader:
    """A process that reads images and reports each outcome."""

    def __init__(self) -> None:
        self.process = self._start()

    def _start(self) -> subprocess.Popen[str]:
        words = [sys.executable, str(Path(__file__).resolve()), "--read"]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        pipe = subprocess.PIPE
        return subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, env=environment)

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()

    def read(self, path: Path) -> str:
        self.process.stdin.write(f"{path}\n")
        self.process.stdin.flush()
        # The first image includes the imports.
        answered = select.select([self.process.stdout], [], [], SECONDS if self.ready else 12 * SECONDS)[0]
        line = self.process.stdout.readline() if answered else ""
        self.ready = bool(line)
        if line:
            return line.strip()
        self.end()
        self.process = self._start()
        return "crash" if answered else "over 10 s"

    ready = False


def read_paths() -> None:
    """Main loop of a Reader's process: paths on stdin, outcomes on stdout."""
    from src.engine.images.reading import ImageError, read_image
    from src.engine.weights.preprocessing import ReadOptions

    resource.setrlimit(resource.RLIMIT_AS, (16 * 2**30, 16 * 2**30))
    for line in sys.stdin:
        before = _peak_mib(reset=True)
        try:
            read_image(line.strip(), ReadOptions())
            end = "read"
        except ImageError:
            end = "refused"
        except BaseException:
            end = "crash"
        if end != "crash" and _peak_mib() - before > MIB:
            end = "over 1 GiB"
        print(end, flush=True)


def _peak_mib(reset: bool = False) -> float:
    if reset:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: resets the peak
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) / 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--read", action="store_true", help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.read:
        read_paths()
        return 0
    draw, files = random.Random(words.seed), list(originals())
    folder = Path(tempfile.mkdtemp(prefix="fuzz-images-"))
    waiting: queue.SimpleQueue[tuple[str, Path]] = queue.SimpleQueue()
    order = draw.sample(range(len(files)), len(files))
    for number in range(words.count):
        ending, content = files[order[number % len(files)]]
        path = folder / f"{number:05d}.{ending}"
        path.write_bytes(mutated(content, draw))
        waiting.put((ending, path))
    ends: Counter[tuple[str, str]] = Counter()

    def work() -> None:
        reader = Reader()
        while not waiting.empty():
            try:
                ending, path = waiting.get_nowait()
            except queue.Empty:
                break
            end = reader.read(path)
            ends[ending, end] += 1
            if end in ("read", "refused"):
                path.unlink()
        reader.end()

    threads = [threading.Thread(target=work) for _ in range(min(os.cpu_count() or 1, 1 + words.count // 50))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(f"{'':8}" + "".join(f"{end:>12}" for end in ENDS))
    for form in [*sorted({form for form, _ in ends}), "all"]:
        counts = [sum(ends[one] for one in ends if one[1] == end and form in (one[0], "all")) for end in ENDS]
        print(f"{form:8}" + "".join(f"{count:>12}" for count in counts))
    kept = sorted(folder.iterdir())
    if kept:
        print(f"kept in {folder}: {', '.join(path.name for path in kept)}")
    else:
        folder.rmdir()
    return 1 if kept else 0


if __name__ == "__main__":
    sys.exit(main())
