"""The report of a sweep: one HTML page made of trials.jsonl."""

from __future__ import annotations

import json
import math
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest

from src.engine.reports import plots
from src.engine.sweep_reports import sweep_plots
from src.engine.sweep_reports.sweep_plots import Scale, scales_of
from src.engine.sweep_reports.sweep_report import importance, write_sweep_report
from src.engine.sweeps.progress import shown
from src.engine.sweeps.sweep_journal import FAILED, FINISHED, PAUSED, PRUNED, RUNNING, Goal, Journal, TrialRecord
from tests.conftest import ROOT, command_environment
from tests.engine.reports.test_report import Page

METRIC = "val/acc"
COMMAND = "python -m src.train optimizer.lr=0.01 'name=a b'"

Trial = tuple[dict[str, Any], list[float], str]  # parameters, the metric of epochs 1, 2, ..., state


def write_journal(folder: Path, trials: list[Trial]) -> Path:
    """trials.jsonl; a trial begins when the one before it ends, and an epoch takes ten seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    now, events = 1_000_000.0, []
    for number, (params, curve, state) in enumerate(trials):
        trial = {"trial": number, "folder": f"runs/{folder.name}/{number}", "params": params, "overrides": []}
        events.append({"event": "started", "time": now, **trial})
        for epoch, value in enumerate(curve, start=1):
            now += 10
            row = {"epoch": epoch, METRIC: value, "val/loss": 1 - value}
            events.append({"event": "row", "trial": number, "row": row, "time": now})
        if state != RUNNING:
            error = "ValueError: <bad> & worse" if state == FAILED else ""
            events.append(
                {"event": "ended", "trial": number, "state": state, "value": None, "error": error, "time": now}
            )
    (folder / "trials.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return folder


def mixed(count: int) -> list[Trial]:
    """Trials with eight parameters, some pruned and some failed; the first lacks the added one. The last is the best."""
    draw = random.Random(0)
    trials: list[Trial] = []
    for number in range(count):
        params = {
            "optimizer.lr": 10 ** draw.uniform(-5, -1),
            "optimizer.weight_decay": 10 ** draw.uniform(-6, -2),
            "data.batch_size": draw.choice([16, 32, 64, 128]),
            "data.color_jitter": draw.uniform(0.1, 0.5),
            "model.backbone": draw.choice(["resnet50", "timm/vit_small_patch16_224", "efficientnet_lite0"]),
            "model.pretrained": draw.choice([True, False]),
            "freeze.lr_decay": draw.uniform(0.5, 1),
            "+trainer.accumulate": draw.randint(1, 12),
        }
        if number == 0:
            del params["+trainer.accumulate"]
        state = (FINISHED, PRUNED, PRUNED, FINISHED, FAILED)[number % 5] if number < count - 1 else FINISHED
        epochs = 27 if state == FINISHED else 3
        top = draw.uniform(0.5, 0.9) if number < count - 1 else 0.95
        trials.append((params, [top * (1 - 0.5**epoch) for epoch in range(1, epochs + 1)], state))
    return trials


THREE: list[Trial] = [
    ({"optimizer.lr": 0.0001, "model.head": "linear"}, [0.3, 0.5], PRUNED),
    ({"optimizer.lr": 0.01, "model.head": "mlp"}, [0.4, 0.8, 0.7], FINISHED),
    ({"optimizer.lr": 0.001, "model.head": "mlp", "+x": None}, [0.6], FAILED),
]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The figures of the reports written in a test, by their labels."""
    figures: dict[str, Any] = {}
    to_svg = plots.to_svg

    def keep(figure, label, titles=None):
        figures[label] = figure
        return to_svg(figure, label, titles)

    monkeypatch.setattr(plots, "to_svg", keep)
    return figures


def report(folder: Path, trials: list[Trial], mode: str = "max", metric: str = METRIC) -> Page:
    results = {"command": COMMAND, "best_folder": "0"}
    return Page(write_sweep_report(write_journal(folder, trials), Goal(metric, mode), results))


def lines_of(figure: Any) -> dict[str, Any]:
    """The lines of trials, by the number of the trial."""
    return {line.get_gid(): line for line in figure.axes[0].get_lines() if line.get_gid()}


