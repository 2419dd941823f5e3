"""report.html of a sweep: its trials on one page, made from trials.jsonl and what the sweep concludes from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from markupsafe import Markup

from src.engine.reports import plots
from src.engine.reports.rendering import Cell, Link, render
from src.engine.runs import seeding
from src.engine.runs.files import write_text
from src.engine.runs.text import decimal
from src.engine.sweep_reports import sweep_plots
from src.engine.sweep_reports.sweep_plots import Scale, scales_of
from src.engine.sweeps.progress import duration, exact, shown, values_of
from src.engine.sweeps.results import chance_rows, retraining_rows
from src.engine.sweeps.sweep_journal import FAILED, NOT_RANKED, PRUNED, Goal, Journal, TrialRecord, counted, ranking

FEWEST, TREES, SHUFFLES = 6, 200, 20  # of the importances: trials (a forest learns fewer by heart), trees, shuffles


@dataclass(frozen=True)
class Section:
    """Plots with a caption, or a sentence alone."""

    title: str
    caption: str
    svgs: list[Markup] = field(default_factory=list)
    layout: str = "shrinking"  # or "scrolling", see parts.html.j2


def write_sweep_report(folder: Path, goal: Goal, results: Mapping[str, Any]) -> Path:
    """Writes report.html into a sweep's folder and returns its path.

    folder: with trials.jsonl. goal: what the trials are judged by. results: what optimization_results.yaml says.
    """
    trials = Journal(folder).trials
    ranked = ranking(trials, goal)
    listed = [*ranked, *(trial for trial in trials.values() if trial not in ranked)]
    tried = scales_of(list(trials.values()))
    page = render(
        Path(__file__).parent / "sweep.html.j2",
        title=folder.absolute().name,
        facts=_facts(trials, tried, goal) if trials else [],
        verdict=_verdict(listed, goal),
        best_result=_result(ranked[0], goal) if ranked else "",
        best=_best(folder, ranked[0]) if ranked else [],
        remarks=[*chance_rows(ranked, goal, results), *retraining_rows(goal, results)] if ranked and results else [],
        command=results.get("command", ""),
        sections=list(_sections(listed, ranked, goal)),
        header=["trial", "state", *tried, goal.metric, "in epoch", "epochs", "seconds", "error"],
        rows=[_row(folder, trial, list(tried), goal) for trial in listed],
    )
    path = folder / "report.html"
    write_text(path, page)
    return path


def _facts(trials: Mapping[int, TrialRecord], tried: Mapping[str, Scale], goal: Goal) -> list[str]:
    took = max(trial.heard for trial in trials.values()) - min(trial.started for trial in trials.values())
    facts = [
        counted(trials),
        f"{duration(took)} from the first start to the last end",
        f"{duration(sum(trial.seconds for trial in trials.values()))} of work in all trials",
        f"judged by {goal.metric}, the {'larger' if goal.mode == 'max' else 'smaller'} the better",
    ]
    space = "; ".join(f"{name}: {scale}{' (log)' if scale.log else ''}" for name, scale in tried.items())
    return ["; ".join(facts), *([f"Tried: {space}"] if tried else [])]


def _verdict(listed: Sequence[TrialRecord], goal: Goal) -> str:
    """listed: all trials, those with a place in the ranking first."""
    if not listed:
        return "No trial of this sweep has begun."
    if all(trial.state == FAILED for trial in listed):
        return "All trials failed. The table says with what; error.log in a trial's folder says more."
    if listed[0].state in NOT_RANKED or listed[0].best(goal) is None:
        return f"No trial has a value of {goal.metric}."
    return f"Best: {_result(listed[0], goal)}"


def _result(trial: TrialRecord, goal: Goal) -> str:
    """'val/acc 0.9312 of trial 7 in epoch 4'"""
    value, epoch = trial.best(goal)
    return f"{goal.metric} {decimal(value)} of trial {trial.number}" + (f" in epoch {epoch}" if epoch else "")


def _best(folder: Path, trial: TrialRecord) -> list[tuple[Cell, Cell]]:
    rows: list[tuple[Cell, Cell]] = [("trial", _link(folder, trial))]
    rows += [(name, exact(value)) for name, value in trial.params.items()]
    checkpoint = folder / _subfolder(trial) / "checkpoints" / "best.ckpt"
    return [*rows, ("best checkpoint", checkpoint.as_posix())] if checkpoint.exists() else rows


def _sections(listed: Sequence[TrialRecord], ranked: Sequence[TrialRecord], goal: Goal) -> Iterator[Section]:
    metric, values = goal.metric, [trial.best(goal)[0] for trial in ranked]
    scales = scales_of(sorted(ranked, key=lambda trial: trial.number))
    with_curve = [trial for trial in listed if sweep_plots.curve_of(trial, metric)[0]]
    states = {trial.state for trial in with_curve}
    pruned = any(trial.state == PRUNED for trial in ranked)
    colours = "The darker, the better its place in the ranking: dark blue, red, light gold; the best is thick."
    if len(ranked) > sweep_plots.STRONG:
        colours += f" Faint: places after {sweep_plots.STRONG}."
    titles = {}  # number of a trial -> the tooltip of its lines
    for trial in (trial for trial in listed if trial.best(goal) is not None):
        pairs = [f"{name}={shown(value)}" for name, value in trial.params.items()]
        titles[str(trial.number)] = "\n".join([f"{_result(trial, goal)}, {trial.state}", *pairs])

    if scales:
        plot = sweep_plots.parallel_coordinates(scales, ranked, values, metric)
        svg = plots.to_svg(plot, f"parameters of the trials and {metric}", titles)
        caption = f"A line per trial, with {metric} on the last axis. {colours}"
        if pruned:
            caption += " Dashed: pruned, with the best value until then."
        yield Section("Parameters and values", caption, [svg], "scrolling")
    if with_curve:
        svg = plots.to_svg(sweep_plots.learning_curves(with_curve, metric), f"{metric} over the epochs", titles)
        caption = colours + (" Cross: pruned there." if PRUNED in states else "")
        if ended := [state for state in NOT_RANKED if state in states]:
            caption += f" Grey: {' or '.join(ended)} later."
        yield Section("Learning curves", caption, [svg])
    if ranked:
        columns = {name: scale.numbers(ranked, name) for name, scale in scales.items()}
        shares, caption = importance(columns, values)
        if shares and pruned:
            caption += " Pruned trials count with their best value until then, which favours those that ran longer."
        label = "shares of the parameters in the differences"
        yield Section("What matters", caption, [plots.to_svg(sweep_plots.share_bars(shares), label)] if shares else [])
    if scales:
        svgs = [
            plots.to_svg(sweep_plots.slice_plot(name, scale, ranked, values, metric), f"{metric} over {name}")
            for name, scale in scales.items()
        ]
        caption = "A dot per trial that has the parameter, with a ring around the best."
        yield Section("One parameter at a time", caption + (" Hollow: pruned." if pruned else ""), svgs)


def importance(parameters: Mapping[str, Sequence[float]], values: Sequence[float]) -> tuple[dict[str, float], str]:
    """The shares of the parameters, which add up to 1, the largest first; and how far to trust them, or why there are none.

    A random forest learns the ranks of the trials from their parameters; a parameter's importance is the loss of the
    forest's R2 when that parameter is shuffled among the trials (Breiman, Random Forests, 2001, section 10). Ranks instead of
    values, because one trial that diverged would outweigh all others. Not optuna's importances, which say nothing about how
    far to trust them.

    parameters: name -> one number per trial, nan where a trial lacks it. values: the metric of the trials.
    """
    if len(values) < FEWEST:
        need = f"To tell what the value depends on takes {FEWEST} trials that have one"
        return {}, f"{need}; of these there are {len(values)}."
    if len(parameters) < 2:
        return {}, "Only one parameter differs between the trials: all that changes is due to it or to chance."
    if min(values) == max(values):
        return {}, "All trials have the same value: it depends on none of the parameters."

    from sklearn.ensemble import RandomForestRegressor
    from sklearn.inspection import permutation_importance

    seed = seeding.key("importance") % 2**32
    inputs = np.array(list(parameters.values()), dtype=float).T
    ranks = np.unique(values, return_inverse=True)[1]
    forest = RandomForestRegressor(TREES, oob_score=True, random_state=seed).fit(inputs, ranks)
    losses = permutation_importance(forest, inputs, ranks, n_repeats=SHUFFLES, random_state=seed)["importances_mean"]
    weights = np.clip(losses, 0, None)
    if not weights.any():
        return {}, "The forest does as well without any of the parameters: what differs looks like chance."
    shares = dict(zip(parameters, (weights / weights.sum()).tolist(), strict=True))
    explained = forest.oob_score_  # R2 on the trials that a tree was not grown with
    trust = f"Of trials that it has not seen the forest explains {explained:.0%} of the differences (R2)."
    if explained <= 0:
        trust = "The forest cannot predict trials that it has not seen (R2 at most 0), so these shares say little."
    return dict(sorted(shares.items(), key=lambda item: -item[1])), (
        f"How much worse a random forest tells the ranking of these {len(values)} trials when one parameter is shuffled "
        f"(permutation importance), as shares of the whole. {trust} A hint of where to look next, and not a proof: "
        "parameters that changed together cannot be told apart."
    )


def _row(folder: Path, trial: TrialRecord, names: Sequence[str], goal: Goal) -> list[Cell]:
    value, epoch = trial.best(goal) or ("", "")
    ends = [value, epoch or "", len(trial.rows), f"{trial.seconds:.1f}", trial.error]
    return [_link(folder, trial), trial.state, *values_of(trial, names), *ends]


def _subfolder(trial: TrialRecord) -> str:
    return PurePath(trial.folder).name  # the sweep's folder may have been moved since


def _link(folder: Path, trial: TrialRecord) -> Link:
    report = f"{_subfolder(trial)}/report.html"
    return Link(str(trial.number), report if (folder / report).exists() else f"{_subfolder(trial)}/")
