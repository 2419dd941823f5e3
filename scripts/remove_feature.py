"""Removes optional rooms from this project: their folders, their other files, the lines that are marked, their tests.

    python scripts/remove_feature.py --list                # the rooms, and what each is for
    python scripts/remove_feature.py sweeps --dry-run      # what would go
    python scripts/remove_feature.py sweeps pipeline       # several at once

Look at the changes with `git diff`, and undo them with `git restore .`. By hand it is the same: delete the files, the room's
line in src/features.py, and the lines that `git grep "room: NAME"` finds. More: docs/rooms.md.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from src import features as _  # noqa: E402, F401 (the rooms that are there)
from src.engine.features import FEATURES, Feature  # noqa: E402
from src.engine.runs.errors import UserError, run_and_report  # noqa: E402

PROGRAM = "python scripts/remove_feature.py"
FOLDERS = ("src", "tests", "scripts", "conf", "docs")
TEXTS = (".py", ".md", ".yaml", ".toml", ".txt", ".sh")
LINE_OF_A_FILE = ("tests/slow.txt", "tests/house/private_names.txt", "tests/house/silent_names.txt")


def chosen(names: Sequence[str]) -> list[Feature]:
    """The named rooms, and those that are of no use without them. Raises UserError."""
    rooms = {feature.name: feature for feature in FEATURES}
    for name in names:
        if name not in rooms:
            close = difflib.get_close_matches(name, rooms, n=1, cutoff=0.5)
            raise UserError(
                f"{name} is not a room of this project" + (f"; did you mean {close[0]}?" if close else ""),
                where="src/features.py",
                why=f"its rooms are {', '.join(rooms)}" if rooms else "it has none any more",
                fix=retyped(name, close[0]) if close else f"{PROGRAM} --list",
            )
    going = dict.fromkeys(names)
    while more := [room.name for room in FEATURES if room.name not in going and {*room.needs} & {*going}]:
        going |= dict.fromkeys(more)
    return [rooms[name] for name in going]


def retyped(old: str, new: str) -> str:
    """The user's command with one name in the place of another."""
    word = re.compile(rf"(?<![\w./-]){re.escape(old)}(?![\w-])")
    return shlex.join(["python", *(word.sub(new, typed) for typed in sys.argv)])


def check_git(force: bool) -> None:
    """Raises UserError where `git restore .` could not bring back what goes."""
    done = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True)
    if (done.returncode != 0 or done.stdout) and not force:
        raise UserError(
            "there are changes that are not committed" if done.returncode == 0 else "this is no git repository",
            where=str(ROOT),
            why="what is removed could not be told from them, and not be brought back",
            fix=['git commit -am "Before a room is removed"', f"{PROGRAM} --force {' '.join(sys.argv[1:])}"],
        )


def files_of(feature: Feature) -> list[Path]:
    """All files of a room that are there."""
    patterns = (f"src/engine/{feature.name}/", f"tests/engine/{feature.name}/", *feature.files)
    found = [path for pattern in patterns for path in sorted(ROOT.glob(pattern.rstrip("/")))]
    inside = [each for path in found for each in ([path] if path.is_file() else sorted(path.rglob("*")))]
    return [path for path in inside if path.is_file() and "__pycache__" not in path.parts]


def without(text: str, names: Sequence[str], is_markdown: bool) -> str:
    """The text without the lines that are marked `room: NAME`; in Markdown also without what belongs to such a line: the
    section of a heading, and the indented lines that continue a list's entry."""
    mark = re.compile(rf"\broom: ({'|'.join(names)})\b")
    kept: list[str] = []
    level, indent = 0, None  # of the heading, and of the line, that is being left out
    is_code = False
    for line in text.splitlines(keepends=True):
        is_code ^= is_markdown and line.startswith("```")
        heading = len(line) - len(line.lstrip("#")) if is_markdown and not is_code and re.match(r"#+ ", line) else 0
        margin = len(line) - len(line.lstrip())
        if level and (not heading or heading > level):
            continue
        level = 0
        if mark.search(line):
            level, indent = heading, margin if is_markdown else None
        elif indent is None or not line.strip() or margin <= indent:
            kept.append(line)
            indent = None
    return re.sub(r"\n{4,}", "\n\n\n", "".join(kept))  # around a class that is gone


def texts() -> list[Path]:
    """The project's text files."""
    paths = [*ROOT.glob("*"), *(path for name in FOLDERS for path in (ROOT / name).rglob("*"))]
    return [path for path in paths if path.suffix in TEXTS and path.is_file()]


def remove(rooms: Sequence[Feature]) -> None:
    names = [room.name for room in rooms]
    for path in [path for room in rooms for path in files_of(room)]:
        path.unlink(missing_ok=True)
    for name in FOLDERS:
        for folder in sorted((ROOT / name).rglob("*/"), reverse=True):
            if all(path.name == "__pycache__" or "__pycache__" in path.parts for path in folder.rglob("*")):
                _remove_empty(folder)
    line_of_room = re.compile(rf"^import src\.(\w+\.)*({'|'.join(names)})\.feature.*\n", re.MULTILINE)
    for path in texts():
        text = path.read_text(encoding="utf-8")
        left = without(text, names, path.suffix == ".md")
        name = path.relative_to(ROOT).as_posix()
        if name == "src/features.py":
            left = line_of_room.sub("", left).rstrip() + "\n"
        if name in LINE_OF_A_FILE:
            left = "".join(line for line in left.splitlines(keepends=True) if _is_there(line))
        if left != text:
            path.write_text(left, encoding="utf-8")


def _remove_empty(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()


def _is_there(line: str) -> bool:
    """Whether the file exists that a line of a list begins with."""
    return line.startswith("#") or (ROOT / re.split(r"::| \|", line.strip())[0]).exists()


def work() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rooms", nargs="*", metavar="ROOM")
    parser.add_argument("--list", action="store_true", help="the rooms, and what each is for")
    parser.add_argument("--dry-run", action="store_true", help="say what would go, and remove nothing")
    parser.add_argument("--force", action="store_true", help="also where git could not undo it")
    options = parser.parse_args()
    for file in sorted((ROOT / "src/engine").glob("*/feature.py")):  # a newer engine brings back what was removed
        importlib.import_module(f"src.engine.{file.parent.name}.feature")
    if options.list or not options.rooms:
        for room in FEATURES:
            needs = f" (needs {', '.join(room.needs)})" if room.needs else ""
            print(f"{room.name:<14} {room.about}{needs}")
        return
    rooms = chosen(options.rooms)
    if not options.dry_run:
        check_git(options.force)
    for room in rooms:
        files = files_of(room)
        lines = sum(len(path.read_bytes().splitlines()) for path in files if path.is_relative_to(ROOT / "src"))
        print(f"{room.name}: {len(files)} files, {lines:,} lines of src/")
        if options.dry_run:
            print("".join(f"  {path.relative_to(ROOT)}\n" for path in files), end="")
    if options.dry_run:
        return
    remove(rooms)
    print(
        "See it with git diff; pytest runs the tests of what is left, pip install -e . knows what is no longer needed."
    )


if __name__ == "__main__":
    sys.exit(run_and_report(work))