def test_the_page_from_top_to_bottom(tmp_path):
    (tmp_path / "lr" / "1" / "checkpoints").mkdir(parents=True)
    (tmp_path / "lr" / "1" / "report.html").touch()
    (tmp_path / "lr" / "1" / "checkpoints" / "best.ckpt").touch()
    page = report(tmp_path / "lr", THREE)
    assert page.headings == [
        *("The best trial", "Parameters and values", "Learning curves", "What matters", "One parameter at a time"),
        "All trials",
    ]
    assert page.texts.count("lr") >= 2  # title and headline
    facts = ["3 trials: 1 finished, 1 pruned, 1 failed", "1 min from the first start to the last end"]
    facts += ["1 min of work in all trials", "judged by val/acc, the larger the better"]
    assert "; ".join(facts) in page.texts
    assert "Tried: optimizer.lr: 0.0001, 0.001, 0.01 (log); model.head: linear, mlp" in page.texts
    assert "Best: val/acc 0.8000 of trial 1 in epoch 2" in page.texts
    assert page.rows[:5] == [
        ["", "val/acc 0.8000 of trial 1 in epoch 2"],
        ["trial", ""],  # a link
        ["optimizer.lr", "0.01"],
        ["model.head", "mlp"],
        ["best checkpoint", (tmp_path / "lr" / "1" / "checkpoints" / "best.ckpt").as_posix()],
    ]
    assert COMMAND in page.texts
    assert page.rows[5:] == [
        ["trial", "state", "optimizer.lr", "model.head", METRIC, "in epoch", "epochs", "seconds", "error"],
        ["", "finished", "0.01", "mlp", "0.8000", "2", "3", "30.0", ""],
        ["", "pruned", "0.0001", "linear", "0.5000", "2", "2", "20.0", ""],
        ["", "failed", "0.001", "mlp", "0.6000", "1", "1", "10.0", "ValueError: <bad> & worse"],
    ]
    assert [attributes["href"] for tag, attributes in page.tags if tag == "a"] == [
        *("1/report.html", "1/report.html", "0/", "2/")
    ]


def test_the_smallest_is_best_where_mode_says_so(tmp_path):
    page = report(tmp_path / "lr", THREE, "min", "val/loss")
    assert "Best: val/loss 0.2000 of trial 1 in epoch 2" in page.texts
    assert "judged by val/loss, the smaller the better" in page.text


def test_it_is_self_contained_and_can_be_read_without_its_script(tmp_path):
    page = report(tmp_path / "lr", mixed(20))
    assert not {"link", "iframe", "img", "object"} & {tag for tag, _ in page.tags}
    assert not re.findall(r"<[^>]*\bsrc=", page.source)
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", page.source)
    assert not re.findall(r"@import|url\((?!#)", page.source)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert "visibility" not in page.source
    assert "display: none" not in page.source


def test_the_same_journal_gives_the_same_page(tmp_path):
    folder = write_journal(tmp_path / "lr", mixed(12))
    first = write_sweep_report(folder, Goal(METRIC, "max"), {}).read_bytes()
    with matplotlib.rc_context({"axes.facecolor": "black", "font.size": 30}):
        assert write_sweep_report(folder, Goal(METRIC, "max"), {}).read_bytes() == first


def test_the_page_says_how_sure_the_winner_is(tmp_path):
    again = {"folder": "runs/heads/retrained_1_seed_4", "metrics": {METRIC: 0.7, "test/acc": 0.625}, "intervals": {}}
    results = {
        "best_folder": "runs/heads/1",
        "val_ties": {"trials": [1, 0], "standard_error": 0.02},
        "retrained": again,
    }
    page = Page(write_sweep_report(write_journal(tmp_path, THREE), Goal(METRIC, "max"), results))
    assert "cannot tell the best 2 of 2 trials apart (±0.020)" in page.texts
    assert f"runs/heads/retrained_1_seed_4: {METRIC} 0.7000, test/acc 0.6250" in page.texts


