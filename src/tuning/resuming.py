"""The folder of a sweep: made or taken up, by one command at a time, and refused where it is another sweep's."""

from __future__ import annotations

import json
import logging
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from src import logs
from src.errors import ExitCode, UserError
from src.files import locked, remove_leftovers, write_json
from src.reporting.sweep_journal import JOURNAL, Journal
from src.run_dir import refuse_links
from src.run_settings import changed_settings
from src.tuning.commands import sweep_command
from src.tuning.job import STATE
from src.user_command import corrected, named

log = logging.getLogger(__name__)

IDENTITY = "sweep.json"
SCRATCH = "tune-"  # begins the name of the folder with Tune's own files, of which each start has a new one


@contextmanager
def open_sweep(folder: Path, identity: dict[str, Any], resume: str) -> Iterator[Journal]:
    """Makes or takes up the folder of a sweep, which no other command has meanwhile. Yields what happened in it so far.

    identity: what makes two sweeps the same. resume: auto, true or false, as in the settings. Raises UserError.
    """
    resume = resume.lower()
    if resume not in ("auto", "true", "false"):
        raise UserError(
            f"resume={resume} is not a choice", why="it is auto, true or false", fix=sweep_command("resume=auto")
        )
    made = folder / IDENTITY
    if not made.exists():
        _check_resume(folder, resume, there=False)  # before anything is made
    _refuse_what_cannot_be_written(folder)
    (folder / STATE / "returned").mkdir(parents=True, exist_ok=True)
    busy = UserError(
        f"another command works on the sweep {folder.name}",
        where=str(folder),
        why="both would write into the folders of its trials",
        fix=["wait for it to end", f"{named(folder.name, '-2')} # another name"],
        code=ExitCode.BUSY,
    )
    with locked(folder / STATE / "lock", busy):
        for part in (folder, folder / STATE / "returned"):
            remove_leftovers(part)
        journal = Journal(folder)
        there = made.exists() and bool(journal.trials)
        _check_resume(folder, resume, there)
        identity = json.loads(json.dumps(identity, default=str))
        if there:
            _refuse_another(folder, _read(made), identity)
        write_json(made, identity)
        with logs.to_file(folder / "sweep.log"):
            if journal.damaged:
                lines = ", ".join(map(str, journal.damaged[:10])) + (" ..." if len(journal.damaged) > 10 else "")
                log.warning(f"{journal.path.name} is damaged: what lines {lines} said of their trials is lost")
            yield journal


@contextmanager
def scratch_folder(folder: Path) -> Iterator[Path]:
    """A new folder for Tune's own files, on a disk that all machines of the sweep share. Nothing of an earlier start is read:
    those files are pickles, and the folder may come from elsewhere."""
    for old in (*(folder / STATE).glob(f"{SCRATCH}*"), folder / STATE / "state"):
        shutil.rmtree(old, ignore_errors=True)
    made = Path(tempfile.mkdtemp(prefix=SCRATCH, dir=folder / STATE))
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _refuse_what_cannot_be_written(folder: Path) -> None:
    """Links that lead out of the folder, pipes that would be waited for, folders in the place of files."""
    refuse_links(folder, "*", f"{STATE}/*")
    files, folders = (IDENTITY, JOURNAL, "sweep.log", f"{STATE}/lock"), (STATE, f"{STATE}/returned")
    for name in (*files, *folders):
        path = folder / name
        if path.exists() and not (path.is_file() if name in files else path.is_dir()):
            raise UserError(
                f"{name} is no {'file' if name in files else 'folder'}",
                where=str(path),
                why="no sweep has made it: the folder comes from elsewhere",
                fix=named(folder.name, "-2"),
                code=ExitCode.DATA,
            )


def _read(made: Path) -> dict[str, Any]:
    try:
        old = json.loads(made.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        old = None
    if not isinstance(old, dict):
        raise UserError(
            f"{made.name} cannot be read",
            where=str(made),
            why="it says which sweep the folder holds, and is damaged or comes from elsewhere",
            fix=named(made.parent.name, "-2"),
            code=ExitCode.DATA,
        )
    return old


def _check_resume(folder: Path, resume: str, there: bool) -> None:
    """there: whether the folder holds a sweep."""
    if resume == "true" and not there:
        raise UserError(
            "there is no sweep to go on with",
            where=str(folder),
            why="resume=true asks for one; without a name= every sweep has a folder of its own",
            fix=sweep_command("resume=auto"),
            code=ExitCode.NO_INPUT,
        )
    if resume == "false" and there:
        raise UserError(
            f"a sweep named {folder.name} exists already",
            where=str(folder),
            why="resume=false forbids to go on with it",
            fix=[sweep_command("resume=auto"), named(folder.name, "-2")],
        )


def _refuse_another(folder: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Settings that may change (src/run_settings.py) and lists of values that have grown make no other sweep."""
    if not isinstance(old.get("config"), dict) or not isinstance(old.get("space"), dict):
        log.warning(
            f"{folder.name} was begun by an earlier version: the settings that its trials share are not compared"
        )
        old = {key: value for key, value in old.items() if key not in ("space", "fixed", "config")}
        new = {key: new[key] for key in old if key in new}
    settings = changed_settings(old.get("config", {}), new.get("config", {}))
    space, now = old.get("space", {}), new.get("space", {})
    others = [key for key in {**old, **new} if key not in ("config", "space")]
    changed = {key: (old.get(key), new.get(key)) for key in others if old.get(key) != new.get(key)}
    changed |= {
        key: (space.get(key), now.get(key)) for key in {**space, **now} if not _grew(space.get(key), now.get(key))
    }
    if changed or settings:
        texts = {key: was if isinstance(was, str) else json.dumps(was) for key, (was, _) in settings.items()}
        words = [f"{key}={text}" for key, text in texts.items() if re.fullmatch(r"[\w./+-]+", text)]
        shown = [f"{key}: {was} there, {now} now" for key, (was, now) in {**settings, **changed}.items()]
        raise UserError(
            f"{folder.name} is the folder of another sweep",
            where=str(folder / IDENTITY),
            why="\n".join([*shown[:5], f"and {len(shown) - 5} more"] if len(shown) > 5 else shown),
            fix=[named(folder.name, "-2"), *([f"{corrected(*words)} # as it was"] if words and not changed else [])],
        )


def _grew(old: Any, new: Any) -> bool:
    """Whether a parameter has all values that it had."""
    both = isinstance(old, list) and isinstance(new, list)
    return old == new or (both and all(value in new for value in old))
