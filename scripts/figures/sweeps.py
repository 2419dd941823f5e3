"""Draws the images of docs/sweeps.md into docs/images/, two of them from a sweep:

python -m src.train experiment=tune_finetune name=finetune
python scripts/figures/sweeps.py runs/finetune
"""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from concepts import DPI, FOLDER, IMAGES, PAPER, SHADE, WEIGHTS, WIDTH, around, arrow, box, drawing
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image

from src.engine.reports.plots import INK, STYLE
from src.engine.sweep_reports import sweep_plots
from src.engine.sweep_reports.sweep_plots import scales_of
from src.engine.sweeps.sweep_journal import FINISHED, PRUNED, Goal, Journal, TrialRecord, ranking

GOAL = Goal("val/acc", "max")
GRACE, FACTOR = 3, 3  # epochs before the first rung, and the factor between rungs


def sweep_parts() -> Axes:
    """The driver, the workers, and what travels between them."""
    axes = drawing(7.6)
    around(axes, (0.2, 1.6), (4.4, 5.8), "driver: the command")
    for bottom, text in ((6.3, "search: the next point"), (4.5, "scheduler: go on?"), (2.4, "journal, table")):
        box(axes, (0.5, bottom), (3.8, 0.8), text)
    for bottom, number in ((4.6, 0), (1.6, 1)):
        around(axes, (6.8, bottom), (6.3, 2.8), f"worker {number}")
        box(axes, (7.1, bottom + 0.6), (2.1, 1.9), "trial\n\nwaits\nfor a row")
        box(axes, (10.7, bottom + 0.6), (2.1, 1.9), "thread\n\ntrains\nan epoch")
        arrow(axes, IMAGES, (10.6, bottom + 2.1), (9.3, bottom + 2.1))
        arrow(axes, WEIGHTS, (9.3, bottom + 1.0), (10.6, bottom + 1.0))
        axes.text(9.95, bottom + 2.25, "row", ha="center")
        axes.text(9.95, bottom + 0.6, "answer", ha="center")
    arrow(axes, WEIGHTS, (4.4, 6.7), (7.0, 6.7))
    arrow(axes, IMAGES, (7.0, 6.0), (5.4, 6.0), (5.4, 5.1), (4.4, 5.1))
    arrow(axes, WEIGHTS, (4.4, 4.7), (6.0, 4.7), (6.0, 5.4), (7.0, 5.4))
    for x, y, text in ((5.7, 6.85, "point"), (5.7, 6.15, "row"), (5.4, 4.3, "answer")):
        axes.text(x, y, text, ha="center")
    arrow(axes, INK, (2.4, 4.4), (2.4, 3.3))
    arrow(axes, INK, (3.7, 2.3), (3.7, 1.05))
    arrow(axes, INK, (11.75, 2.1), (11.75, 1.05))
    arrow(axes, INK, (12.9, 6.15), (13.5, 6.15), (13.5, 1.05))
    box(axes, (0.2, 0.2), (13.6, 0.8), "")
    for x, text in ((0.4, "runs/NAME/"), (2.8, "trials.jsonl  sweep.csv  report.html"), (11.2, "0/  1/  2/")):
        axes.text(x, 0.6, text, va="center", family="monospace")
    return axes


def sweep_asha(trials: Sequence[TrialRecord]) -> Axes:
    """Epochs of each trial."""
    figure = Figure(figsize=(WIDTH, 3.6), facecolor=PAPER, layout="constrained")
    axes = figure.subplots()
    best = ranking({trial.number: trial for trial in trials}, GOAL)[0]
    longest = max(max(trial.rows) for trial in trials)
    for trial in trials:
        epochs = max(trial.rows)
        axes.barh(trial.number, longest, height=0.8, color=SHADE)
        axes.barh(trial.number, epochs, height=0.8, color=WEIGHTS if trial.state == FINISHED else IMAGES)
        if trial is best:
            axes.text(epochs + 0.1, trial.number, f"best: {trial.best(GOAL)[0]:.3f}", va="center")
    rung = GRACE
    while rung < longest:
        axes.axvline(rung, color=INK, linestyle="dashed", linewidth=1)
        rung *= FACTOR
    done = sum(max(trial.rows) for trial in trials)
    axes.set_title(f"{len(trials)} trials: {done} epochs instead of {len(trials) * longest}", loc="left")
    axes.set(xlabel="epochs", ylabel="trial", xlim=(0, longest + 1.6), xticks=range(0, longest + 1, 2))
    axes.set_ylim(max(trial.number for trial in trials) + 0.6, -0.6)
    looks = {FINISHED: WEIGHTS, PRUNED: IMAGES, "not computed": SHADE}
    figure.legend(
        handles=[Patch(color=colour, label=name) for name, colour in looks.items()],
        loc="outside upper right",
        ncols=3,
    )
    return axes


def sweep_report(trials: Sequence[TrialRecord]) -> Image.Image:
    """The first two plots of the sweep's report, one above the other."""
    ranked = ranking({trial.number: trial for trial in trials}, GOAL)
    values = [trial.best(GOAL)[0] for trial in ranked]
    figures = [
        sweep_plots.parallel_coordinates(scales_of(trials), ranked, values, GOAL.metric),
        sweep_plots.learning_curves(ranked, GOAL.metric),
    ]
    plots = []
    for figure in figures:
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=DPI * WIDTH / figure.get_figwidth(), facecolor=PAPER)
        plots.append(Image.open(buffer).convert("RGB"))
    page = Image.new("RGB", (max(plot.width for plot in plots), sum(plot.height for plot in plots) + 40), PAPER)
    height = 0
    for plot in plots:
        page.paste(plot, (0, height))
        height += plot.height + 40
    return page


if __name__ == "__main__":
    sweep = Path(sys.argv[1])
    found = sorted(Journal(sweep).trials.values(), key=lambda trial: trial.number)
    with matplotlib.rc_context(STYLE | {"axes.grid": False, "axes.titlesize": 9}):
        for name, axes in (("sweep_parts", sweep_parts()), ("sweep_asha", sweep_asha(found))):
            axes.figure.savefig(FOLDER / f"{name}.png", dpi=DPI, metadata={"Software": None})
    sweep_report(found).save(FOLDER / "sweep_report.png", optimize=True)