def test_fifty_trials_with_eight_parameters(tmp_path, made):
    page = report(tmp_path / "lr", mixed(50))
    assert len(page.source) < 400_000
    assert len(page.rows) == 50 + 1 + 8 + 2  # all trials, and the winner with its parameters
    assert "50 trials: 21 finished, 20 pruned, 9 failed" in page.text
    assert "What matters" in page.headings
    assert len(made) == 2 + 1 + 8


def test_a_trials_line_says_which_it_is(tmp_path):
    source = report(tmp_path / "lr", THREE).source
    tooltip = "val/acc 0.5000 of trial 0 in epoch 2, pruned\noptimizer.lr=0.0001\nmodel.head=linear"
    assert source.count(f'<g data-gid="0"><title>{tooltip}</title>') == 3  # parameters, curve, the cross at its end


def test_parallel_coordinates(tmp_path, made):
    report(tmp_path / "lr", [*THREE, ({"optimizer.lr": 0.001}, [0.6], FINISHED)])
    figure = made["parameters of the trials and val/acc"]
    lines = lines_of(figure)
    assert set(lines) == {"0", "1", "3"}  # a failed one has no value
    assert np.allclose(lines["1"].get_ydata(), [1, 1, 1])
    assert np.allclose(lines["0"].get_ydata(), [0, 0, 0])
    assert np.allclose(lines["3"].get_ydata(), [0.5, math.nan, 1 / 3], equal_nan=True)  # log; a gap
    assert lines["3"].get_marker() == "o"
    assert lines["0"].is_dashed()
    assert not lines["1"].is_dashed()
    assert lines["1"].get_linewidth() > 2 * lines["3"].get_linewidth() > 2 * lines["0"].get_linewidth()
    assert lines["1"].get_zorder() > lines["3"].get_zorder() > lines["0"].get_zorder()
    assert [lines[number].get_color() for number in "130"] == [colour.lower() for colour in plots.COLOURS]
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["optimizer\nlr", "model\nhead", "val/acc"]
    assert [text.get_text() for text in axes.texts] == [
        *("0.0001", "0.001", "0.01", "linear", "mlp", "0.5", "0.6", "0.8")
    ]


def test_there_are_no_parallel_coordinates_where_nothing_differs(tmp_path):
    page = report(tmp_path / "lr", [({"a": 1}, [0.5, 0.6], FINISHED), ({"a": 1}, [0.4, 0.5], FINISHED)])
    assert page.headings == ["The best trial", "Learning curves", "What matters", "All trials"]
    assert "Tried" not in page.text


def test_learning_curves(tmp_path, made):
    trials = [*THREE, ({"optimizer.lr": 1.0}, [0.2], FINISHED), ({"optimizer.lr": 2.0}, [], FAILED)]
    page = report(tmp_path / "lr", trials)
    drawn = [
        (line.get_gid(), list(line.get_xdata()), list(line.get_ydata()), line.get_marker())
        for line in made["val/acc over the epochs"].axes[0].get_lines()
    ]
    assert drawn == [
        ("1", [1, 2, 3], [0.4, 0.8, 0.7], "None"),
        ("0", [1, 2], [0.3, 0.5], "None"),
        ("0", [2], [0.5], "x"),
        ("3", [1], [0.2], "o"),
        ("2", [1], [0.6], "o"),
    ]
    lines = lines_of(made["val/acc over the epochs"])
    assert lines["2"].get_color() == sweep_plots.NO_VALUE
    assert lines["1"].get_linewidth() > 2 * lines["3"].get_linewidth()
    assert "Cross: pruned there. Grey: failed later." in page.text
    page = report(tmp_path / "all_finished", [({"a": a}, [0.1, a], FINISHED) for a in (0.2, 0.3)])
    assert not re.search("[Pp]runed", page.text)
    assert "failed" not in page.text


def test_a_curve_is_in_the_order_of_its_epochs():
    rows = {epoch: {METRIC: epoch / 10} for epoch in (1, 2, 6, 5)}  # pbt set it back, to an epoch it had jumped over
    trial = TrialRecord(0, "0", {}, [], rows=rows)
    assert sweep_plots.curve_of(trial, METRIC) == ([1, 2, 5, 6], [0.1, 0.2, 0.5, 0.6])


