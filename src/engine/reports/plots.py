"""Plots for the reports: lines over epochs or steps, a heat map, and figures as <svg> elements.

Without pyplot, which keeps every figure and chooses a window system. Matplotlib is imported with the first plot.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
from markupsafe import Markup, escape

from src.engine.runs.text import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Paul Tol's "high-contrast" scheme (https://sronpersonalpages.nl/~pault/): distinct for colour-blind people and in a grey
# print. The fourth line has the first colour again, dashed.
COLOURS = ("#004488", "#BB5566", "#DDAA33")
DASHES = ("solid", "dashed", "dotted", "dashdot")
INK = "#444444"

WIDTH = 4.6  # inches; two plots stand side by side on a screen, one fills a phone
LEGEND_LETTERS = 62  # of a legend's line, within that width
LONGEST_NAME = 24  # letters of a class name in a plot
FEW_POINTS = 30  # up to here each is a dot too: a run of one epoch would show nothing
WIDE = 30  # after a loss that is so much higher than the others, these would be a flat line
NUMBERED_CLASSES = 30  # a larger matrix has no names and numbers, which would be too small

DRAWN: dict[str, Figure] = {}  # label -> figure, of all since somebody cleared it

Line = tuple[Sequence[float], Sequence[float]]  # x, y; nan is a gap

STYLE = {
    "font.sans-serif": ["DejaVu Sans"],  # shipped with matplotlib, used to measure text; the page has its own font
    "font.size": 9,
    "text.parse_math": False,  # a class may be called $a_b$
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text
}


@contextmanager
def style() -> Iterator[None]:
    """Inside, matplotlib has its defaults and STYLE, whatever the user's matplotlibrc says."""
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # browsers have fonts for all scripts
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


@style()
def line_plot(
    lines: Mapping[str, Line],
    x_label: str,
    y_label: str,
    *,
    changes: Sequence[float] = (),
    best: tuple[float, float] | None = None,
    logarithmic: bool = False,
) -> Figure:
    """Named lines over a common x axis of whole numbers.

    changes: x of thin vertical lines. best: x and y of a circle. logarithmic: where the values differ WIDE-fold.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(WIDTH, 2.8), layout="constrained")
    axes = figure.subplots()
    for number, (name, (x, y)) in enumerate(lines.items()):
        axes.plot(
            x,
            y,
            label=name,
            color=COLOURS[number % len(COLOURS)],
            linestyle=DASHES[number // len(COLOURS) % len(DASHES)],
            linewidth=1.5,
            marker="." if len(x) <= FEW_POINTS else None,
        )
    for x in changes:
        axes.axvline(x, color="#999999", linewidth=0.8, linestyle="dotted")
    if best is not None:
        axes.plot(*best, "o", markersize=9, markerfacecolor="none", markeredgecolor=INK)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    heights = np.concatenate([np.asarray(y, dtype=float) for _, y in lines.values()])
    heights = heights[np.isfinite(heights)]
    if logarithmic and len(heights) and heights.max() > WIDE * heights.min() > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if len(lines) > 1:
        columns = LEGEND_LETTERS // (max(map(len, lines)) + 8)  # 8: a line's sample and the gaps
        figure.legend(loc="outside upper left", ncols=max(columns, 1))
    return figure


@style()
def heat_map(matrix: np.ndarray, names: Sequence[str], x_label: str, y_label: str) -> Figure:
    """A confusion matrix (C, C) of counts; rows are true classes. A cell is darker, the larger its share of the row.

    Up to NUMBERED_CLASSES classes have names and counts.
    """
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    numbered = len(names) <= NUMBERED_CLASSES
    shown = [shortened(name) for name in names]
    side = 0.7 + 0.07 * max(map(len, shown)) + max(0.24 * len(names), 1) if numbered else 4.5
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    # The square root makes a few per cent visible; "none" keeps one pixel per cell, which browsers enlarge without blur.
    axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, 0, 1), interpolation="none")
    axes.grid(visible=False)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    if not numbered:
        return figure
    places = range(len(names))
    axes.set_xticks(places, shown, rotation=90, rotation_mode="anchor", ha="right", va="center", fontsize=8)
    axes.set_yticks(places, shown, fontsize=8)
    axes.tick_params(length=0)
    for row, column in zip(*np.nonzero(matrix), strict=True):
        colour = "white" if shares[row, column] > 0.4 else INK
        text = str(matrix[row, column])
        axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=8 if len(text) < 4 else 6)
    return figure


@style()
def scatter_plot(true: np.ndarray, predicted: np.ndarray, name: str) -> Figure:
    """Predicted over true values, with the line on which both are equal."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.4, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.scatter(true, predicted, s=14, color=COLOURS[0], alpha=0.5, linewidths=0)
    axes.axline((true[0], true[0]), slope=1, color=INK, linewidth=0.8, linestyle="dotted")
    axes.set_aspect("equal", adjustable="datalim")
    axes.grid(axis="x")
    axes.set_xlabel(f"true {shortened(name)}")
    axes.set_ylabel(f"predicted {shortened(name)}")
    return figure


