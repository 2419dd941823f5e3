"""The end of a sweep, made from its journal alone: files for programs, the ranking on the screen, the failures.

The display while it runs: src/engine/sweeps/progress.py; the page with plots: src/engine/sweep_reports/.
"""

from __future__ import annotations

import logging
import os
import shlex
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any

import yaml

from src.engine import features
from src.engine.commands.user_command import named, typed_name, typed_words
from src.engine.runs.errors import ExitCode, UserError
from src.engine.runs.files import write_csv, write_text
from src.engine.runs.run_dir import read_result
from src.engine.runs.tables import interval_text
from src.engine.runs.text import decimal
from src.engine.runs.ties import error_text, standard_error, tied
from src.engine.sweeps.progress import best_text, duration, short_names, values_of
from src.engine.sweeps.retraining import Retraining, single_run_words
from src.engine.sweeps.settings import sweep_command
from src.engine.sweeps.sweep_journal import DIVERGED, FAILED, PRUNED, Goal, Journal, TrialRecord, counted, ranking

log = logging.getLogger(__name__)

RANKED = 10  # trials of the ranking on the screen; sweep.csv has all
FEWEST = 3  # trials, from which on the best of them is said to be lucky
LISTED = 8  # failed trials in an error, which has 15 lines
LINE = 110  # characters of a line of an error
IMPORT_SECONDS = 5.0  # of torch and Lightning, which Hydra's basic launcher does once


def conclude(journal: Journal, goal: Goal, retrain: bool | None = None) -> None:
    """Writes the files of a sweep, and prints its ranking. retrain: whether its winner is trained once more;
    None: other batches of trials may follow."""
    results = write_results(journal, goal)
    print_ranking(journal, goal, results)
    if retrain is not None and results["num_trials"]:
        _retrain(journal, goal, results, retrain)


def _retrain(journal: Journal, goal: Goal, results: dict[str, Any], is_asked: bool) -> None:
    """Trains the winner's settings once more, unless that was done, and prints the numbers; else prints the command."""
    retraining, folder = Retraining.of(journal, goal), journal.path.parent
    if retraining is None:
        if is_asked:
            log.warning("retrain=true has no effect: no trial has a value, or the winner's folder is not that of a run")
        return
    if is_asked and "retrained" not in results:
        log.info(
            f"\nretrain   the settings of #{results['best_trial']} with seed {retraining.seed}, in {retraining.folder}"
        )
        retraining.run(folder.name)
        results = write_results(journal, goal)
        log.info("")
    if "retrained" in results:
        for label, text in retraining_rows(goal, results):
            log.info(f"{label:<10}{text}")
    elif typed_words():
        log.info(f"retrain   {sweep_command(f'name={typed_name() or folder.name}', 'retrain=true')}")


