"""Images and folders of images that are not what a training expects."""

from __future__ import annotations

import csv
import json
import os
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from scripts.faults.injecting import STEP, Fault, kill
from scripts.faults.plain import Plain
from scripts.faults.programs import Program, check
from scripts.faults.project import Project
from scripts.faults.registry import row
from tests.conftest import write_images
from tests.engine.images.odd_images import write_corrupt_images, write_odd_images, write_png

SKIP = {"words": ("data.on_bad_image=skip",)}


@row(
    33,
    "bad_images",
    promise="all paths are listed before the first step; told to skip them, it trains on",
    injection="an empty file, half a JPEG and a text among the images",
    quick=True,
)
def bad_images(program: Program) -> str:
    names = write_corrupt_images(program.class_folder("apple"))
    done = program.train(kill(STEP))
    check(done.code != -9, "it began to train")
    missing = [name for name in names if name not in done.err]
    check(not missing, f"not named: {', '.join(missing)}; {done.end()}")
    if isinstance(program, Project):
        program.check_error(done, 65, "3 of")
    done = program.train(run="skip", **SKIP)
    check(done.code == 0, f"it does not train without them; {done.end()}")
    return "exit code 65 with 3 paths; data.on_bad_image=skip trains on"


@row(
    34,
    "bad_image_midrun",
    promise="the policy applies, the path is shown",
    injection="an image of train, and one of test, cut in half while the third step is made",
)
def bad_image_midrun(program: Program) -> str:
    for split in ("train", "test") if isinstance(program, Project) else ("train",):
        image = image_of(program, split)
        whole = image.read_bytes()
        cut = Fault(STEP, "cut file", str(image), nth=3)
        done = program.train(cut, run=split)
        check(done.code not in (0, None), f"{split}: it says that all is well; {done.end()}")
        check(image.name in done.err, f"{split}: the image is not named; {done.end()}")
        if isinstance(program, Project):
            program.check_error(done, 65)
        image.write_bytes(whole)
        done = program.train(cut, run=f"skip-{split}", **SKIP)
        check(done.code == 0, f"{split}: told to skip it, it ends; {done.end()}")
        image.write_bytes(whole)
    return "exit code 65 with the path; data.on_bad_image=skip trains and measures on"


def image_of(program: Program, split: str) -> Path:
    """A file of the split of every run with these images."""
    if isinstance(program, Plain):
        return program.class_folder("apple") / "000.png"
    program.undisturbed()
    with (program.undisturbed_folder().parent / "split.csv").open(newline="") as file:
        return program.folder / "photos" / next(row["path"] for row in csv.DictReader(file) if row["split"] == split)


@row(
    35,
    "modes",
    promise="every file is read as the reference pixels: 16 bits scaled, EXIF applied, transparency on white",
    injection="more than 25 odd modes and formats, from CMYK to float TIFF",
    quick=True,
)
def modes(program: Program) -> str:
    odd = write_odd_images(program.folder / "odd")
    wrong = []
    for name, expected in odd.items():
        pixels = program.read(program.folder / "odd" / name)
        same_shape = pixels is not None and pixels.shape == expected.expected.shape
        if not same_shape or np.abs(pixels.astype(int) - expected.expected).max() > expected.tolerance:
            wrong.append(name)
    check(not wrong, f"{len(wrong)} of {len(odd)} are read wrongly or not at all: {', '.join(wrong)}")
    return f"{len(odd)} of {len(odd)} read as their reference"


@row(
    36,
    "bomb",
    promise="refused by its header, less than 200 MB of memory",
    injection="a PNG of 13,000 x 13,000 pixels and 0.5 MB",
)
def bomb(program: Program) -> str:
    side = 13_000
    file = program.class_folder("apple") / "bomb.png"
    write_png(file, (side, side), 8, 2, (bytes(3 * side) for _ in range(side)))
    done = program.command("scripts.faults.read_image", type(program).__name__, str(file))
    growth = json.loads(done.out)["mib"]
    check(growth < 200, f"{growth:.0f} MB of memory to read it")
    if isinstance(program, Project):
        program.check_error(program.train(), 65, "bomb.png", "169.0 megapixels")
    return f"refused by name, {growth:.0f} MB of memory"


@row(
    37,
    "format_whitelist",
    promise="never opened as what it is, no program started",
    injection="PostScript named .jpg, and a Ghostscript that notes its calls",
    quick=True,
)
def format_whitelist(program: Program) -> str:
    script = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n%%EndComments\nshowpage\n"
    (program.class_folder("apple") / "000.jpg").write_text(script)
    ghostscript = program.folder / "bin" / "gs"
    ghostscript.parent.mkdir()
    ghostscript.write_text(f"#!/bin/sh\ntouch {program.folder}/started\n")
    ghostscript.chmod(0o755)
    done = program.train(environ={"PATH": f"{ghostscript.parent}:{os.environ['PATH']}"})
    check(not (program.folder / "started").exists(), "Ghostscript was started")
    if isinstance(program, Project):
        program.check_error(done, 65, "000.jpg")
    return "refused by name, Ghostscript not started"