@style()
def reliability_plot(points: Sequence[tuple[float, float, float, float]]) -> Figure:
    """points: probability, share of right answers, and the interval of this share. On the dotted line both are equal."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.4, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.axline((0, 0), slope=1, color=INK, linewidth=0.8, linestyle="dotted")
    said, right, low, high = map(list, zip(*points, strict=True))
    axes.vlines(said, low, high, color=COLOURS[0], linewidth=1)
    axes.plot(said, right, "o-", color=COLOURS[0], linewidth=1, markersize=4)
    axes.set_xlim(0, 1.02)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("probability of the answer")
    axes.set_ylabel("share of right answers")
    return figure


@style()
def dot_plot(values: Mapping[str, Sequence[float]], names: Sequence[str]) -> Figure:
    """A row of dots for each name, from 0 to 1; nan: none. values: title -> a value for each name."""
    from matplotlib.figure import Figure

    shown = [shortened(name) for name in names]
    figure = Figure(figsize=(WIDTH, 0.9 + 0.24 * len(names)), layout="constrained")
    axes = figure.subplots()
    places = range(len(names))
    for title, marker, colour in zip(values, "o|x", COLOURS, strict=False):
        axes.scatter(values[title], places, s=36, marker=marker, color=colour, label=title, zorder=2, clip_on=False)
    axes.set_yticks(places, shown, fontsize=8)
    axes.set_xlim(0, 1)
    axes.invert_yaxis()  # the first name on top
    figure.legend(loc="outside upper left", ncols=len(values))
    return figure


def shortened(name: str, letters: int = LONGEST_NAME) -> str:
    """The name on one line, cut to the number of letters."""
    name = printable(" ".join(name.split()))  # a folder's name may hold anything, a line break too
    return name if len(name) <= letters else name[: letters - 1] + "…"


def thinned(x: Sequence[float], y: Sequence[float], most: int = 1000) -> Line:
    """At most `most` points of a line: the highest of each stretch, so that every peak remains."""
    heights = np.nan_to_num(np.asarray(y, dtype=float), nan=-np.inf)
    stretches = np.array_split(np.arange(len(heights)), min(most, len(heights)))
    kept = [stretch[heights[stretch].argmax()] for stretch in stretches]
    return [x[index] for index in kept], [y[index] for index in kept]


@style()
def to_svg(figure: Figure, label: str, titles: Mapping[str, str] | None = None) -> Markup:
    """The figure as an <svg> element; the same figure always gives the same text.

    label: says what the plot shows to those who cannot see it. Labels must differ within a page, because ids are made
    of them. titles: gid of an artist -> the text shown under the mouse. Such an artist is a <g data-gid="...">.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    DRAWN[label] = figure
    matplotlib.rcParams["svg.hashsalt"] = label
    file = io.StringIO()
    # figure.savefig draws twice, the first time for the layout only
    FigureCanvasSVG(figure).print_svg(file, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]  # an XML header has no place inside a page
    titles = titles or {}

    def group(match: re.Match[str]) -> str:
        gid = match[1]
        return f'<g data-gid="{gid}"><title>{escape(titles[gid])}</title>' if gid in titles else "<g>"

    svg = re.sub(r'<g id="([^"]*)">', group, svg)  # ids such as axes_1 repeat in every figure; nothing refers to them
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1))


@style()
def to_png(figure: Figure) -> bytes:
    """A figure that to_svg has drawn: its layout is there, and would take as long again."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.set_layout_engine("none")
    figure.set_dpi(150)
    FigureCanvasAgg(figure).print_png(file := io.BytesIO())
    return file.getvalue()