def retraining_rows(goal: Goal, results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The winner's numbers and those of its settings with another seed; none where they were not trained once more."""
    if "retrained" not in results:
        return []
    winner, again = results["best_folder"], results["retrained"]
    return [
        ("winner", f"{winner}: {_numbers(read_result(Path(winner)), goal)}"),
        ("retrained", f"{again['folder']}: {_numbers(again, goal)}"),
    ]


def chance_rows(ranked: Sequence[TrialRecord], goal: Goal, results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """How much of the winner's place may be chance. ranked: all trials with a value; results: as written."""
    lines, number = [], len(ranked)
    if (luck := winners_luck(ranked[0], goal, number)) is not None:
        text = f"of {number} equally good trials the best would look about {decimal(luck)} better than it is; "
        lines.append(("luck", f"{text}its test numbers are in {results['best_folder']}/result.json"))
    if ties := results.get("val_ties"):
        text = f"cannot tell the best {len(ties['trials'])} of {number} trials apart "
        lines.append(("val", f"{text}(±{error_text(ties['standard_error'])})"))
    return lines


def _numbers(result: dict[str, Any], goal: Goal) -> str:
    """'val/acc 0.9777, test/acc 0.9740 (0.95 to 0.99)': the sweep's metric, and what test has of it."""
    name, parts = goal.metric.removeprefix("val/"), []
    for key in dict.fromkeys((goal.metric, f"test/{name}")):
        if (value := (result.get("metrics") or {}).get(key)) is not None:
            between = (result.get("intervals") or {}).get(key)
            parts.append(f"{key} {decimal(value)}" + (f" ({interval_text(*between)})" if between else ""))
    return ", ".join(parts) or f"no {name} was measured"


def say_if_basic_is_faster(journal: Journal, numbers: Sequence[int], seconds: float) -> None:
    """Says so if the trials would have been faster without Ray, which takes time to start. seconds: of this launch."""
    work = sum(journal.trials[number].seconds for number in numbers)
    if work + IMPORT_SECONDS < seconds:
        log.info(
            f"note      {len(numbers)} short jobs took {duration(seconds)} with Ray; one after another, without "
            f"hydra/launcher=ray_tune, they would take about {duration(work + IMPORT_SECONDS)}"
        )


def write_results(journal: Journal, goal: Goal) -> dict[str, Any]:
    """Writes optimization_results.yaml, sweep.csv and report.html beside the journal; returns the content of the first one.

    The keys best_* and command are left out if no trial has a value.
    """
    folder, trials = journal.path.parent, journal.trials
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
    if ranked := ranking(trials, goal):
        best = ranked[0]
        value, epoch = best.best(goal)
        checkpoint = Path(best.folder, "checkpoints", "best.ckpt")
        results |= {
            "best_trial": best.number,
            "best_value": value,
            "best_epoch": epoch,
            "best_params": dict(best.params),
            "best_overrides": list(best.overrides),
            "best_folder": best.folder,
            "best_checkpoint": checkpoint.as_posix() if checkpoint.exists() else None,
            "command": single_run_command(best, folder.name),
        }
        if (ties := tied_trials(ranked, goal)) is not None:
            results["val_ties"] = ties
        retraining = Retraining.of(journal, goal)
        if retraining and (measured := retraining.measured()):
            results["retrained"] = measured
    write_text(folder / "optimization_results.yaml", yaml.safe_dump(results, sort_keys=False))
    keys = list(short_names(trials.values()))
    rows = []
    for number, trial in sorted(trials.items()):
        params = [trial.params.get(key) for key in keys]
        ends = [max(trial.rows, default=None), round(trial.seconds, 2), trial.folder, trial.error]
        rows.append([number, trial.state, *params, *(trial.best(goal) or (None, None)), *ends])
    header = ["trial", "state", *keys, goal.metric, "best_epoch", "epochs", "seconds", "folder", "error"]
    write_csv(folder / "sweep.csv", header, rows)
    _write_page(folder, goal, results)
    return results


def _write_page(folder: Path, goal: Goal, results: dict[str, Any]) -> None:
    for feature in features.FEATURES:
        try:
            if feature.sweep_report is not None:
                feature.sweep_report(folder, goal, results)
        except Exception:  # the sweep is done by now: a page that cannot be made must not turn it into a failed one
            log.warning("the sweep's report.html could not be written; sweep.log says why", exc_info=True)


def single_run_command(trial: TrialRecord, sweep: str) -> str:
    """The command that does what the trial did as a run of its own: runs/SWEEP-best."""
    return shlex.join(["python", "-m", "src.train", *single_run_words(trial), f"name={sweep}-best"])


def print_ranking(journal: Journal, goal: Goal, results: dict[str, Any]) -> None:
    """Prints the best trials, the files of the sweep, the command that repeats the best trial, and what diverged.

    results: as written. The failed trials are in the error that follows (`failures`).
    """
    trials, folder = journal.trials, os.path.relpath(journal.path.parent)
    ranked = ranking(trials, goal)[:RANKED]
    lines = ["", *(_table(ranked, goal) if ranked else [])]
    lines += [counted(trials) if trials else "no trial has begun", ""]
    if ranked:
        lines.append(f"best      {results['best_folder']}: {goal.metric} {best_text(ranked[0], goal)}")
        lines += [f"{label:<10}{text}" for label, text in chance_rows(ranking(trials, goal), goal, results)]
        if results["best_checkpoint"]:
            lines.append(f"weights   {results['best_checkpoint']}")
    else:
        lines.append(f"best      no trial has a value of {goal.metric}")
    if (journal.path.parent / "report.html").exists():
        lines.append(f"look at   {folder}/report.html")
    lines.append(f"files     {folder}/: optimization_results.yaml, sweep.csv, {journal.path.name}")
    if ranked:
        lines.append(f"repeat    {results['command']}")
    diverged = [trial for trial in trials.values() if trial.state == DIVERGED]
    lines += [f"diverged  #{trial.number} {trial.error} ({trial.folder})" for trial in diverged]
    for line in lines:
        log.info(line)


def winners_luck(best: TrialRecord, goal: Goal, trials: int) -> float | None:
    """By how much the largest of so many equal numbers with the interval of the winner's exceeds their mean: the expected
    maximum of a normal sample (Blom, 1958, Statistical estimates and transformed beta-variables). None where it is not known.
    Trials are measured on the same val images, so that they differ by less, and this is the most that chance explains."""
    if (error := _standard_error(best, goal)) is None or trials < FEWEST:
        return None
    return error * NormalDist().inv_cdf((trials - 0.375) / (trials + 0.25))


def tied_trials(ranked: Sequence[TrialRecord], goal: Goal) -> dict[str, Any] | None:
    """The numbers of the trials that val cannot tell from the winner, the best first, with the standard error of the metric;
    None where there is no other, or where it is not known how sure the metric is."""
    if (error := _standard_error(ranked[0], goal)) is None:
        return None
    bests = {trial.number: best[0] for trial in ranked if (best := trial.best(goal)) is not None}
    numbers = tied(bests, error, goal.mode == "max")
    return {"trials": numbers, "standard_error": error} if len(numbers) > 1 else None


def _standard_error(trial: TrialRecord, goal: Goal) -> float | None:
    return standard_error((read_result(Path(trial.folder)).get("intervals") or {}).get(goal.metric))


def _table(ranked: Sequence[TrialRecord], goal: Goal) -> list[str]:
    """The ranking, aligned."""
    names = short_names(ranked)
    rows = [["rank", "trial", *names.values(), goal.metric, "state", "folder"]]
    for rank, trial in enumerate(ranked, start=1):
        cells = [*values_of(trial, names), best_text(trial, goal), trial.state, trial.folder]
        rows.append([str(rank), f"#{trial.number}", *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def failures(journal: Journal) -> UserError | None:
    """The error that ends a sweep if trials failed, to be raised when everything else is done; else None."""
    failed = [trial for trial in journal.trials.values() if trial.state == FAILED]
    if not failed:
        return None
    lines = []
    for trial in failed[:LISTED]:  # each in one line, so that the fix below is not pushed out of the message
        end, text = f" ({trial.folder})", f"#{trial.number} {trial.error}"
        lines.append(textwrap.shorten(text, max(40, LINE - len(end)), placeholder=" ...") + end)
    if len(failed) > LISTED:
        lines.append(f"and {len(failed) - LISTED} more")
    folder = journal.path.parent
    return UserError(
        f"{len(failed)} of {len(journal.trials)} trials failed",
        where=str(folder),
        why="\n".join(lines),
        fix=f"{named(folder.name)} # tries only these again",
        code=ExitCode.TRIALS_FAILED,
    )