def test_time_between_two_starts_of_a_sweep_is_no_work(tmp_path):
    folder = write_journal(tmp_path / "lr", [({"a": 1}, [0.5, 0.6], PAUSED)])
    again = [
        {"event": "started", "trial": 0, "folder": "runs/lr/0", "params": {"a": 1}, "overrides": [], "time": 1_090_000},
        {"event": "ended", "trial": 0, "state": FINISHED, "value": 0.6, "error": "", "time": 1_090_005},
    ]
    with (folder / "trials.jsonl").open("a") as file:
        file.write("".join(json.dumps(event) + "\n" for event in again))
    page = Page(write_sweep_report(folder, Goal(METRIC, "max"), {}))
    assert "25 h from the first start to the last end; 25 s of work in all trials" in page.text
    assert page.rows[-1][-2] == "25.0"


def test_of_many_trials_the_best_are_drawn_strongly(tmp_path, made):
    trials: list[Trial] = [({"a": number, "b": number % 7}, [number / 100], FINISHED) for number in range(80)]
    page = report(tmp_path / "lr", trials)
    for label in ("parameters of the trials and val/acc", "val/acc over the epochs"):
        strong = {number for number, line in lines_of(made[label]).items() if line.get_alpha() == 1}
        assert strong == {str(number) for number in range(20, 80)}
    assert "Faint: places after 60." in page.text
    assert "Faint" not in report(tmp_path / "few", trials[:60]).text


def test_slices(tmp_path, made):
    report(tmp_path / "lr", [*THREE, ({"optimizer.lr": 0.001}, [0.6], FINISHED)])
    axes = made["val/acc over optimizer.lr"].axes[0]
    dots = axes.collections[0]
    assert np.allclose(dots.get_offsets(), [[-2, 0.8], [-3, 0.6], [-4, 0.5]])
    assert [len(face) and face[3] for face in dots.get_facecolors()] == [1, 1, 0]  # hollow: pruned
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0.0001", "0.001", "0.01"]
    (ring,) = axes.get_lines()
    assert (list(ring.get_xdata()), list(ring.get_ydata())) == ([-2], [0.8])
    heads = made["val/acc over model.head"].axes[0]
    assert [label.get_text() for label in heads.get_xticklabels()] == ["linear", "mlp"]
    assert np.isnan(heads.collections[0].get_offsets().filled(math.nan)[1, 0])


@pytest.mark.parametrize("mode", ["max", "min"])
def test_one_parameter_decides(mode, tmp_path, made):
    draw = random.Random(1)
    trials: list[Trial] = []
    for number in range(30):
        lr, head, decay = 10 ** draw.uniform(-5, -1), draw.choice(["linear", "mlp"]), draw.uniform(0, 1)
        value = 0.9 - 0.1 * abs(math.log10(lr) + 3)
        params = {"model.head": head, "optimizer.lr": lr, "optimizer.weight_decay": decay}
        trials.append((params, [value], PRUNED if number % 3 else FINISHED))
    page = report(tmp_path / "lr", trials, mode)
    axes = made["shares of the parameters in the differences"].axes[0]
    shares = [bar.get_width() for bar in axes.patches]
    assert axes.get_yticklabels()[0].get_text() == "optimizer.lr"
    assert shares[0] > 0.8
    assert sum(shares) == pytest.approx(1)
    assert shares == sorted(shares, reverse=True)
    assert "A hint of where to look next, and not a proof" in page.text
    assert "favours those that ran longer" in page.text
    assert re.search(r"the forest explains \d\d% of the differences", page.text)


def test_importance_of_a_category_and_of_a_parameter_that_is_lacking():
    values = [0.1 * (number % 2) + 0.001 * number for number in range(20)]
    noise = [float(number * 7 % 20) for number in range(20)]
    shares, _ = importance({"noise": noise, "head": [float(number % 2) for number in range(20)]}, values)
    assert list(shares) == ["head", "noise"]
    shares, _ = importance({"noise": noise, "+x": [1.0 if number % 2 else math.nan for number in range(20)]}, values)
    assert list(shares) == ["+x", "noise"]


