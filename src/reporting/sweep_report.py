"""report.html of a sweep: its trials on one page, to be opened from disk or sent by mail. Nothing in it comes from elsewhere.

Made at the end of a sweep from trials.jsonl in its folder alone, so it can be made again at any time:

    python -c "from pathlib import Path; from src.reporting.goal import Goal
    from src.reporting.sweep_report import write_sweep_report as write
    write(Path('runs/NAME'), Goal('val/acc', 'max'))"
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePath

from markupsafe import Markup, escape

from src.files import write_text
from src.reporting import plots, sweep_plots
from src.reporting.goal import Goal
from src.reporting.importance import importance
from src.reporting.rendering import Cell, Link, part, render
from src.reporting.sweep_journal import FAILED, NOT_RANKED, PRUNED, Journal, TrialRecord, counted, ranking
from src.reporting.sweep_scale import Scale, duration, exact, numbers, scales_of, shown

# The page can be read without. A wide transparent copy of a line is what can be met with a mouse.
SCRIPT = """<script>
const rows = [...document.querySelectorAll(".trials tr")].slice(1);
const lines = [...document.querySelectorAll("[data-gid]")];
const parts = [...rows.map(row => [row, row.cells[0].textContent]), ...lines.map(line => [line, line.dataset.gid])];
for (const line of lines) for (const path of line.querySelectorAll(":scope > path")) {
  const wide = path.cloneNode();
  wide.style.cssText = "fill: none; stroke: transparent; stroke-width: 8";
  path.after(wide);
}
for (const [part, number] of parts) for (const [event, on] of [["mouseenter", true], ["mouseleave", false]])
  part.addEventListener(event, () => {
    for (const line of lines) line.ownerSVGElement.classList.toggle("pointing", on);
    for (const [other, its] of parts) other.classList.toggle("pointed", on && its === number);
  });