@row(
    38,
    "ignored_files",
    promise="read, or counted and reported",
    injection="GIF, AVIF, a macOS ._ file and a text in a class folder",
)
def ignored_files(program: Program) -> str:
    folder = program.class_folder("apple")
    for number in range(5):
        pixels = np.random.default_rng(number).integers(0, 255, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"more{number}.{'gif' if number < 3 else 'avif'}")
    (folder / "._000.png").write_bytes(b"\0\5\x16\7Mac OS X")
    (folder / "notes.txt").write_text("notes")
    done = program.train()
    check(done.code == 0, done.end())
    if isinstance(program, Project):
        check("59 in 3 classes" in done.out, "the GIF and AVIF files are not read")
    for kind in ("._", ".txt") if isinstance(program, Project) else (".gif", ".avif", "._", ".txt"):
        check(kind in done.text, f"files {kind} are left out without a word")
    return "GIF and AVIF are read, the others counted and reported"


@row(
    39,
    "empty_class",
    promise="an empty class folder is named, hidden folders are skipped",
    injection="an empty folder beside the classes, then .ipynb_checkpoints with an image in it",
)
def empty_class(program: Program) -> str:
    empty = program.class_folder("durian")
    empty.mkdir(parents=True)
    done = program.train(kill(STEP), run="empty")
    check(done.code not in (0, None, -9), f"not refused; {done.end()}")
    check("durian" in done.err, f"the folder is not named; {done.end()}")
    empty.rmdir()
    hidden = program.class_folder(".ipynb_checkpoints")
    hidden.mkdir()
    shutil.copy(program.class_folder("apple") / "000.png", hidden)
    done = program.train(run="hidden")
    check(done.code == 0, done.end())
    check(len(program.classes("hidden")) == 3, f"the classes are {', '.join(program.classes('hidden'))}")
    return "named; 3 classes"


@row(
    40,
    "class_mismatch",
    promise="an error lists the difference",
    injection="a folder of classes that train has and val has not",
    quick=True,
)
def class_mismatch(program: Program) -> str:
    write_images(program.folder / "given" / "train", {"apple": 12, "pear": 12, "plum": 12})
    write_images(program.folder / "given" / "val", {"pear": 6, "plum": 6}, seed=1)
    done = program.train(root="given")
    check(done.code not in (0, None), "not noticed: the labels of val are shifted by one")
    check("apple" in done.err, f"the class is not named; {done.end()}")
    return f"exit code {done.code}, the class named"


@row(
    41,
    "class_order_resume",
    promise="the stored list of classes wins, or an error",
    injection="a class added before the run goes on; in another run one of three replaced",
)
def class_order_resume(program: Program) -> str:
    for run in ("added", "replaced"):
        root = program.write_photos(program.folder / run)
        program.check_killed(program.train(kill(STEP, 12), run=run, root=run))
        for part in program.photos_in:
            write_images(root / part, {"banana": 12}, seed=5)
            if run == "replaced":
                shutil.rmtree(root / part / "plum")
        done = program.train(run=run, root=run)
        kept = done.code == 0 and program.classes(run) == ["apple", "pear", "plum"]
        refused = done.code not in (0, None) and any(word in done.err for word in ("plum", "banana", "size mismatch"))
        check(refused or (kept and run == "added"), f"one class {run}: it trained on with other labels; {done.end()}")
    if isinstance(program, Project):
        done = program.command("src.predict", "run=runs/added", "images=added/apple", "out=predictions.csv")
        check(done.code == 0, done.end())
        check("banana" not in (program.folder / "predictions.csv").read_text(), "predict knows a class that never was")
    return "added: the stored list; replaced: refused"


@row(
    42,
    "num_classes",
    promise="an error before the model is built",
    injection="four folders, model.num_classes=3",
    plain=False,
)
def num_classes(program: Program) -> str:
    write_images(program.folder / "photos", {"durian": 12}, seed=5)
    done = program.train(words=("model.num_classes=3",))
    check(done.code in (64, 65), f"not refused; {done.end()}")
    program.check_error(done, done.code, "num_classes", "durian")
    return f"exit code {done.code}, the folders named"


@row(
    43,
    "leak",
    promise="reported",
    injection="an image of train, byte for byte, in val",
)
def leak(program: Program) -> str:
    write_images(program.folder / "given" / "train", {"apple": 12, "pear": 12, "plum": 12})
    write_images(program.folder / "given" / "val", {"apple": 6, "pear": 6, "plum": 6}, seed=1)
    shutil.copy(program.folder / "given/train/apple/003.png", program.folder / "given/val/apple/copy.png")
    done = program.train(root="given")
    check("copy.png" in done.text, f"not noticed; {done.end()}")
    return f"both files named, exit code {done.code}"
