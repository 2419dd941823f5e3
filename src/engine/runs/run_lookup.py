"""run= and model= of evaluate, predict and export. A wrong one is answered with the newest runs that have a model."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from src.engine.commands.user_command import corrected, is_typed, replaced, rewritten
from src.engine.runs.errors import ExitCode, UserError
from src.engine.runs.run_dir import read_result
from src.engine.runs.text import path_in, printable, shell_word

MOST_SUGGESTIONS = 3
FIRST_RUN = ["python -m src.train name=first"]
RUNS = Path("runs")


DOES = {"predict": "images", "evaluate": "data.root"}  # what a model/ folder is enough for


def find_run(text: str, needs_model: bool = True) -> Path:
    """The folder of a run, which has a model/ if it needs one; if not, that of data.folds will do too. Raises UserError, which
    says what the folder is instead."""
    path = path_in(text)
    if not needs_model and fold_runs(path):
        return path
    if len(parts := several(text)) > 1:
        why = "it takes one run; src.predict, src.evaluate and src.export take the mean of several"
        raise _refusal(f"run={printable(text)} names {len(parts)} runs", path, why, [corrected(f"run={parts[0]}")])
    found = f"run={printable(text)} is not the folder of a run"
    why = "it has no config.yaml" if path.exists() else "there is no such folder"
    outer = next((parent for parent in path.parents if (parent / "config.yaml").is_file()), None)
    if (path / "config.yaml").is_file():
        if has_model(path) or not needs_model:
            return path
        raise _without_model(path)
    if outer is not None:  # path is its model/, a checkpoint, a file in it
        found, why = f"run={printable(text)} lies in the folder of a run", "run= is the run's folder itself"
        fix = [corrected(f"run={outer}")]
    elif (path / "model.json").is_file():
        found = f"run={printable(text)} is a model/ folder without its run"
        why = "settings and split of the run are not in it; it can name classes, and be measured on other images"
        fix = [f"python -m src.{does} model={shell_word(path)} {on}=photos/" for does, on in DOES.items()]
        if is_typed("images") and not is_typed("format"):
            fix = [corrected(f"model={path}", remove=["run"])]
    elif path.is_dir() and (jobs := _usable(path)):
        found += f" but of {len(jobs)} finished runs"
        why = "its jobs are runs of their own; the table and the report of a sweep say which is best"
        fix = _commands(jobs)
    else:
        others = _usable(path.parent) or _usable(RUNS) or _usable(RUNS, "*/*")
        fix = _commands([run for run in others if run.name == path.name] or others) or FIRST_RUN
    raise _refusal(found, path, why, fix)


def find_model(text: str) -> Path:
    """A model/ folder. Raises UserError for a folder without a model."""
    path = path_in(text)
    if (path / "model.json").is_file():
        return path
    if has_model(path):
        fix = [corrected(f"model={path / 'model'}"), corrected(f"run={path}", remove=["model"])]
        why = "model= is the model/ folder in it, wherever it was copied to"
        raise _refusal(f"model={printable(text)} is the folder of a run", path, why, fix)
    fix = [corrected(f"model={run / 'model'}") for run in (_usable(path.parent) or _usable(RUNS))[:MOST_SUGGESTIONS]]
    why = "a run writes its model/ when it ends; one that was interrupted has none yet"
    raise _refusal(f"{printable(text)} holds no model: model.json is missing", path, why, fix or FIRST_RUN)


def find_run_or_model(run: str | None, model: str | None, command: str) -> tuple[Path | None, Path]:
    """The folder of a run, if run= names one, and its model/ folder, or that of model=. Raises UserError."""
    if (run is None) == (model is None):
        raise UserError(
            "either run= or model= must be given" + (", not both" if run else ""),
            why="run= is the folder of a run, model= the model/ folder of one, wherever it was copied to",
            fix=corrected(remove=["model"]) if run else f"python -m {command} --help",
        )
    if run is None:
        return None, find_model(model or "")
    folder = find_run(run)
    return folder, folder / "model"


def find_runs_or_models(run: str | None, model: str | None, command: str) -> tuple[list[Path], list[Path]]:
    """The folders of run=, or of run=[one,another], and their model/ folders, or those of model=. The folder of
    data.folds stands for its runs. Raises UserError."""
    if run is None or model is not None:
        pairs = [find_run_or_model(run, text, command) for text in (several(model) if model else [model])]
    else:
        runs = [str(one) for text in several(run) for one in fold_runs(path_in(text)) or [text]]
        pairs = [find_run_or_model(text, None, command) for text in runs]
    return [run for run, _ in pairs if run], [folder for _, folder in pairs]


def fold_runs(path: Path) -> list[Path]:
    """The folders of the runs below that of data.folds, in their order; none where it is another folder."""
    runs = [run for run in path.glob("fold_*") if run.name[5:].isdecimal() and (run / "config.yaml").exists()]
    return sorted(runs, key=lambda run: int(run.name[5:]))


def runs_to_compare(words: Sequence[str], usage: str) -> tuple[list[Path], str]:
    """The folders of finished runs, and the value of out=, or nothing. usage: what --help prints. Raises UserError."""
    if not words or {"-h", "--help"} & {*words}:
        print(usage.strip())
        sys.exit(ExitCode.OK if words else ExitCode.CONFIG)
    outs = [word for word in words if word.startswith("out=") and word != "out="]
    texts = [word.removeprefix("run=") for word in words if word not in outs]
    if wrong := next((word for word in texts if word.startswith("-") or not path_in(word).is_dir()), None):
        found = next((run for run in _usable(RUNS) if run.name == Path(wrong).name), None)
        fix = replaced(wrong, str(found)) if found else "ls -d runs/*"
        why = "src.compare takes the folders of runs, and out=FILE.png"
        raise UserError(f"{printable(wrong)} is not a folder", why=why, fix=fix, code=ExitCode.NO_INPUT)
    runs = list(dict.fromkeys(path_in(text) for text in texts))
    for run in runs:
        if not (run / "config.yaml").is_file() and (jobs := _usable(run)):
            fix = replaced(str(run), *map(str, jobs))
            raise _refusal(
                f"{printable(run)} is the folder of {len(jobs)} runs", run, "each is a run of its own", [fix]
            )
        if not (run / "config.yaml").is_file() or not read_result(run).get("metrics"):
            why = "it has no numbers; a run has them when it is finished"
            raise _refusal(
                f"{printable(run)} is no finished run", run, why, [rewritten([w for w in words if w != str(run)])]
            )
    if len(runs) < 2:
        known = " ".join(shell_word(run) for run in _usable(RUNS)[:MOST_SUGGESTIONS])
        why = "a comparison is of two runs or more"
        raise UserError("one run is given", why=why, fix=f"python -m src.compare {known or 'runs/*'}")
    return runs, outs[-1].removeprefix("out=") if outs else ""


def several(text: str) -> list[str]:
    """The parts of '[one,another]', unless a folder is called that."""
    if text[:1] == "[" and text[-1:] == "]" and not path_in(text).exists():
        return [part.strip() for part in text[1:-1].split(",") if part.strip()] or [text]
    return [text]


def _refusal(message: str, path: Path, why: str, fix: list[str]) -> UserError:
    return UserError(message, where=str(path.absolute()), why=why, fix=fix, code=ExitCode.NO_INPUT)


def has_model(run: Path) -> bool:
    return (run / "model" / "model.json").is_file()


def _without_model(path: Path) -> UserError:
    """The error for a run that is not finished: its state, and the command that finishes it."""
    result = read_result(path)
    state = str(result.get("state", "not finished"))
    why = {
        "running": "it is under way, or was killed; model/ is written at its end",
        "interrupted": "it was interrupted; model/ is written at its end, and the same command continues it",
        "failed": f"it failed: {printable(result.get('error', ''))}",
        "finished": "it finished, and its model/ was moved or deleted since",
    }.get(state, "model/ is written at the end of a run")
    continuing = _own_command(result.get("command")) if state != "finished" else []
    found = f"the run {printable(path.name)} has no model ({printable(state)}): model/model.json is missing"
    return _refusal(found, path / "model", why, [*continuing, *_commands(_usable(path.parent))] or FIRST_RUN)


def _own_command(text: object) -> list[str]:
    """The text of a result.json, if it is a command of this program; not with anything that the shell would interpret."""
    with suppress(ValueError):
        if isinstance(text, str) and text.startswith("python -m src.train ") and shlex.join(shlex.split(text)) == text:
            return [text]
    return []


def _commands(runs: list[Path]) -> list[str]:
    return [corrected(f"run={run}") for run in runs[:MOST_SUGGESTIONS]]


def _usable(folder: Path, pattern: str = "*") -> list[Path]:
    """The runs in a folder that have a model, newest first."""
    runs = [run for run in folder.glob(pattern) if (run / "config.yaml").is_file() and has_model(run)]
    return sorted(runs, key=lambda run: (run / "config.yaml").stat().st_mtime, reverse=True)
