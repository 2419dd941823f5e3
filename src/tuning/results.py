"""The end of a sweep, made from its journal alone: files for programs, the ranking on the screen, what failed.

What is shown while it runs: src/tuning/table.py; the page with plots: src/reporting/sweep_report.py.
"""

from __future__ import annotations

import logging
import os
import shlex
import textwrap
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from src.errors import ExitCode, UserError
from src.files import write_csv, write_text
from src.hydra_words import without_quotes
from src.reporting.goal import Goal
from src.reporting.sweep_journal import DIVERGED, FAILED, PRUNED, Journal, TrialRecord, counted, ranking
from src.reporting.sweep_report import write_sweep_report
from src.reporting.sweep_scale import duration, shown
from src.tuning.table import best_text, short_names
from src.user_command import named

log = logging.getLogger(__name__)

SHOWN = 10  # places of the ranking on the screen; sweep.csv has all
LISTED = 8  # failed trials in an error, which has 15 lines
LINE = 110  # what an error shows in one line
IMPORT_SECONDS = 5.0  # of torch and Lightning, which Hydra's basic launcher does once


def conclude(folder: Path, journal: Journal, goal: Goal) -> None:
    """Writes the files and the report of a sweep, and prints its ranking."""
    shown_as = Path(os.path.relpath(folder))
    results = write_results(folder, journal, goal, folder.name)
    try:
        write_sweep_report(folder, goal, results.get("command", ""))
    except Exception:  # the sweep is done by now: a page that cannot be made must not turn it into a failed one
        log.warning("the sweep's report.html could not be written; sweep.log says why", exc_info=True)
    print_ranking(journal, goal, shown_as, folder.name, shown_as / "report.html")


def say_if_basic_is_faster(journal: Journal, numbers: Sequence[int], seconds: float) -> None:
    """An honest line: starting Ray takes time, which few short jobs do not bring back. seconds: of this launch."""
    work = sum(journal.trials[number].seconds for number in numbers)
    if work + IMPORT_SECONDS < seconds:
        log.info(
            f"note      {len(numbers)} short jobs took {duration(seconds)} with Ray; one after another, without "
            f"hydra/launcher=ray_tune, they would take about {duration(work + IMPORT_SECONDS)}"
        )


def write_results(folder: Path, journal: Journal, goal: Goal, name: str) -> dict[str, Any]:
    """Writes optimization_results.yaml and sweep.csv into the sweep's folder; returns what the first one holds.

    name: of the sweep. The keys best_* and command are left out where no trial has a value.
    """
    trials = journal.trials
    ranked = ranking(trials, goal)
    states = Counter(trial.state for trial in trials.values())
    results: dict[str, Any] = {
        "name": "ray_tune",  # as the sweepers of Hydra name themselves in this file
        "metric": goal.metric,
        "mode": goal.mode,
        "num_trials": len(trials),
        "num_pruned": states[PRUNED],
        "num_diverged": states[DIVERGED],
        "num_failed": states[FAILED],
    }
    if ranked:
        results |= _best_of(ranked[0], goal, name)
    write_text(folder / "optimization_results.yaml", yaml.safe_dump(results, sort_keys=False))
    keys = list(short_names(trials.values()))
    header = ["trial", "state", *keys, goal.metric, "best_epoch", "epochs", "seconds", "folder", "error"]
    rows = [_csv_row(trial, keys, goal) for _, trial in sorted(trials.items())]
    write_csv(folder / "sweep.csv", header, rows)
    return results


def _best_of(trial: TrialRecord, goal: Goal, name: str) -> dict[str, Any]:
    value, epoch = trial.best(goal)
    checkpoint = best_checkpoint(trial)
    return {
        "best_trial": trial.number,
        "best_value": value,
        "best_epoch": epoch,
        "best_params": dict(trial.params),
        "best_overrides": list(trial.overrides),
        "best_folder": trial.folder,
        "best_checkpoint": checkpoint and checkpoint.as_posix(),
        "command": single_run_command(trial, name),
    }