const order = (a, b) => (a === "") - (b === "") || (isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b);
for (const heading of document.querySelectorAll(".trials th")) {
  heading.classList.add("sorting");
  heading.addEventListener("click", () => {
    const text = row => row.cells[heading.cellIndex].textContent;
    const sign = heading.dataset.sign = -(heading.dataset.sign || -1);
    rows.sort((a, b) => sign * order(text(a), text(b))).forEach(row => row.parentNode.append(row));
  });
}
</script>"""


def write_sweep_report(folder: Path, goal: Goal, command: str = "") -> Path:
    """Writes report.html into a sweep's folder and returns its path.

    folder: with trials.jsonl. goal: by what the trials are judged. command: that repeats the winner.
    """
    trials = Journal(folder).trials
    ranked = ranking(trials, goal)
    others = [trial for trial in trials.values() if trial not in ranked]
    values = [trial.best(goal)[0] for trial in ranked]
    tried = scales_of(list(trials.values()))
    scales = scales_of(sorted(ranked, key=lambda trial: trial.number))
    parts = [
        _headline(folder, trials, ranked, tried, goal),
        _winner(folder, ranked[0], goal, command) if ranked else "",
        _parallel_coordinates(scales, ranked, values, goal),
        _learning_curves([*ranked, *others], goal),
        _importance(scales, ranked, values),
        _slices(scales, ranked, values, goal.metric),
        _table(folder, [*ranked, *others], list(tried), goal),
        SCRIPT if trials else "",
    ]
    path = folder / "report.html"
    write_text(path, render("sweep.html.j2", title=folder.absolute().name, body=Markup("\n".join(parts))))
    return path


def section(title: str, *parts: str) -> str:
    return "\n".join(["<section>", f"<h2>{escape(title)}</h2>", *parts, "</section>"])


def table(header: Sequence[str], rows: Iterable[Sequence[Cell]]) -> str:
    return part("table", header, list(rows))


def figure(svgs: Sequence[Markup], caption: str, kind: str = "shrinking") -> str:
    return part("figure", svgs, caption, kind)


def _headline(
    folder: Path,
    trials: Mapping[int, TrialRecord],
    ranked: Sequence[TrialRecord],
    tried: Mapping[str, Scale],
    goal: Goal,
) -> str:
    lines = [f"<h1>{escape(folder.absolute().name)}</h1>"]
    if not trials:
        return "\n".join([*lines, "<p>No trial of this sweep has begun.</p>"])
    facts = [counted(trials)]
    took = max(trial.heard for trial in trials.values()) - min(trial.started for trial in trials.values())
    facts.append(f"{duration(took)} from the first start to the last end")
    facts.append(f"{duration(sum(trial.seconds for trial in trials.values()))} of work in all trials")
    facts.append(f"judged by {goal.metric}, the {'larger' if goal.mode == 'max' else 'smaller'} the better")
    lines.append(f'<p class="faint">{escape("; ".join(facts))}</p>')
    if tried:
        space = "; ".join(f"{name}: {scale}{' (log)' if scale.log else ''}" for name, scale in tried.items())
        lines.append(f'<p class="faint">Tried: {escape(space)}</p>')
    if ranked:
        lines.append(f"<p>Best: {escape(_result(ranked[0], goal))}</p>")
    elif all(trial.state == FAILED for trial in trials.values()):
        lines.append("<p>All trials failed. The table says with what; error.log in a trial's folder says more.</p>")
    else:
        lines.append(f"<p>No trial has a value of {escape(goal.metric)}.</p>")
    return "\n".join(lines)


def _result(trial: TrialRecord, goal: Goal) -> str:
    """'val/acc 0.9312 of trial 7 in epoch 4'"""
    value, epoch = trial.best(goal)
    return f"{goal.metric} {value:.4f} of trial {trial.number}" + (f" in epoch {epoch}" if epoch else "")


def _winner(folder: Path, trial: TrialRecord, goal: Goal, command: str) -> str:
    rows: list[tuple[Cell, Cell]] = [("trial", _link(folder, trial))]
    rows += [(name, exact(value)) for name, value in trial.params.items()]
    checkpoint = folder / _subfolder(trial) / "checkpoints" / "best.ckpt"
    if checkpoint.exists():
        rows.append(("best checkpoint", checkpoint.as_posix()))
    parts = [table(("", _result(trial, goal)), rows)]
    if command:
        parts.append(f"<p>This trial again, as a run of its own:</p><pre>{escape(command)}</pre>")
    return section("The best trial", *parts)


def _parallel_coordinates(
    scales: Mapping[str, Scale], trials: Sequence[TrialRecord], values: Sequence[float], goal: Goal
) -> str:
    if not scales:
        return ""
    plot = sweep_plots.parallel_coordinates(scales, trials, values, goal.metric)
    svg = plots.to_svg(plot, f"parameters of the trials and {goal.metric}", _titles(trials, goal))
    caption = f"A line per trial, with {goal.metric} on the last axis. {_colours(trials)}"
    if any(trial.state == PRUNED for trial in trials):
        caption += " Dashed: pruned, with the best value until then."
    return section("Parameters and values", figure([svg], caption, kind="scrolling"))


def _learning_curves(trials: Sequence[TrialRecord], goal: Goal) -> str:
    trials = [trial for trial in trials if sweep_plots.curve_of(trial, goal.metric)[0]]
    if not trials:
        return ""
    svg = plots.to_svg(
        sweep_plots.learning_curves(trials, goal.metric), f"{goal.metric} over the epochs", _titles(trials, goal)
    )
    caption = _colours(trials)
    if any(trial.state == PRUNED for trial in trials):
        caption += " Cross: pruned there."
    if ended := [state for state in NOT_RANKED if any(trial.state == state for trial in trials)]:
        caption += f" Grey: {' or '.join(ended)} later."
    return section("Learning curves", figure([svg], caption))


def _colours(trials: Sequence[TrialRecord]) -> str:
    told = "The darker, the better its place in the ranking: dark blue, red, light gold; the best is thick."
    many = len(trials) > sweep_plots.STRONG
    return told + (f" Faint: places after {sweep_plots.STRONG}." if many else "")


def _titles(trials: Sequence[TrialRecord], goal: Goal) -> dict[str, str]:
    """What is shown of a trial when somebody points at its line."""

    def title(trial: TrialRecord) -> str:
        params = [f"{name}={shown(value)}" for name, value in trial.params.items()]
        return "\n".join([f"{_result(trial, goal)}, {trial.state}", *params])

    return {str(trial.number): title(trial) for trial in trials}


def _importance(scales: Mapping[str, Scale], trials: Sequence[TrialRecord], values: Sequence[float]) -> str:
    if not trials:
        return ""
    columns = {name: numbers(trials, name, scale) for name, scale in scales.items()}
    shares, sentence = importance(columns, values)
    if not shares:
        return section("What matters", f"<p>{escape(sentence)}</p>")
    caption = (
        f"How much worse a random forest tells the ranking of these {len(trials)} trials when one parameter is shuffled "
        f"(permutation importance), as shares of the whole. {sentence} A hint of where to look next, and not a proof: "
        "parameters that changed together cannot be told apart."
    )
    if any(trial.state == PRUNED for trial in trials):
        caption += " Pruned trials count with their best value until then, which favours those that ran longer."
    svg = plots.to_svg(sweep_plots.share_bars(shares), "shares of the parameters in the differences")
    return section("What matters", figure([svg], caption))


def _slices(scales: Mapping[str, Scale], trials: Sequence[TrialRecord], values: Sequence[float], metric: str) -> str:
    svgs = [
        plots.to_svg(sweep_plots.slice_plot(name, scale, trials, values, metric), f"{metric} over {name}")
        for name, scale in scales.items()
    ]
    if not svgs:
        return ""
    caption = "A dot per trial that has the parameter, with a ring around the best."
    if any(trial.state == PRUNED for trial in trials):
        caption += " Hollow: pruned."
    return section("One parameter at a time", figure(svgs, caption))


def _table(folder: Path, trials: Sequence[TrialRecord], names: Sequence[str], goal: Goal) -> str:
    if not trials:
        return ""

    def row(trial: TrialRecord) -> list[Cell]:
        value, epoch = trial.best(goal) or ("", "")
        params = [shown(trial.params[name]) if name in trial.params else "" for name in names]
        return [
            _link(folder, trial),
            trial.state,
            *params,
            value,
            epoch or "",
            len(trial.rows),
            f"{trial.seconds:.1f}",
            trial.error,
        ]

    header = ["trial", "state", *names, goal.metric, "in epoch", "epochs", "seconds", "error"]
    return section("All trials", f'<div class="scrolling trials">{table(header, map(row, trials))}</div>')


def _subfolder(trial: TrialRecord) -> str:
    return PurePath(trial.folder).name  # the sweep's folder may have been moved since


def _link(folder: Path, trial: TrialRecord) -> Link:
    report = f"{_subfolder(trial)}/report.html"
    return Link(str(trial.number), report if (folder / report).exists() else f"{_subfolder(trial)}/")
