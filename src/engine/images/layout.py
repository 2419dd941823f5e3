"""What the folders of data=image_folder mean: splits, classes, or neither. docs/data.md has the rule.

What has more than one reading is refused with the command for each: `data.layout=classes` takes every top folder as a class,
`data.layout=splits` the splits alone, and `data.root=` another folder as the set.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from src.engine.commands.user_command import corrected
from src.engine.images.scanning import holds_images, images_in, sub_folders
from src.engine.images.spelling import alike
from src.engine.runs.errors import UserError, data_error
from src.engine.runs.text import few, printable, shell_word

SPLIT_WORDS = {
    **dict.fromkeys(("train", "training", "trainval"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}


@dataclass
class Layout:
    """What the folders below root are."""

    parts: list[tuple[str, str | None]]  # every folder that holds class folders, and its split; None: to be made
    left_out: dict[str, str] = field(default_factory=dict)  # top folders that are not used, with the reason


def split_of(name: str) -> str | None:
    """train, val or test for a name that means one of them, alone or as its first or last part, else None."""
    parts = [part.lower() for part in re.split(r"[-_.+\s()\[\]]+|(?<=[a-z])(?=[A-Z])", name) if part]
    if not parts:
        return None
    first, last = (re.sub(r"(?<=[a-z])\d+$", "", part) for part in (parts[0], parts[-1]))
    return SPLIT_WORDS.get(first) or SPLIT_WORDS.get(last)


def choose_layout(root: Path, how: str) -> Layout:
    """What the top folders of root are. how: data.layout. Raises UserError where there is more than one reading."""
    if how == "classes":
        return Layout([("", None)])
    top = _with_images(root)
    splits = {name: split for name in top if (split := split_of(name))}
    labelled = [name for name in splits if _with_images(root / name)]
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
        empty = [name for name in sub_folders(root) if name not in top and split_of(name)]
        found = f"{_shown(labelled)} is the only folder with classes in {printable(root)}"
        hidden = f"; {_shown(empty)} hold no image" if empty else ""
        why = f"it is not known whether it is the whole set or one of its splits{hidden}"
        raise data_error(found, where=root, why=why, fix=_as_root(root / labelled[0]))
    return _only_splits(root, labelled, splits, unlabelled)


def _only_splits(root: Path, labelled: list[str], splits: dict[str, str], left_out: dict[str, str]) -> Layout:
    for split in ("train", "val", "test"):
        same = [name for name in labelled if splits[name] == split]
        if len(same) > 1:
            found = f"{_shown(same)} are all {split} folders"
            why = "one folder per split is read; move the others aside, or merge them"
            raise data_error(found, where=root, why=why, fix=[_move_aside(root, name) for name in reversed(same)][:3])
    if "train" not in [splits[name] for name in labelled]:
        readings = [_as_root(root / name) for name in labelled] + [_as_classes()] * (len(labelled) > 1)
        raise data_error(
            f"there is no train folder with classes{f' beside {_shown(labelled)}' if labelled else ''}",
            where=root,
            why="without it there is nothing to train on",
            fix=readings or "make train/CLASS/ folders, or list the images in a table: data=table",
        )
    return Layout([(name, splits[name]) for name in labelled], left_out)


def _without_labels(root: Path, labelled: list[str], splits: dict[str, str]) -> list[str]:
    """val or test folders with a single sub-folder that is no class of train: test/unknown/1.jpg is unlabelled too."""
    classes = {alike(name) for part in labelled if splits[part] == "train" for name in sub_folders(root / part)}
    held_out = {part: sub_folders(root / part) for part in labelled if classes and splits[part] != "train"}
    return [
        part
        for part, inside in held_out.items()
        if len(inside) == 1 and alike(inside[0]) not in classes and not _with_images(root / part / inside[0])
    ]


def _refuse_unlabelled(root: Path, splits: dict[str, str], others: list[str]) -> None:
    """Folders named as splits that hold images and no class folders."""
    held_out = [name for name in splits if splits[name] != "train"]
    if len(splits) > 1 and not others:  # a single folder of images is answered by the error about a single class
        raise data_error(
            f"{_shown(splits)} hold images, but no class folders",
            where=root,
            why="the class of an image is the folder it lies in, such as train/CLASS/1.jpg",
            fix=[
                corrected("data=table", "data.table=labels.csv", remove=["data.root"])
                + "   # columns path,label,split",
                _as_classes("if these are the classes"),
            ],
        )
    if splits and len(others) == 1 and len(sub_folders(root / others[0])) > 1 and not images_in(root / others[0]):
        found = f"{_shown(others)} has folders in it, and {_shown(splits)} beside it images only"
        why = "either the folders in it are the classes, or the two are"
        raise data_error(found, where=root, why=why, fix=[_as_root(root / others[0]), _as_classes()])
    if held_out and len(others) + len(splits) - len(held_out) > 1:
        raise data_error(
            f"{_shown(held_out)} may be a class, or images without labels, beside the folders {_shown(others)}",
            where=root,
            why="its name is that of a split, and it holds images but no class folders",
            fix=[_as_classes("it is a class"), *(f"{_move_aside(root, name)}   # it is not" for name in held_out[:2])],
        )


def _refuse_deeper(root: Path, top: list[str]) -> None:
    """Sets that begin further down: one folder around the set, as archives have it; more of them; or CLASS/train."""
    if len(top) == 1:
        inner = root / top[0]
        while len(inside := _with_images(inner)) == 1 and not images_in(inner):
            inner = inner / inside[0]
        if len(inside) > 1:
            raise data_error(
                f"the folders {_shown(inside)} lie in {_shown([inner.relative_to(root).as_posix()])}, a level deeper",
                where=root,
                why="as it stands, there would be only one class",
                fix=[_as_root(inner), _as_classes("to evaluate on one class")],
            )
    for name in top:
        inside = [sub for sub in _with_images(root / name) if split_of(sub)]
        if len({split_of(sub) for sub in inside}) < 2:
            continue
        if any(_with_images(root / name / sub) for sub in inside):
            found = f"the splits {_shown(inside)} lie in {_shown([name])}, a level deeper"
            why = "as it stands, the folders above them would be the classes"
            raise data_error(found, where=root, why=why, fix=[_as_root(root / name), _as_classes()])
        sorted_root = _beside(root, "by-split")
        move = 'for d in */*/; do c=${d%%/*}; s=${d#*/}; mkdir -p "$T/$s" && cp -r "$d" "$T/$s$c"; done'
        raise data_error(
            f"{_shown(inside)} lie inside the class folder {_shown([name])}",
            where=root,
            why="splits are read above the classes, as train/CLASS; below them they would be mixed",
            fix=[
                f"(cd {shell_word(root)} && T={shell_word(sorted_root)} && {move})",
                _as_root(sorted_root, "after that"),
                _as_classes("the split is made anew"),
            ],
        )


def _refuse_doubled(root: Path, labelled: list[str]) -> None:
    """training_set/training_set/CLASS, as some archives have it: the classes begin a folder deeper than the split."""
    inside = {name: sub_folders(root / name) for name in labelled}
    deeper = [
        f"{name}/{subs[0]}"
        for name, subs in inside.items()
        if len(subs) == 1 and len(_with_images(root / name / subs[0])) > 1
    ]
    if deeper:
        paths = [(shell_word(root / path), shell_word((root / path).parent)) for path in deeper]
        raise data_error(
            f"the classes lie in {_shown(deeper)}, a folder too deep",
            where=root,
            why="a split's own folders are its classes, and it would have only one",
            fix=" && ".join(f"mv {path}/* {above}/ && rmdir {path}" for path, above in paths)
            + "   # then repeat the command",
        )


def _refuse_same_inside(root: Path, top: list[str]) -> None:
    """Folders with the same folders in them and names that remind of splits, such as traindata/ and testdata/, fold1/."""
    if len(top) < 2 or not any(re.search("train|valid|test|fold|split|eval|holdout", name.lower()) for name in top):
        return
    inside = [{alike(sub) for sub in sub_folders(root / name)} for name in top]
    if len(inside[0]) > 1 and all(names == inside[0] for names in inside):
        raise data_error(
            f"{_shown(top)} hold the same folders: they may be splits, or classes",
            where=root,
            why="as it stands each would be a class; splits are named train, val and test",
            fix=[f"ls {shell_word(root)}   # rename the folders that are splits to train, val and test", _as_classes()],
        )


def _mixed(root: Path, labelled: list[str], splits: dict[str, str], others: list[str]) -> UserError:
    kinds = {splits[name] for name in labelled}
    readings = [_as_classes("every folder is a class")]
    if len(kinds) > 1 and "train" in kinds:
        readings.append(corrected("data.layout=splits") + f"   # without {_shown(others)}")
    readings += [_as_root(root / name) for name in labelled if splits[name] == "train"]
    if len(others) == 1 and "train" not in kinds:
        readings.append(f"mv {shell_word(root / others[0])} {shell_word(root / 'train')}   # it is what to train on")
    found = f"splits and other folders lie side by side: {_shown(labelled)} and {_shown(others)}"
    why = "it is not known which of the folders are classes; a split of another name can be renamed to val or test"
    return data_error(found, where=root, why=why, fix=readings)


def _with_images(folder: Path) -> list[str]:
    """The sub-folders with images in or below them."""
    return [name for name in sub_folders(folder) if holds_images(folder / name)]


def _as_classes(comment: str = "") -> str:
    return corrected("data.layout=classes") + (f"   # {comment}" if comment else "")


def _as_root(folder: Path, comment: str = "") -> str:
    return corrected(f"data.root={folder}") + (f"   # {comment}" if comment else "")


def _move_aside(root: Path, name: str) -> str:
    return f"mv {shell_word(root / name)} {shell_word(_beside(root, name))}"


def _beside(root: Path, name: str) -> Path:
    return root.absolute().with_name(f"{root.absolute().name}-{name}")


def _shown(names: Collection[str]) -> str:
    return few([f"{name}/" for name in names])