def _csv_row(trial: TrialRecord, keys: Sequence[str], goal: Goal) -> list[Any]:
    value, epoch = trial.best(goal) or (None, None)
    params = [trial.params.get(key) for key in keys]
    epochs, seconds = max(trial.rows, default=None), round(trial.seconds, 2)
    return [trial.number, trial.state, *params, value, epoch, epochs, seconds, trial.folder, trial.error]


def best_checkpoint(trial: TrialRecord) -> Path | None:
    """The weights of the trial's best epoch, if it left any."""
    path = Path(trial.folder) / "checkpoints" / "best.ckpt"
    return path if path.exists() else None


def single_run_command(trial: TrialRecord, name: str) -> str:
    """The command that does what the trial did, as a run of its own: runs/NAME-best. name: of the sweep."""
    words = [without_quotes(word) for word in trial.overrides if not _of_the_sweep(word)]
    if any(word.partition("=")[0].lstrip("+") == "experiment" for word in words):
        words.append("hydra.mode=RUN")  # a recipe of a sweep would begin the sweep again
    return shlex.join(["python", "-m", "src.train", *words, f"name={name}-best"])


def _of_the_sweep(word: str) -> bool:
    key = word.partition("=")[0].lstrip("+~")
    return key == "name" or key.startswith(("hydra.", "hydra/"))


def print_ranking(journal: Journal, goal: Goal, folder: Path, name: str, report: Path) -> None:
    """Prints how a sweep ended: the best trials, what to look at, how to repeat the winner, and what diverged.

    What failed is in the error that follows (`failures`).

    folder, name: of the sweep. report: its page with plots.
    """
    trials = journal.trials
    ranked = ranking(trials, goal)
    log.info("")
    for line in _table(ranked[:SHOWN], goal):
        log.info(line)
    log.info(counted(trials) if trials else "no trial has begun")
    log.info("")
    if ranked:
        best = ranked[0]
        log.info(f"best      {best.folder}: {goal.metric} {best_text(best, goal)}")
        if checkpoint := best_checkpoint(best):
            log.info(f"weights   {checkpoint.as_posix()}")
    else:
        log.info(f"best      no trial has a value of {goal.metric}")
    log.info(f"look at   {report}")
    log.info(f"files     {folder}/: optimization_results.yaml, sweep.csv, {journal.path.name}")
    if ranked:
        log.info(f"repeat    {single_run_command(ranked[0], name)}")
    for trial in trials.values():
        if trial.state == DIVERGED:
            log.info(f"diverged  #{trial.number} {trial.error} ({trial.folder})")


def _table(ranked: Sequence[TrialRecord], goal: Goal) -> list[str]:
    """The ranking, aligned; nothing where there is none."""
    if not ranked:
        return []
    names = short_names(ranked)
    rows = [["rank", "trial", *names.values(), goal.metric, "state", "folder"]]
    for place, trial in enumerate(ranked, start=1):
        params = [shown(trial.params[key]) if key in trial.params else "" for key in names]
        rows.append([str(place), f"#{trial.number}", *params, best_text(trial, goal), trial.state, trial.folder])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def failures(journal: Journal) -> UserError | None:
    """What a sweep ends with if trials failed, to be raised when everything else is done; else None."""
    failed = [trial for trial in journal.trials.values() if trial.state == FAILED]
    if not failed:
        return None
    folder = journal.path.parent
    lines = [_failure(trial) for trial in failed[:LISTED]]
    if len(failed) > LISTED:
        lines.append(f"and {len(failed) - LISTED} more")
    return UserError(
        f"{len(failed)} of {len(journal.trials)} trials failed",
        where=str(folder),
        why="\n".join(lines),
        fix=f"{named(folder.name)} # tries only these again",
        code=ExitCode.TRIALS_FAILED,
    )


def _failure(trial: TrialRecord) -> str:
    """'#7 ValueError: boom (runs/x/7)' in one line, so that the fix below is not pushed out of the message."""
    end = f" ({trial.folder})"
    room = max(40, LINE - len(end))
    return textwrap.shorten(f"#{trial.number} {trial.error}", room, placeholder=" ...") + end