def test_importance_is_not_led_by_one_trial_that_diverged():
    decides, other = [float(number) for number in range(20)], [float(number * 7 % 20) for number in range(20)]
    losses = [0.1 * number for number in range(19)] + [1e12]
    losses[8], losses[19] = losses[19], losses[8]
    shares, _ = importance({"decides": decides, "other": other}, losses)
    assert shares["decides"] > 0.6


def test_importance_says_why_it_cannot_be_told():
    six = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert importance({"a": six[:5], "b": six[:5]}, six[:5])[0] == {}
    assert "takes 6 trials that have one; of these there are 5" in importance({"a": six[:5], "b": six[:5]}, six[:5])[1]
    assert importance({"a": six}, six) == ({}, importance({}, six)[1])
    assert "Only one parameter differs" in importance({"a": six}, six)[1]
    shares, why = importance({"a": six, "b": six[::-1]}, [0.5] * 6)
    assert shares == {}
    assert "All trials have the same value" in why
    assert set(importance({"a": six, "b": six[::-1]}, six)[0]) == {"a", "b"}


def test_importance_owns_up_where_it_is_chance():
    draw = random.Random(3)
    columns = {name: [draw.random() for _ in range(20)] for name in "ab"}
    shares, sentence = importance(columns, [draw.random() for _ in range(20)])
    assert shares
    assert "cannot predict trials that it has not seen" in sentence


def test_a_constant_metric_has_no_bars(tmp_path, made):
    page = report(tmp_path / "lr", [({"a": a, "b": a % 3}, [0.5], FINISHED) for a in range(8)])
    assert "All trials have the same value: it depends on none of the parameters." in page.texts
    assert not [label for label in made if "shares" in label]


def test_a_sweep_in_which_all_trials_failed(tmp_path):
    page = report(tmp_path / "lr", [({"a": a}, [], FAILED) for a in (1, 2)])
    assert "All trials failed. The table says with what; error.log in a trial's folder says more." in page.texts
    assert page.headings == ["All trials"]
    assert page.rows[1] == ["", "failed", "1", "", "", "0", "0.0", "ValueError: <bad> & worse"]


def test_a_sweep_without_trials(tmp_path):
    page = report(tmp_path / "lr", [])
    assert "No trial of this sweep has begun." in page.texts
    assert page.headings == []
    assert not page.rows


def test_a_metric_that_nobody_reports(tmp_path):
    page = report(tmp_path / "lr", THREE, metric="val/<f1>")
    assert "No trial has a value of val/<f1>." in page.texts
    assert page.headings == ["All trials"]


def test_trials_that_are_under_way_or_report_nothing(tmp_path):
    folder = write_journal(tmp_path / "lr", [({"a": 1}, [0.5], PAUSED), ({"a": 2}, [0.6], RUNNING)])
    journal = Journal(folder)
    journal.started(2, "runs/lr/2", {"a": 3}, [])
    journal.ended(2, FINISHED, value=0.9)
    page = Page(write_sweep_report(folder, Goal(METRIC, "max"), {}))
    assert "3 trials: 1 finished, 1 paused, 1 running" in page.text
    assert "Best: val/acc 0.9000 of trial 2" in page.texts
    assert page.rows[-3:] == [
        ["", "finished", "3", "0.9000", "", "0", "0.0", ""],
        ["", "running", "2", "0.6000", "1", "1", "10.0", ""],
        ["", "paused", "1", "0.5000", "1", "1", "10.0", ""],
    ]
    assert "<pre>" not in page.source


@pytest.mark.filterwarnings("error")
def test_values_that_are_no_numbers(tmp_path, made):
    curves = [[math.nan, 0.5], [math.inf, math.inf], [math.nan], [1e30, 0.4], [-math.inf, 0.6]]
    page = report(tmp_path / "lr", [({"a": a}, curve, FINISHED) for a, curve in enumerate(curves)], "min")
    assert "inf" not in str(page.rows), "no value is not the best of values, whichever way it is infinite"
    assert set(lines_of(made["parameters of the trials and val/acc"])) == {"0", "3", "4"}


