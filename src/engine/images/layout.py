"""What the folders of data=image_folder mean. This docstring is the rule; docs/data.md has it with examples.

**Not part of the set** are hidden entries (.git, .DS_Store, ._1.jpg) and those that NAS, desktop and notebook programs
make (@eaDir, #recycle, $RECYCLE.BIN, lost+found, __MACOSX, Thumbs.db; the list is in src/engine/images/scanning.py). They are
left out and counted.

**A split** is a folder whose name is one of these words, in any case, alone or as its first or last part behind a
separator (- _ . + blank, brackets, a capital) or before digits: train, training, trainval; val, valid, validation, dev;
test, testing. So seg_train, test_images, images.val, TrainImages and train2017 are splits. The words of a table's column
`split` follow the same rule.

**A class** is every other folder with images in it or below it; with splits, every folder in a split.

How the top folders are read, images directly in a folder counting as unlabelled (a "flat" folder):

- none is a split: they are the classes;
- train/CLASS with val/CLASS, test/CLASS or both: the splits; without val, a part of train is held out for it;
- a flat val/ or test/ beside train/CLASS, or one with a single folder that is no class of train: left out, and said;
- a flat val/ or test/ beside a single flat folder: two classes;
- a flat train/ beside flat folders of other names: a class, since nothing could be trained on otherwise.

Everything else has more than one reading, and is refused with the command for each: `data.layout=classes` takes every
top folder as a class, `data.layout=splits` the splits alone, and `data.root=` another folder as the set.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from src.engine.commands.user_command import corrected
from src.engine.images.scanning import holds_images, images_in, sub_folders
from src.engine.images.spelling import alike
from src.engine.runs.errors import ExitCode, UserError
from src.engine.runs.text import few, printable, shell_word

SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "trainval": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}


@dataclass
class Layout:
    """parts: (folder below root, its split) of every folder that holds class folders; split None: to be made.

    left_out: top folders that are not used, with the reason.
    """

    parts: list[tuple[str, str | None]]
    left_out: dict[str, str] = field(default_factory=dict)


def split_of(name: str) -> str | None:
    """train, val or test for a name that means one of them by the rule above, else None."""
    parts = [part.lower() for part in re.split(r"[-_.+\s()\[\]]+|(?<=[a-z])(?=[A-Z])", name) if part]
    if not parts:
        return None
    first, last = (re.sub(r"(?<=[a-z])\d+$", "", part) for part in (parts[0], parts[-1]))
    return SPLIT_WORDS.get(first) or SPLIT_WORDS.get(last)


def choose_layout(root: Path, how: str) -> Layout:
    """What the top folders of root are. how: data.layout. Raises UserError where there is more than one reading."""
    if how == "classes":
        return Layout([("", None)])
    top = [name for name in sub_folders(root) if holds_images(root / name)]
    splits = {name: split for name in top if (split := split_of(name))}
    labelled = [name for name in splits if any(holds_images(root / name / sub) for sub in sub_folders(root / name))]
    unlabelled = {name: "it has no class folders" for name in splits if name not in labelled}
    others = [name for name in top if name not in splits]
    for name in _without_labels(root, labelled, splits):
        labelled.remove(name)
        unlabelled[name] = "its one folder is no class of the training images"

    if how == "splits":
        return _only_splits(root, labelled, splits, unlabelled | dict.fromkeys(others, "it is no split"))
    if not labelled:
        _refuse_unlabelled(root, splits, others)
        _refuse_deeper(root, top)
        _refuse_same_inside(root, top)
        return Layout([("", None)])
    _refuse_doubled(root, labelled)
    if others:
        raise _mixed(root, labelled, splits, others)
    if len(labelled) == 1 and splits[labelled[0]] == "train" and unlabelled:
        return Layout([(labelled[0], None)], unlabelled)
    if len(labelled) == 1:
        raise _unclear(
            root,
            f"{_shown(labelled)} is the only folder with classes in {printable(str(root))}",
            "it is not known whether it is the whole set or one of its splits" + _empty_splits(root, top),
            [corrected(f"data.root={root / labelled[0]}")],
        )
    return _only_splits(root, labelled, splits, unlabelled)


def _only_splits(root: Path, labelled: list[str], splits: dict[str, str], left_out: dict[str, str]) -> Layout:
    for split in ("train", "val", "test"):
        same = [name for name in labelled if splits[name] == split]
        if len(same) > 1:
            aside = [f"mv {shell_word(root / name)} {shell_word(_beside(root, name))}" for name in same[::-1]]
            raise _unclear(
                root,
                f"{_shown(same)} are all {split} folders",
                "one folder per split is read; move the others aside, or merge them",
                aside[:3],
            )
    if "train" not in [splits[name] for name in labelled]:
        readings = [corrected(f"data.root={root / name}") for name in labelled]
        several = [corrected("data.layout=classes")] if len(labelled) > 1 else []
        raise _unclear(
            root,
            f"there is no train folder with classes{f' beside {_shown(labelled)}' if labelled else ''}",
            "without it there is nothing to train on",
            readings + several or ["make train/CLASS/ folders, or list the images in a table: data=table"],
        )
    return Layout([(name, splits[name]) for name in labelled], left_out)


def _without_labels(root: Path, labelled: list[str], splits: dict[str, str]) -> list[str]:
    """val or test folders with a single sub-folder that is no class of train: test/unknown/1.jpg is unlabelled too."""
    classes = {alike(name) for part in labelled if splits[part] == "train" for name in sub_folders(root / part)}
    if not classes:
        return []
    held_out = {part: sub_folders(root / part) for part in labelled if splits[part] != "train"}
    alone = {part: names[0] for part, names in held_out.items() if len(names) == 1}
    return [
        part for part, name in alone.items() if alike(name) not in classes and not _num_with_images(root / part / name)
    ]


def _refuse_unlabelled(root: Path, splits: dict[str, str], others: list[str]) -> None:
    """Folders named as splits that hold images and no class folders."""
    if splits and not others:
        if len(splits) == 1:
            return  # one folder of images: the error about a single class says it
        raise _unclear(
            root,
            f"{_shown(splits)} hold images, but no class folders",
            "the class of an image is the folder it lies in, such as train/CLASS/1.jpg",
            [
                corrected("data=table", "data.table=labels.csv", remove=["data.root"])
                + "   # columns path,label,split",
                corrected("data.layout=classes") + "   # if these are the classes",
            ],
        )
    held_out = [name for name in splits if splits[name] != "train"]
    if splits and len(others) == 1 and len(sub_folders(root / others[0])) > 1 and not images_in(root / others[0]):
        raise _unclear(
            root,
            f"{_shown(others)} has folders in it, and {_shown(splits)} beside it images only",
            "either the folders in it are the classes, or the two are",
            [corrected(f"data.root={root / others[0]}"), corrected("data.layout=classes")],
        )
    if held_out and len(others) + len(splits) - len(held_out) > 1:
        raise _unclear(
            root,
            f"{_shown(held_out)} may be a class, or images without labels, beside the folders {_shown(others)}",
            "its name is that of a split, and it holds images but no class folders",
            [corrected("data.layout=classes") + "   # it is a class"]
            + [
                f"mv {shell_word(root / name)} {shell_word(_beside(root, name))}   # it is not" for name in held_out[:2]
            ],
        )


def _refuse_deeper(root: Path, top: list[str]) -> None:
    """Sets that begin further down: images/train/CLASS, archive/photos/CLASS, or CLASS/train."""
    for name in top:
        inside = [sub for sub in sub_folders(root / name) if split_of(sub) and holds_images(root / name / sub)]
        if len({split_of(sub) for sub in inside}) < 2:
            continue
        if len(top) == 1 or any(_num_with_images(root / name / sub) for sub in inside):
            raise _unclear(
                root,
                f"the splits {_shown(inside)} lie in {_shown([name])}, a folder deeper",
                "as it stands, the folders above them would be the classes",
                [corrected(f"data.root={root / name}"), corrected("data.layout=classes")],
            )
        sorted_root = root.absolute().with_name(f"{root.absolute().name}-by-split")
        move = 'for d in */*/; do c=${d%%/*}; s=${d#*/}; mkdir -p "$T/$s" && cp -r "$d" "$T/$s$c"; done'
        raise _unclear(
            root,
            f"{_shown(inside)} lie inside the class folder {_shown([name])}",
            "splits are read above the classes, as train/CLASS; below them they would be mixed",
            [
                f"(cd {shell_word(root)} && T={shell_word(sorted_root)} && {move})",
                corrected(f"data.root={sorted_root}") + "   # after that",
                corrected("data.layout=classes") + "   # the split is made anew",
            ],
        )
    if len(top) == 1:
        _refuse_wrapper(root, root / top[0])


def _refuse_wrapper(root: Path, inner: Path) -> None:
    """A single folder around the set, as archives have it."""
    while True:
        inside = [name for name in sub_folders(inner) if holds_images(inner / name)]
        if len(inside) != 1 or images_in(inner):
            break
        inner = inner / inside[0]
    if len(inside) > 1:
        raise _unclear(
            root,
            f"the folders {_shown(inside)} lie in {_shown([inner.relative_to(root).as_posix()])}, a level deeper",
            "as it stands, there would be only one class",
            [corrected(f"data.root={inner}"), corrected("data.layout=classes") + "   # to evaluate on one class"],
        )


def _refuse_doubled(root: Path, labelled: list[str]) -> None:
    """training_set/training_set/CLASS, as some archives have it: the classes begin a folder deeper than the split."""
    deeper = {}
    for name in labelled:
        inside = sub_folders(root / name)
        if len(inside) == 1 and _num_with_images(root / name / inside[0]) > 1:
            deeper[name] = inside[0]
    if deeper:
        move = [
            f"mv {shell_word(root / name / inner)}/* {shell_word(root / name)}/ && rmdir {shell_word(root / name / inner)}"
            for name, inner in deeper.items()
        ]
        raise _unclear(
            root,
            f"the classes lie in {_shown([f'{name}/{inner}' for name, inner in deeper.items()])}, a folder too deep",
            "a split's own folders are its classes, and it would have only one",
            [" && ".join(move) + "   # then repeat the command"],
        )


def _num_with_images(folder: Path) -> int:
    return sum(holds_images(folder / name) for name in sub_folders(folder))


def _refuse_same_inside(root: Path, top: list[str]) -> None:
    """Folders with the same folders in them and names that remind of splits, such as traindata/ and testdata/, fold1/."""
    if not any(re.search("train|valid|test|fold|split|eval|holdout", name.lower()) for name in top):
        return
    inside = [{alike(sub) for sub in sub_folders(root / name)} for name in top]
    if len(top) > 1 and len(inside[0]) > 1 and all(names == inside[0] for names in inside):
        raise _unclear(
            root,
            f"{_shown(top)} hold the same folders: they may be splits, or classes",
            "as it stands each would be a class; splits are named train, val and test",
            [
                f"ls {shell_word(root)}   # rename the folders that are splits to train, val and test",
                corrected("data.layout=classes"),
            ],
        )


def _empty_splits(root: Path, top: list[str]) -> str:
    empty = [name for name in sub_folders(root) if name not in top and split_of(name)]
    return f"; {_shown(empty)} hold no image" if empty else ""


def _mixed(root: Path, labelled: list[str], splits: dict[str, str], others: list[str]) -> UserError:
    readings = [corrected("data.layout=classes") + "   # every folder is a class"]
    if len({splits[name] for name in labelled}) > 1 and "train" in {splits[name] for name in labelled}:
        readings.append(corrected("data.layout=splits") + f"   # without {_shown(others)}")
    readings += [corrected(f"data.root={root / name}") for name in labelled if splits[name] == "train"]
    if len(others) == 1 and "train" not in {splits[name] for name in labelled}:
        readings.append(f"mv {shell_word(root / others[0])} {shell_word(root / 'train')}   # it is what to train on")
    return _unclear(
        root,
        f"splits and other folders lie side by side: {_shown(labelled)} and {_shown(others)}",
        "it is not known which of the folders are classes; a split of another name can be renamed to val or test",
        readings,
    )


def _unclear(root: Path, found: str, why: str, readings: list[str]) -> UserError:
    return UserError(found, where=printable(str(root.absolute())), why=why, fix=readings, code=ExitCode.DATA)


def _shown(names: Collection[str]) -> str:
    return few([f"{name}/" for name in names])


def _beside(root: Path, name: str) -> Path:
    return root.absolute().with_name(f"{root.absolute().name}-{name}")
