"""The plots of the reports: lines over epochs or steps, a heat map, and either of them as an <svg> element.

Used by report.py, and by sweep_plots.py for plots of its own. Matplotlib's objects without pyplot, which keeps every
figure and chooses a window system; imported when the first plot is made.
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

from src.text import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Paul Tol's "high-contrast" scheme (https://sronpersonalpages.nl/~pault/): told apart by colour-blind people and on a grey
# print. The fourth line has the first colour again, dashed.
COLOURS = ("#004488", "#BB5566", "#DDAA33")
DASHES = ("solid", "dashed", "dotted", "dashdot")
INK = "#444444"

WIDTH = 4.6  # inches; two plots stand side by side on a screen, one fills a phone
LEGEND_LETTERS = 62  # what fits beside each other into that width
LONGEST_NAME = 24  # letters of a class's name in a plot
FEW_POINTS = 30  # each is drawn as a dot too; without dots a run of one epoch would show nothing
NUMBERED_CLASSES = 30  # a larger matrix is drawn without names and numbers, which nobody could read

Line = tuple[Sequence[float], Sequence[float]]  # x, y; nan is a gap

STYLE = {
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib, for measuring; the page shows its own font
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
    """Matplotlib's own settings and STYLE inside, whatever the user's matplotlibrc says; what was set before afterwards."""
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the browser has fonts for all writing
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
) -> Figure:
    """Named lines over a common x axis of whole numbers.

    changes: where something changes, as x of thin vertical lines. best: x and y of a point to draw a circle around.
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
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if len(lines) > 1:
        columns = LEGEND_LETTERS // (max(map(len, lines)) + 8)  # 8: the piece of line and the gaps
        figure.legend(loc="outside upper left", ncols=max(columns, 1))
    return figure


@style()
def heat_map(matrix: np.ndarray, names: Sequence[str], x_label: str, y_label: str) -> Figure:
    """A confusion matrix (C, C) of counts, rows are true classes. The darker, the larger the share of its row.

    Up to NUMBERED_CLASSES classes are drawn with their names and the counts.
    """
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    numbered = len(names) <= NUMBERED_CLASSES
    shown = [shortened(name) for name in names]
    room = 0.7 + 0.07 * max(map(len, shown)) if numbered else 0.5
    side = room + (max(0.24 * len(names), 1) if numbered else 4)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    # The root makes a mistake of a few per cent visible; "none" keeps one pixel per cell, which browsers enlarge sharply.
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


def shortened(name: str, letters: int = LONGEST_NAME) -> str:
    """The name in one line of at most so many letters."""
    name = printable(" ".join(name.split()))  # a folder's name may hold anything, a line break too
    return name if len(name) <= letters else name[: letters - 1] + "…"


def thinned(x: Sequence[float], y: Sequence[float], most: int = 1000) -> Line:
    """At most so many points of a line: the highest of each stretch, so that every peak stays."""
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

    matplotlib.rcParams["svg.hashsalt"] = label
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]  # an XML header has no place inside a page
    titles = titles or {}

    def group(match: re.Match[str]) -> str:
        gid = match[1]
        return f'<g data-gid="{gid}"><title>{escape(titles[gid])}</title>' if gid in titles else "<g>"

    svg = re.sub(r'<g id="([^"]*)">', group, svg)  # ids such as axes_1 repeat in every figure; nothing refers to them
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1))
