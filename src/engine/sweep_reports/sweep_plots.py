"""The plots of a sweep's report: parallel coordinates, learning curves, slices, bars; and values of any kind on an axis.

Trials come ranked, the best first, and a trial has one colour in all plots: the darker, the better its place. An artist's gid
is the number of its trial, which the page uses (plots.to_svg). Not optuna's plots: they leave out pruned trials and those that
lack a parameter's value, cut off long names, and draw categories over each other.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from src.engine.reports.plots import COLOURS, INK, WIDTH, shortened, style
from src.engine.sweeps.progress import exact, shown
from src.engine.sweeps.sweep_journal import NOT_RANKED, PRUNED, TrialRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDE = 9.4  # inches; fills the page
AXIS_ROOM = 1.1  # inches of an axis of the parallel coordinates, for its name and ticks
NAME_LETTERS = 16  # that fit into AXIS_ROOM
STRONG = 60  # trials that are drawn opaque; the others are faint
NO_VALUE = "#AAAAAA"
LOG_FROM = 50  # use a log axis if all values are positive and max/min is larger
FEW = 5  # values that an axis marks themselves; of more it marks round numbers between them


@dataclass(frozen=True)
class Scale:
    """Finite numbers, as they are or as their log10; everything else is a category, whose number is its place."""

    values: tuple[Any, ...]  # the different ones: numbers from the smallest on, categories in the order they came
    numeric: bool

    @classmethod
    def of(cls, values: Iterable[Any]) -> Scale:
        """values: at least one."""
        different = list({_identity(value): value for value in values}.values())
        numeric = all(_is_number(value) for value in different)
        return cls(tuple(sorted(different) if numeric else different), numeric)

    @property
    def log(self) -> bool:
        return self.numeric and self.values[0] > 0 and self.values[-1] > LOG_FROM * self.values[0]

    def number(self, value: Any) -> float:
        if not self.numeric:
            return float([_identity(one) for one in self.values].index(_identity(value)))
        return math.log10(value) if self.log else float(value)

    def numbers(self, trials: Iterable[TrialRecord], name: str) -> list[float]:
        """One parameter of the trials; nan for a trial that lacks it."""
        return [self.number(trial.params[name]) if name in trial.params else math.nan for trial in trials]

    @property
    def ends(self) -> tuple[float, float]:
        """The smallest and the largest number."""
        return self.number(self.values[0]), self.number(self.values[-1])

    def heights(self, numbers: Iterable[float]) -> list[float]:
        """The numbers as heights from 0 to 1; 0.5 if all are equal."""
        low, high = self.ends
        return [(number - low) / (high - low) if high > low else number - low + 0.5 for number in numbers]

    def ticks(self, apart: float) -> list[tuple[float, str]]:
        """The numbers to be marked, with their texts.

        apart: the room of a mark, as a share of the axis; a mark in the room of another is left out.
        """
        low, high = self.ends
        kept: list[tuple[float, str]] = []
        for value in self.values if not self.numeric or len(self.values) <= FEW else self._round_values():
            number = self.number(value)
            if not kept or number - kept[-1][0] >= apart * (high - low):
                kept.append((number, shortened(shown(value), NAME_LETTERS)))
        return kept

    def _round_values(self) -> list[float]:
        from matplotlib.ticker import LogLocator, MaxNLocator

        first, last = self.values[0], self.values[-1]
        if self.log:
            locator = LogLocator(subs=(1.0,) if last > 1000 * first else (1.0, 2.0, 5.0))
        else:
            locator = MaxNLocator(FEW, integer=all(isinstance(value, int) for value in self.values))
        return [float(tick) for tick in locator.tick_values(first, last) if first <= tick <= last]

    def __str__(self) -> str:
        """'0.0001 to 0.1' or 'linear, mlp'."""
        if self.numeric and len(self.values) > FEW:
            return f"{shown(self.values[0])} to {shown(self.values[-1])}"
        return ", ".join(map(shown, self.values))


def scales_of(trials: Sequence[TrialRecord]) -> dict[str, Scale]:
    """The parameters that differ among the trials, in the order they came. A trial may lack one: a key added with +."""
    names = dict.fromkeys(name for trial in trials for name in trial.params)
    scales = {name: Scale.of(trial.params[name] for trial in trials if name in trial.params) for name in names}
    return {name: scale for name, scale in scales.items() if len(scale.values) > 1}


def _identity(value: Any) -> float | str:
    """1 and 1.0 are the same, 1 and true are not."""
    return float(value) if _is_number(value) else exact(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@style()
def parallel_coordinates(
    scales: Mapping[str, Scale], trials: Sequence[TrialRecord], values: Sequence[float], metric: str
) -> Figure:
    """A line per trial through its parameters and its value. A parameter that it lacks leaves a gap.

    scales: of the parameters, one or more. trials: with their values, the best first.
    """
    goal = Scale.of(values)
    columns = [scale.heights(scale.numbers(trials, name)) for name, scale in scales.items()]
    columns.append(goal.heights(map(goal.number, values)))
    last = len(scales)
    width = max(WIDTH, min(2.4 * last, WIDE), AXIS_ROOM * (last + 1))
    figure, axes = _axes(width, 4)
    for place, (trial, *points) in enumerate(zip(trials, *columns, strict=True)):
        looks = _looks(place, trial, len(trials))
        marker = "o" if any(map(math.isnan, points)) else None  # a point between two gaps has no line
        axes.plot(range(last + 1), points, marker=marker, markersize=3, clip_on=False, **looks)
    for x, scale in enumerate([*scales.values(), goal]):
        axes.axvline(x, color=INK, linewidth=0.8, zorder=0)
        ticks = scale.ticks(apart=0.05)
        for height, (_, text) in zip(scale.heights(number for number, _ in ticks), ticks, strict=True):
            axes.annotate(
                text,
                (x, height),
                xytext=(4 if x == last else -4, 0),
                textcoords="offset points",
                ha="left" if x == last else "right",
                va="center",
                fontsize=8,
                zorder=4,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 0.5},
            )
    # optimizer.weight_decay: a line for each part, to stand above its axis
    names = ["\n".join(shortened(part, NAME_LETTERS) for part in name.split(".")) for name in [*scales, metric]]
    axes.set_xticks(range(last + 1), names)
    axes.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False, length=0)
    axes.set(yticks=[], xlim=(0, last), ylim=(-0.03, 1.03))
    axes.spines[:].set_visible(False)
    return figure


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
    axes.set(xlim=(0.5, max(max(trial.rows) for trial in trials) + 0.5), xlabel="epoch", ylabel=metric)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return figure


def curve_of(trial: TrialRecord, metric: str) -> tuple[list[int], list[float]]:
    """The epochs in which the metric is a finite number, in order, and its values there."""
    points = {epoch: row[metric] for epoch, row in sorted(trial.rows.items()) if _is_number(row.get(metric))}
    return list(points), list(points.values())


@style()
def slice_plot(name: str, scale: Scale, trials: Sequence[TrialRecord], values: Sequence[float], metric: str) -> Figure:
    """One parameter against the metric: a dot per trial, hollow where it was pruned; the best with a ring around it."""
    figure, axes = _axes(WIDE / 3 - 0.1, 2.3)
    colours = [_looks(place, trial, len(trials))["color"] for place, trial in enumerate(trials)]
    faces = ["none" if trial.state == PRUNED else colour for trial, colour in zip(trials, colours, strict=True)]
    x = scale.numbers(trials, name)
    axes.scatter(x, values, s=18, facecolors=faces, edgecolors=colours, linewidths=1, zorder=2)
    axes.plot(x[0], values[0], "o", markersize=9, markerfacecolor="none", markeredgecolor=INK)
    places, texts = zip(*scale.ticks(apart=0.2 if scale.numeric else 0.06), strict=True)
    crowded = sum(len(text) + 1 for text in texts) > 30
    turned = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if crowded else {}
    axes.set_xticks(places, texts, fontsize=8, **turned)
    low, high = scale.ends
    margin = 0.08 * (high - low)
    axes.set(xlim=(low - margin, high + margin), xlabel=shortened(name, 40), ylabel=metric)
    if Scale.of(values).log:
        axes.set_yscale("log")
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
