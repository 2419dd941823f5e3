"""Lists the images of data=image_folder and of predict's images=, without opening any.

What a folder means is the rule of src/engine/images/layout.py. What is not used is counted and said.
"""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path

from src.engine.commands.user_command import corrected
from src.engine.images import scanning
from src.engine.images.formats import EXTENSIONS
from src.engine.images.labelled_images import Listing
from src.engine.images.layout import choose_layout
from src.engine.images.scanning import Omissions, how_to_convert, images_below, images_in, sub_folders
from src.engine.images.spelling import refuse_alike
from src.engine.runs.errors import ExitCode, UserError, data_error
from src.engine.runs.files import existing_parent
from src.engine.runs.text import few, printable, shell_word

log = logging.getLogger(__name__)


def list_image_folder(root: Path, layout: str = "auto") -> Listing:
    """The images below root, by the rule of src/engine/images/layout.py. layout: data.layout.

    Raises UserError for a root that is no folder, holds no image, has a class folder without one, can be read in more
    than one way, or has classes whose names differ only in how they are written.
    """
    _check_is_folder(root)
    plan = choose_layout(root, layout)
    listing = Listing(root, splits=[] if plan.parts[0][1] else None)
    left_out = Omissions()
    scanning.scan(root, left_out)
    empty: dict[Path, Counter[str]] = {}
    loose: dict[Path, int] = {}
    for part, split in plan.parts:
        folder = root / part
        if part:
            scanning.scan(folder, left_out)
        loose[folder] = len(images_in(folder))
        for label in sub_folders(folder):
            inside = Omissions()
            paths = list(images_below(folder / label, inside, above=(root, folder)))
            left_out.endings += inside.endings
            left_out.system += inside.system
            if not paths:
                empty[folder / label] = inside.endings
            listing.names += [path.relative_to(root).as_posix() for path in paths]
            listing.labels += [label] * len(paths)
            if listing.splits is not None:
                listing.splits += [split] * len(paths)
    if not listing.names:
        raise _nothing_found(root, left_out)
    if empty:
        raise _empty_classes(root, empty)
    refuse_alike(listing.labels, root, f"give the folders of a class one name: ls {shell_word(root)}")
    for sentence in left_out.sentences(root):
        log.warning(sentence)
    for folder, count in loose.items():
        if count:
            log.warning(f"Images directly in {printable(folder)}, in no class folder, left out: {count}")
    if listing.splits is not None or plan.parts[0][0]:
        used = [name for name, _ in plan.parts] + list(plan.left_out)
        if without := [name for name in sub_folders(root) if name not in used]:
            log.warning(f"Beside the splits these folders hold no image: {few(without)}")
    for name, reason in plan.left_out.items():
        log.warning(
            f"{printable(root / name)} is left out: {reason}. After training, predict takes its images: "
            f"python -m src.predict run=RUN images={shell_word(root / name)}"
        )
    return listing


def list_images(path: Path) -> list[Path]:
    """Every image below a folder, or the one file: what images= names. Raises UserError where there is none."""
    if path.is_file():
        return [path]
    if not path.exists():
        parent = existing_parent(path)
        raise UserError(
            f"images={printable(path)} does not exist",
            where=str(path.absolute()),
            why="relative paths start from the folder the command is run in",
            # No shell replaces the * behind a =.
            fix=corrected(f"images={parent}") if "*" in path.name else f"ls {shell_word(parent)}",
            code=ExitCode.NO_INPUT,
        )
    if not path.is_dir():
        found = f"{printable(path)} is neither a folder nor a file"
        why = "a device or a pipe holds no images"
        raise data_error(found, where=path, why=why, fix=f"ls -l {shell_word(path)}")
    left_out = Omissions()
    images = list(images_below(path, left_out))
    for sentence in left_out.sentences(path):
        log.warning(sentence)
    if not images:
        raise UserError(
            f"no image was found in {printable(path)}",
            where=str(path.absolute()),
            why="it and its sub-folders hold no file of a format that is read",
            fix=f"find {shell_word(path)} -type f | head",
            code=ExitCode.NO_INPUT,
        )
    return images


def _check_is_folder(root: Path) -> None:
    found = f"data.root={printable(root)} is not a folder"
    why, fix = "data=image_folder reads one sub-folder per class", f"ls {shell_word(existing_parent(root))}"
    try:
        if root.is_dir():
            return
    except OSError as error:
        found = f"data.root={printable(root)} cannot be looked into: {error.strerror}"
        why, fix = "a folder above it may not be entered, or the path is too long", f"ls -ld {shell_word(root.parent)}"
    raise UserError(found, where=printable(root.absolute()), why=why, fix=fix, code=ExitCode.NO_INPUT)


def _nothing_found(root: Path, left_out: Omissions) -> UserError:
    """No class folder has an image: they lie a level too high, or are of formats that are not read."""
    loose = images_in(root)
    if not loose:
        expected = f"expected one folder per class with files ending in {', '.join(sorted(EXTENSIONS))}"
        found = f"no image was found in {printable(root)}"
        why = "\n".join([expected, *left_out.sentences(root)])
        return data_error(found, where=root, why=why, fix=f"find {shell_word(root)} -type f | head")
    above, class_folder = root.absolute().parent, shell_word(root / "CLASS")
    fix = [
        f"mkdir {class_folder}; mv {shell_word(root / loose[0])} {class_folder}/   # and so on: one folder per class"
    ]
    if sum(scanning.holds_images(above / name) for name in sub_folders(above)) > 1:
        fix.append(corrected(f"data.root={above}") + "   # if this folder is one of the classes")
    fix.append(corrected("data=table", "data.table=labels.csv", f"data.root={root}") + "   # columns path,label")
    found = f"{len(loose)} images lie directly in {printable(root)}, in no class folder"
    why = "they lie one level too high: the class of an image is the name of the folder it lies in"
    return data_error(found, where=root, why=why, fix=fix)


def _empty_classes(root: Path, empty: dict[Path, Counter[str]]) -> UserError:
    """Class folders without an image. A folder is only ever removed if it is empty: it may be full of photos."""
    names = {path.relative_to(root).as_posix(): kinds for path, kinds in empty.items()}
    held = [
        f"{printable(name)} holds {scanning.counts(kinds, 4)}{how_to_convert(kinds)}"
        for name, kinds in list(names.items())[:4]
        if kinds
    ]
    first = next(iter(empty))
    aside = root.absolute().with_name("-".join([root.absolute().name, *first.relative_to(root).parts]))
    fix = [f"mv {shell_word(first)} {shell_word(aside)}", "put images into it"]
    if any(how_to_convert(kinds) for kinds in empty.values()):
        fix = ["convert the files to JPEG or PNG, in the same folder", fix[0] + "   # without the class"]
    found = f"{len(empty)} class folder{'s have' if len(empty) > 1 else ' has'} no image: {few(names, 5)}"
    why = "\n".join(["a class without images cannot be learned; its number would be in the model all the same", *held])
    return data_error(found, where=root, why=why, fix=fix)
