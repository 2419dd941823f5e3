"""The plots of a sweep's report: parallel coordinates, learning curves, slices, bars. Used by sweep_report.py.

Trials come ranked, the best first, and a trial has one colour in all plots: the darker, the better its place. An artist's gid
is the number of its trial, which the page uses (plots.to_svg). Not optuna's plots: they leave out pruned trials and those that
lack a parameter's value, cut off long names, and draw categories over each other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from src.engine.reports.plots import COLOURS, INK, WIDTH, shortened, style
from src.engine.sweeps.sweep_journal import NOT_RANKED, PRUNED, TrialRecord
from src.engine.sweeps.sweep_scale import Scale, numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDE = 9.4  # inches; fills the page
AXIS_ROOM = 1.1  # inches of an axis of the parallel coordinates, for its name and ticks
NAME_LETTERS = 16  # that fit into AXIS_ROOM
STRONG = 60  # trials that are drawn opaque; the others are faint
NO_VALUE = "#AAAAAA"


@style()
def parallel_coordinates(
    scales: Mapping[str, Scale], trials: Sequence[TrialRecord], values: Sequence[float], metric: str
) -> Figure:
    """A line per trial through its parameters and its value. A parameter that it lacks leaves a gap.

    scales: of the parameters, one or more. trials: with their values, the best first.
    """
    goal = Scale.of(values)
    columns = [_places(scale, numbers(trials, name, scale)) for name, scale in scales.items()]
    columns.append(_places(goal, [goal.number(value) for value in values]))
    count = len(columns)
    width = max(WIDTH, min(2.4 * (count - 1), WIDE), AXIS_ROOM * count)
    figure, axes = _axes(width, 4)
    for place, (trial, *points) in enumerate(zip(trials, *columns, strict=True)):
        looks = _looks(place, trial, len(trials))
        marker = "o" if any(map(math.isnan, points)) else None  # a point between two gaps has no line
        axes.plot(range(count), points, marker=marker, markersize=3, clip_on=False, **looks)
    for x, scale in enumerate([*scales.values(), goal]):
        axes.axvline(x, color=INK, linewidth=0.8, zorder=0)
        _mark_ticks(axes, x, scale, last=x == count - 1)
    axes.set_xticks(range(count), [_in_lines(name) for name in [*scales, metric]])
    axes.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False, length=0)
    axes.set_yticks([])
    axes.set_xlim(0, count - 1)
    axes.set_ylim(-0.03, 1.03)
    axes.spines[:].set_visible(False)
    return figure


def _places(scale: Scale, column: Sequence[float]) -> list[float]:
    """The numbers as heights from 0 to 1; 0.5 if all are equal."""
    low, high = scale.ends
    return [(number - low) / (high - low) if high > low else number - low + 0.5 for number in column]


def _mark_ticks(axes: Axes, x: int, scale: Scale, last: bool) -> None:
    """The labels along a vertical axis: to its left, for the last axis to its right."""
    ticks = scale.ticks(apart=0.05)
    for height, (_, text) in zip(_places(scale, [number for number, _ in ticks]), ticks, strict=True):
        axes.annotate(
            shortened(text, NAME_LETTERS),
            (x, height),
            xytext=(4 if last else -4, 0),
            textcoords="offset points",
            ha="left" if last else "right",
            va="center",
            fontsize=8,
            zorder=4,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 0.5},
        )


def _in_lines(name: str) -> str:
    """optimizer.weight_decay: a line for each part, to stand above its axis."""
    return "\n".join(shortened(part, NAME_LETTERS) for part in name.split("."))


@style()
def learning_curves(trials: Sequence[TrialRecord], metric: str) -> Figure:
    """The metric of every trial over its epochs; a cross where one was pruned.

    trials: with at least one epoch in which the metric is a finite number; ranked, those that failed at the end.
    """
    from matplotlib.ticker import MaxNLocator

    figure, axes = _axes(WIDE, 3.6)
    ranked = sum(trial.state not in NOT_RANKED for trial in trials)
    for place, trial in enumerate(trials):
        epochs, curve = curve_of(trial, metric)
        looks = _looks(place, trial, ranked) | {"linestyle": "solid"}
        axes.plot(epochs, curve, marker="o" if len(epochs) == 1 else None, markersize=4, **looks)
        if trial.state == PRUNED:
            axes.plot(epochs[-1], curve[-1], marker="x", markersize=6, markeredgewidth=1.5, **looks)
    if Scale.of(number for trial in trials for number in curve_of(trial, metric)[1]).log:
        axes.set_yscale("log")
    axes.set_xlim(0.5, max(max(trial.rows) for trial in trials) + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlabel("epoch")
    axes.set_ylabel(metric)
    return figure


def curve_of(trial: TrialRecord, metric: str) -> tuple[list[int], list[float]]:
    """The epochs in which the metric is a finite number, in order, and its values there."""
    points = [(epoch, row[metric]) for epoch, row in trial.rows.items() if math.isfinite(row.get(metric, math.nan))]
    epochs, values = zip(*sorted(points), strict=True) if points else ((), ())
    return list(epochs), list(values)


@style()
def slice_plot(name: str, scale: Scale, trials: Sequence[TrialRecord], values: Sequence[float], metric: str) -> Figure:
    """One parameter against the metric: a dot per trial, hollow where it was pruned; the best with a ring around it."""
    figure, axes = _axes(WIDE / 3 - 0.1, 2.3)
    colours = [_looks(place, trial, len(trials))["color"] for place, trial in enumerate(trials)]
    faces = ["none" if trial.state == PRUNED else colour for trial, colour in zip(trials, colours, strict=True)]
    x, goal = numbers(trials, name, scale), Scale.of(values)
    axes.scatter(x, values, s=18, facecolors=faces, edgecolors=colours, linewidths=1, zorder=2)
    axes.plot(x[0], values[0], "o", markersize=9, markerfacecolor="none", markeredgecolor=INK)
    ticks = [
        (number, shortened(text, NAME_LETTERS)) for number, text in scale.ticks(apart=0.2 if scale.numeric else 0.06)
    ]
    low, high = scale.ends
    axes.set_xlim(low - 0.08 * (high - low), high + 0.08 * (high - low))
    crowded = sum(len(text) + 1 for _, text in ticks) > 30
    turned = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if crowded else {}
    axes.set_xticks([number for number, _ in ticks], [text for _, text in ticks], fontsize=8, **turned)
    if goal.log:
        axes.set_yscale("log")
    axes.set_xlabel(shortened(name, 40))
    axes.set_ylabel(metric)
    return figure


@style()
def share_bars(shares: Mapping[str, float]) -> Figure:
    """A bar per parameter, with its share in per cent."""
    figure, axes = _axes(WIDTH * 1.3, 0.4 + 0.28 * len(shares))
    bars = axes.barh([shortened(name, 40) for name in shares], list(shares.values()), height=0.6, color=COLOURS[0])
    axes.bar_label(bars, [f"{share:.0%}" for share in shares.values()], padding=3)
    axes.invert_yaxis()  # the largest on top
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(length=0)
    axes.grid(visible=False)
    return figure


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of so many inches, and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _looks(place: int, trial: TrialRecord, ranked: int) -> dict[str, Any]:
    """The style of a trial's line. place: in the ranking, from 0; ranked: the number of trials in the ranking."""
    from matplotlib.colors import LinearSegmentedColormap, to_hex

    worse = LinearSegmentedColormap.from_list("place", COLOURS)  # dark blue, red, light gold: lighter and lighter
    best = place == 0 and trial.state not in NOT_RANKED
    return {
        "gid": str(trial.number),
        "color": NO_VALUE if trial.state in NOT_RANKED else to_hex(worse(place / max(ranked - 1, 1))),
        "linestyle": "dashed" if trial.state == PRUNED else "solid",
        "linewidth": 3.5 if best else 0.8 if trial.state == PRUNED else 1.3,
        "alpha": 1.0 if place < STRONG else 0.25,
        "zorder": 3 if best else 2 - place / 10_000,
    }
