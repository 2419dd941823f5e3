"""The folder of a sweep: made or taken up by one command at a time, and refused if it is another sweep's."""

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

from src.engine.commands.user_command import corrected, named
from src.engine.runs import logs
from src.engine.runs.errors import ExitCode, UserError
from src.engine.runs.files import locked, read_metrics, remove_leftovers, write_json
from src.engine.runs.run_dir import refuse_links
from src.engine.runs.run_settings import changed_settings
from src.engine.sweeps.settings import not_a_choice, sweep_command
from src.engine.sweeps.sweep_journal import JOURNAL, OVER, Journal, TrialRecord

log = logging.getLogger(__name__)

IDENTITY = "sweep.json"
STATE = ".tune"  # the folder of files that only the sweep itself reads
SCRATCH = "tune-"  # begins the name of the folder with Tune's own files, of which each start has a new one


@contextmanager
def open_sweep(folder: Path, identity: dict[str, Any], resume: str) -> Iterator[Journal]:
    """Makes or takes up the folder of a sweep, locked against other commands. Yields the journal of its earlier starts.

    identity: what makes two sweeps the same. resume: auto, true or false, as in the settings. Raises UserError.
    """
    resume = resume.lower()
    if resume not in ("auto", "true", "false"):
        raise not_a_choice("resume", resume, ("auto", "true", "false"))
    file = folder / IDENTITY
    if not file.exists():
        _check_resume(folder, resume, exists=False)  # before anything is made
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
        exists = file.exists() and bool(journal.trials)
        _check_resume(folder, resume, exists)
        identity = json.loads(json.dumps(identity, default=str))
        if exists:
            _refuse_another(folder, _read_identity(file), identity)
        write_json(file, identity)
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
    scratch = Path(tempfile.mkdtemp(prefix=SCRATCH, dir=folder / STATE))
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def returned_file(folder: Path, number: int) -> Path:
    """The return value of a job: {"value": ...}. The file is the proof that the job came to its end."""
    return folder / STATE / "returned" / f"{number}.json"


def returned(folder: Path, number: int) -> dict[str, Any] | None:
    """The content of that file; None where it is missing or damaged: then the job is to be done again."""
    file = returned_file(folder, number)
    try:
        content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) and "value" in content else None


def is_done(folder: Path, trial: TrialRecord, keeps_checkpoints: bool) -> bool:
    """Whether nothing of a trial is left to do: it is over, and measured unless the scheduler may let it go on."""
    measured = trial.value is not None or keeps_checkpoints or returned(folder, trial.number) is not None
    return trial.state in OVER and measured


def trained_rows(folder: Path) -> list[dict[str, float]]:
    """The rows of the metrics.csv of a trial's folder; [] where it is missing or damaged."""
    file = folder / "metrics.csv"
    try:
        rows = read_metrics(file) if file.is_file() else []
    except (OSError, ValueError, TypeError):
        return []
    return [row for row in rows if 1 <= row.get("epoch", 0) < 10**9]


def _refuse_what_cannot_be_written(folder: Path) -> None:
    """Refuses links out of the folder, pipes that would block, folders in the place of files."""
    refuse_links(folder, "*", f"{STATE}/*")
    files, folders = (IDENTITY, JOURNAL, "sweep.log", f"{STATE}/lock"), (STATE, f"{STATE}/returned")
    wrong = {name: "file" for name in files if (folder / name).exists() and not (folder / name).is_file()}
    wrong |= {name: "folder" for name in folders if (folder / name).exists() and not (folder / name).is_dir()}
    for name, kind in wrong.items():
        raise _of_no_sweep(folder / name, f"is no {kind}", "no sweep has made it: the folder comes from elsewhere")


def _read_identity(file: Path) -> dict[str, Any]:
    try:
        identity = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        identity = None
    if not isinstance(identity, dict):
        why = "it says which sweep the folder holds, and is damaged or comes from elsewhere"
        raise _of_no_sweep(file, "cannot be read", why)
    return identity


def _of_no_sweep(path: Path, problem: str, why: str) -> UserError:
    folder = path.parent.parent if path.parent.name == STATE else path.parent
    return UserError(
        f"{path.name} {problem}", where=str(path), why=why, fix=named(folder.name, "-2"), code=ExitCode.DATA
    )


def _check_resume(folder: Path, resume: str, exists: bool) -> None:
    """exists: whether the folder holds a sweep."""
    if resume == "true" and not exists:
        raise UserError(
            "there is no sweep to go on with",
            where=str(folder),
            why="resume=true asks for one; without a name= every sweep has a folder of its own",
            fix=sweep_command("resume=auto"),
            code=ExitCode.NO_INPUT,
        )
    if resume == "false" and exists:
        raise UserError(
            f"a sweep named {folder.name} exists already",
            where=str(folder),
            why="resume=false forbids to go on with it",
            fix=[sweep_command("resume=auto"), named(folder.name, "-2")],
        )


def _refuse_another(folder: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Settings that may change (src/engine/runs/run_settings.py) and lists of values that have grown make no other sweep."""
    if not isinstance(old.get("config"), dict) or not isinstance(old.get("space"), dict):
        log.warning(
            f"{folder.name} was begun by an earlier version: the settings that its trials share are not compared"
        )
        old = {key: value for key, value in old.items() if key not in ("space", "fixed", "config")}
        new = {key: new[key] for key in old if key in new}
    settings = changed_settings(old.get("config", {}), new.get("config", {}))
    space, new_space = old.get("space", {}), new.get("space", {})
    pairs = {key: (old.get(key), new.get(key)) for key in {**old, **new} if key not in ("config", "space")}
    changed = {key: (was, now) for key, (was, now) in pairs.items() if was != now}
    pairs = {key: (space.get(key), new_space.get(key)) for key in {**space, **new_space}}
    changed |= {key: (was, now) for key, (was, now) in pairs.items() if not _grew(was, now)}
    if not changed and not settings:
        return
    texts = {key: was if isinstance(was, str) else json.dumps(was) for key, (was, _) in settings.items()}
    words = [f"{key}={text}" for key, text in texts.items() if re.fullmatch(r"[\w./+-]+", text)]
    lines = [f"{key}: {was} there, {now} now" for key, (was, now) in {**settings, **changed}.items()]
    fixes = [named(folder.name, "-2")]
    if words and not changed:
        fixes.append(f"{corrected(*words)} # as it was")
    raise UserError(
        f"{folder.name} is the folder of another sweep",
        where=str(folder / IDENTITY),
        why="\n".join([*lines[:5], f"and {len(lines) - 5} more"] if len(lines) > 5 else lines),
        fix=fixes,
    )


def _grew(old: Any, new: Any) -> bool:
    """Whether a parameter has all values that it had."""
    both = isinstance(old, list) and isinstance(new, list)
    return old == new or (both and all(value in new for value in old))