@pytest.mark.filterwarnings("error")  # matplotlib's own font lacks most of the world's writing; browsers do not
def test_names_are_text_whatever_they_hold(tmp_path):
    trials: list[Trial] = [
        ({"<b>": value, "$a_b$": animal}, [0.5], FINISHED) for value, animal in zip('<"&', "猫犬鳥", strict=True)
    ]
    page = report(tmp_path / "a&b 'c' #1", trials)
    assert not {"b", "bad"} & {tag for tag, _ in page.tags}
    assert page.texts.count("a&b 'c' #1") == 2
    assert "<b>" in page.texts
    assert page.rows[-1][2:4] == ["&", "鳥"]


def test_a_folder_that_needs_quoting_in_a_link(tmp_path):
    Journal(tmp_path).started(7, 'runs/lr/a&b #"1', {}, [])
    html = write_sweep_report(tmp_path, Goal(METRIC, "max"), {}).read_text()
    assert '<td class="text"><a href="a%26b%20%23%221/">7</a></td>' in html


@pytest.mark.parametrize(
    ("values", "log", "numbered", "marked"),
    [
        ([0.001, 1e-5, 0.1], True, [-3, -5, -1], ["1e-5", "0.001", "0.1"]),
        ([16, 32, 64], False, [16, 32, 64], ["16", "32", "64"]),
        ([1, 50], False, [1, 50], ["1", "50"]),
        ([1, 51], True, [0, math.log10(51)], ["1", "51"]),
        ([0, 100], False, [0, 100], ["0", "100"]),
        ([-1.5, 100.0], False, [-1.5, 100], ["-1.5", "100"]),
        (["mlp", "linear", "mlp"], False, [0, 1, 0], ["mlp", "linear"]),
        ([True, False], False, [0, 1], ["true", "false"]),
        ([None, 0.1, True, 1], False, [0, 1, 2, 3], ["null", "0.1", "true", "1"]),
        ([[1, 2], {"a": 1}], False, [0, 1], ["[1, 2]", '{"a": 1}']),
        ([1, 1.0], False, [1, 1], ["1"]),
        ([math.inf, 1.0], False, [0, 1], ["inf", "1"]),
        ([10, 10.1, 20.0], False, [10, 10.1, 20], ["10", "20"]),
        ([1, 2, 3, 4, 5, 6], False, [1, 2, 3, 4, 5, 6], ["1", "2", "3", "4", "5", "6"]),
        ([0.0, 0.1, 0.2, 0.31, 0.4, 0.9], False, [0, 0.1, 0.2, 0.31, 0.4, 0.9], ["0", "0.2", "0.4", "0.6", "0.8"]),
        ([10.0**n for n in range(6)], True, [0, 1, 2, 3, 4, 5], ["1", "10", "100", "1000", "1e4", "1e5"]),
        ([1, 2, 3, 4, 70, 80], True, None, ["1", "2", "5", "10", "20", "50"]),
    ],
)
def test_values_on_an_axis(values, log, numbered, marked):
    scale = Scale.of(values)
    assert scale.log == log
    if numbered is not None:
        assert [scale.number(value) for value in values] == pytest.approx(numbered)
    assert [text for _, text in scale.ticks(apart=0.05)] == marked


def test_parameters_that_differ_in_the_order_they_came():
    trials = [
        TrialRecord(0, "0", {"same": 1, "b": 1}, []),
        TrialRecord(1, "1", {"same": 1, "b": 2, "+c": True}, []),
        TrialRecord(2, "2", {"same": 1, "b": 2, "+c": False, "+once": 3}, []),
    ]
    scales = scales_of(trials)
    assert list(scales) == ["b", "+c"]
    assert np.array_equal(scales["+c"].numbers(trials, "+c"), [math.nan, 0, 1], equal_nan=True)


def test_numbers_are_short():
    assert [shown(value) for value in (1e-05, 0.123456, 1024, 3e20, "1e-05", 0.1)] == [
        *("1e-5", "0.1235", "1024", "3e20", "1e-05", "0.1")
    ]


def test_what_is_heavy_waits_until_it_is_needed():
    code = (
        "import sys; import src.engine.sweep_reports.sweep_report;"
        "print([n for n in ('matplotlib', 'sklearn', 'torch', 'ray') if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=command_environment()
    )
    assert done.stdout.strip() == "[]", done.stderr
