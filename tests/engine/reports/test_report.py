"""The report of a run: one HTML page made of the files in the run's folder."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import yaml

from src.engine.reports import plots
from src.engine.reports.report import write_report
from src.engine.runs import tables
from src.engine.runs.files import write_csv, write_json, write_text
from src.engine.runs.tables import write_confusion
from tests.conftest import ROOT, WITH_PAGE, command_environment

METRICS = {
    "val/loss": 0.31254,
    "val/acc": 0.91,
    "val/balanced_acc": 0.8765,
    "val/macro_f1": 0.87,
    "test/loss": 0.4,
    "test/acc": 0.89996,
    "test/balanced_acc": 0.8,
    "test/macro_f1": 0.79,
}
ODD_NAMES = ["<b>x</b>", "$a_b$", "$", 'a&b"c', "猫"]


class Page(HTMLParser):
    """The page as a browser would take it apart. Fails where a tag is closed that is not open, or is left open."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.rows: list[list[str]] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")
        if tag != "meta":  # has no end
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if self.open and self.open[-1] in ("th", "td"):
            self.rows[-1][-1] += data

    @property
    def text(self) -> str:
        return "\n".join(self.texts)

    @property
    def headings(self) -> list[str]:
        return re.findall("<h2>(.*?)</h2>", self.source)


def write_metrics(folder: Path, losses: list[float]) -> None:
    """metrics.csv with an epoch of ten steps per loss."""
    rows = [
        [epoch, 10 * epoch, loss, epoch / 100, loss + 0.1, epoch / 50, 1e-3 / epoch]
        for epoch, loss in enumerate(losses, start=1)
    ]
    header = ["epoch", "step", "train/loss", "train/acc", "val/loss", "val/acc", "lr/head"]
    write_csv(folder / "metrics.csv", header, rows)


def pairs(matrix) -> list[tuple[int, int, int]]:
    """The cells of a confusion matrix that are not 0."""
    matrix = np.asarray(matrix)
    return [(true, taken, int(matrix[true, taken])) for true, taken in np.argwhere(matrix)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of a finished run of four epochs with everything in it."""
    path = tmp_path / "runs" / "pets"
    path.mkdir(parents=True)
    config = {
        "data": {"source": "image_folder", "root": "photos/<new>", "name": None, "table": None},
        "model": {"backbone": "resnet18"},
        "precision": {"name": "bf16"},
    }
    write_text(path / "config.yaml", yaml.safe_dump(config))
    write_json(
        path / "environment.json", {"started": "2026-11-23T14:03:15+00:00", "command": "python -m src.train a=b"}
    )
    result = {"state": "finished", "metrics": METRICS, "best_epoch": 3, "epochs": 4, "steps": 40}
    write_json(path / "result.json", result | {"device": "cuda:0", "wall_seconds": 61.23})
    rows = [[f"{i}.jpg", i % 2, "val" if i % 5 else "test"] for i in range(1234)]
    write_csv(path / "split.csv", ["path", "label", "split"], rows)
    write_confusion(path / "confusion.csv", ["cats", "dogs"], pairs([[411, 12], [7, 388]]))
    write_metrics(path, [2.0, 1.0, 0.5, 0.25])
    memory = [[step, 1 + step // 11, 100 + step, 5, 300 + step, ""] for step in range(1, 41)]
    names = ["step", "epoch", "live_mib", "live_allocations", "live_after_forward_mib", "empty_mib"]
    write_csv(path / "memory.csv", names, memory)
    return path


def drawn_lines(figure) -> list[tuple[list[float], list[float]]]:
    """x and y of every line of a plot."""
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in figure.axes[0].get_lines()]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """The figures of the reports written in a test, by their labels."""
    figures: dict[str, object] = {}
    to_svg = plots.to_svg

    def keep(figure, label):
        figures[label] = figure
        return to_svg(figure, label)

    monkeypatch.setattr(plots, "to_svg", keep)
    return figures


def test_it_has_everything_in_order_and_is_well_formed(folder):
    path = write_report(folder, {0: ["head"], 2: ["backbone.layer4"]})
    assert path == folder / "report.html"
    page = Page(path)
    assert page.headings == [
        *(
            "Result",
            "Data",
            "Learning curves",
            "Learning rates",
            "Classes",
            "Confusion matrix",
            "Settings",
            "Use the model",
        )
    ]
    assert "<details><summary>Memory and throughput</summary>" in page.source
    assert "This page has no images" in page.text
    assert len([tag for tag, _ in page.tags if tag == "svg"]) == 6
    assert len(re.findall("<[?!]", page.source)) == 1  # the page's own DOCTYPE


def test_it_is_self_contained(folder):
    page = Page(write_report(folder))
    assert not {"script", "link", "iframe", "img", "object"} & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            if f"{name}=" in ("src=", "href=", "xlink:href="):
                assert value.startswith(("#", "data:image/png")), (tag, name, value)
            elif not name.startswith("xmlns"):
                assert "http" not in (value or ""), (tag, name, value)
    assert not re.findall(r"@import|url\((?!#)", page.source)


def test_ids_are_unique_on_the_page_and_all_references_meet_one(folder):
    page = Page(write_report(folder))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    references = re.findall(r'(?:url\(|href=")#([^)"]+)', page.source)
    assert references
    assert set(references) <= set(ids)


def test_the_numbers_are_those_of_the_files(folder):
    page = Page(write_report(folder))
    assert page.rows == [
        ["", "accuracy", "balanced", "macro F1", "loss"],
        ["val", "0.9100", "0.8765", "0.8700", "0.3125"],
        ["test", "0.9000", "0.8000", "0.7900", "0.4000"],
        ["", "val", "test", ""],
        ["0", "493", "124", ""],
        ["1", "494", "123", ""],
        ["", "images", "recall", "95 % interval", "precision"],
        ["cats", "423", "0.9716", "0.95 to 0.98", "0.9833"],
        ["dogs", "395", "0.9823", "0.96 to 0.99", "0.9700"],
    ]
    for fact in (
        *("resnet18 on image_folder photos/<new>", "1,234 images in 2 classes (987 val, 247 test)", "cuda:0, bf16"),
        *("best epoch 3 of 4, 40 steps", "61.2 s", "2026-11-23 14:03:15 UTC"),
    ):
        assert fact in page.text
    assert "19 of 818 test images were taken for another class." in page.text
    assert {"cats", "dogs", "411", "12", "7", "388"} <= set(page.texts)
    assert "python -m src.train a=b" in page.texts
    assert "source: image_folder" in page.text


def test_curves_are_those_of_metrics_csv(folder, made):
    write_report(folder, {0: ["head"], 2: ["backbone.layer4"], 4: ["backbone.layer3"]})
    epochs = [1, 2, 3, 4]
    train, val, change, best = drawn_lines(made["loss of train and val over the epochs"])
    assert train == (epochs, [2.0, 1.0, 0.5, 0.25])
    assert val == (epochs, [2.1, 1.1, 0.6, 0.35])
    assert change[0] == [2.5, 2.5]  # phase 2 is the third epoch; phase 4 was never reached
    assert best == ([3], [0.6])
    assert drawn_lines(made["accuracy of train and val over the epochs"])[3] == ([3], [0.06])
    assert drawn_lines(made["learning rates over the epochs"]) == [(epochs, [1e-3, 5e-4, 1e-3 / 3, 2.5e-4])]


def test_changes_of_the_freezing_are_told(folder):
    many = [f"backbone._blocks.{number}" for number in range(5, 9)]
    page = Page(write_report(folder, {0: ["head"], 2: ["backbone.layer4", "backbone.<x>"], 3: many, 4: ["never"]}))
    told = "layer4, <x> from epoch 3 on; _blocks.5 to _blocks.8 (4 blocks) from epoch 4 on."
    assert f"Circle: the best epoch, 3. Dotted lines, where more learns: {told}" in page.text
    assert "never" not in page.text
    assert "Dotted" not in Page(write_report(folder)).text


def test_memory_has_a_plot_of_the_whole_and_one_of_the_phases_of_a_step(folder, made):
    write_report(folder, {2: ["backbone.layer4"]})
    steps = list(range(1, 41))
    whole, change = drawn_lines(made["memory over the steps"])
    assert whole == (steps, [100 + step for step in steps])
    assert change[0] == [20, 20]  # the end of the second epoch
    phases, _ = drawn_lines(made["memory in the phases of each step"])
    assert phases == (steps, [300 + step for step in steps])


def test_memory_of_quick_steps_is_a_line_through_those_that_were_measured(folder, made):
    rows = [[step, 1, 100 + step if step % 3 == 0 else ""] for step in range(1, 11)]
    write_csv(folder / "memory.csv", ["step", "epoch", "live_mib"], rows)
    write_report(folder)
    assert drawn_lines(made["memory over the steps"])[0] == ([3, 6, 9], [103, 106, 109])


def test_memory_of_a_run_that_was_killed_at_once(folder):
    write_csv(folder / "memory.csv", ["step", "epoch", "live_mib"], [])
    (folder / "metrics.csv").unlink()
    assert "Memory and throughput" not in Page(write_report(folder)).source
    write_csv(folder / "memory.csv", ["step", "epoch", "live_mib"], [[1, 1, 50]])
    assert "Memory and throughput" in Page(write_report(folder, {1: ["backbone.layer4"]})).source


def test_thinned_keeps_every_peak_in_order():
    values = [10.0] * 100_000
    values[123], values[77_777], values[5] = 900.0, 800.0, float("nan")
    x, y = plots.thinned(range(100_000), values)
    assert len(x) == len(y) == 1000
    assert list(x) == sorted(x)
    assert [place for place, value in zip(x, y, strict=True) if value > 10] == [123, 77_777]
    assert plots.thinned([1, 2, 3], [5.0, float("nan"), 4.0])[0] == [1, 2, 3]
    assert plots.thinned([1, 2], [float("nan"), -4.0], most=1) == ([2], [-4.0])


@pytest.mark.parametrize(
    ("file", "section"),
    [
        ("metrics.csv", "Learning curves"),
        ("confusion.csv", "Confusion matrix"),
        ("memory.csv", "Memory"),
        ("result.json", "Use the model"),
        ("environment.json", None),
        ("split.csv", None),
    ],
)
def test_what_is_missing_is_left_out(folder, file, section):
    (folder / file).unlink()
    page = Page(write_report(folder, {2: ["backbone.layer4"]}))
    assert section not in page.headings
    assert "Settings" in page.headings
    assert len(page.headings) >= 5


def test_a_run_that_is_not_finished_says_so(folder):
    write_json(folder / "result.json", {"state": "failed", "error": "ValueError: <bad>"})
    page = Page(write_report(folder))
    assert "This run is not finished: ValueError: <bad>" in page.texts
    assert "Learning curves" in page.headings
    assert not {"Result", "Use the model"} & set(page.headings)


@pytest.mark.filterwarnings("error")  # matplotlib's own font lacks most of the world's writing; browsers do not
def test_names_are_text_whatever_they_hold(folder):
    write_confusion(folder / "confusion.csv", ODD_NAMES, pairs(np.eye(5, dtype=int)))
    folder = folder.rename(folder.with_name("a&b $x$ 'c'"))
    page = Page(write_report(folder))
    assert all(page.texts.count(name) == 3 for name in ODD_NAMES), page.texts
    assert not {"b", "new"} & {tag for tag, _ in page.tags}
    assert page.texts.count(folder.name) == 2  # title and headline
    assert "images=FOLDER_OR_FILE" in page.text


def test_a_page_holds_no_control_characters(folder):
    names = ["\x07b", "Stra\udcdfe"]
    write_confusion(folder / "confusion.csv", names, pairs([[1, 0], [0, 1]]))
    folder = folder.rename(folder.with_name("\x1b[31m\u202e"))
    write_json(folder / "result.json", {"state": "failed", "error": "\x1b[2J"})
    html = Page(write_report(folder)).source
    assert all(letter.isprintable() or letter in "\n\t" for letter in html)
    assert "Stra\\udcdfe" in html


def test_a_run_that_is_older_than_a_metric_shows_what_it_has(folder, monkeypatch):
    monkeypatch.setattr(tables, "COLUMNS", {"acc": "accuracy", "later": "later", "loss": "loss"})
    own = ["balanced_acc", "macro_f1"]  # as metrics of the owner's, since their titles are gone
    assert Page(write_report(folder)).rows[0] == ["", "accuracy", "loss", *own]


def test_the_commands_can_be_pasted_though_the_path_has_spaces(folder):
    folder = folder.rename(folder.with_name("my pets"))
    commands = [shlex.split(line) for line in Page(write_report(folder)).text.splitlines() if "src.predict" in line]
    path = folder.as_posix()
    assert [words[3:] for words in commands] == [
        [f"run={path}", "images=FOLDER_OR_FILE"],
        [f"model={path}/model", "images=FOLDER_OR_FILE"],
    ]


def test_long_names_are_shortened_in_the_plot():
    figure = plots.heat_map(np.eye(2, dtype=int), ["a" * 99, "two\nlines"], "predicted", "true")
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["a" * 23 + "…", "two lines"]


def test_one_epoch_is_a_dot_with_one_tick(folder, made):
    write_metrics(folder, [2.0])
    write_json(
        folder / "result.json", {"state": "finished", "best_epoch": 1, "epochs": 1, "steps": 10, "wall_seconds": 1}
    )
    Page(write_report(folder, {1: ["backbone.layer4"]}))
    axes = made["loss of train and val over the epochs"].axes[0]
    assert all(line.get_marker() != "None" for line in axes.get_lines())
    low, high = axes.get_xlim()
    assert [tick for tick in axes.get_xticks() if low <= tick <= high] == [1]


@pytest.mark.parametrize("losses", [["nan"] * 4, ["nan", "inf", 1.0, "nan"], [1e30, 2.0, 1e-9, 0.0]])
def test_losses_that_are_no_numbers(folder, losses):
    write_metrics(folder, [float(loss) for loss in losses])
    result = json.loads((folder / "result.json").read_text())
    write_json(folder / "result.json", result | {"metrics": METRICS | {"test/loss": float("nan")}})
    page = Page(write_report(folder))
    assert page.rows[2] == ["test", "0.9000", "0.8000", "0.7900", "nan"]


def test_many_classes_are_a_map_without_numbers_and_a_list_of_the_worst(folder):
    names = [f"<b>{number}</b>" for number in range(200)]
    matrix = np.diag([53] * 200)
    for mistakes in range(1, 15):
        matrix[mistakes, mistakes + 100] = mistakes
    write_confusion(folder / "confusion.csv", names, pairs(matrix))
    page = Page(write_report(folder))
    assert page.rows[-11:] == [
        ["true class", "predicted", "images", "of"],
        *([names[n], names[n + 100], str(n), str(53 + n)] for n in range(14, 4, -1)),
    ]
    lowest = page.rows.index(["", "images", "recall", "95 % interval", "precision"]) + 1
    assert [row[0] for row in page.rows[lowest : lowest + 10]] == [names[n] for n in range(14, 4, -1)]
    assert page.rows[lowest][1:] == ["67", "0.7910", "0.68 to 0.87", "1.0000"]
    assert "<details><summary>the other 190</summary>" in page.source
    assert "53" not in re.findall("<text[^>]*>(.*?)</text>", page.source)
    assert len(page.source) < 300_000


def test_ten_thousand_classes_are_a_list_of_pairs(folder):
    """A matrix would have 100 million cells."""
    names = [f"class, {number}" for number in range(10_000)]
    found = [(number, number, 3) for number in range(0, 10_000, 2)] + [(7, 9_999, 5), (7, 8, 1)]
    write_confusion(folder / "confusion.csv", names, sorted(found))
    text = (folder / "confusion.csv").read_text()
    assert text.startswith('true,predicted,count\n"class, 0","class, 0",3\n')
    assert len(text) < 200_000
    page = Page(write_report(folder))
    assert "6 of 15,006 test images were taken for another class." in page.texts
    assert page.rows[-2:] == [["class, 7", "class, 9999", "5", "6"], ["class, 7", "class, 8", "1", "6"]]
    assert "The 10 of 5001 with the lowest recall" in page.source
    assert len(page.source) < 200_000


def test_fewer_mistakes_than_the_list_is_long(folder):
    matrix = np.diag([50] * 40)
    names = [str(number) for number in range(40)]
    write_confusion(folder / "confusion.csv", names, pairs(matrix))
    header = ["true class", "predicted", "images", "of"]
    assert header not in Page(write_report(folder)).rows
    matrix[3, 4] = 2
    write_confusion(folder / "confusion.csv", names, pairs(matrix))
    assert Page(write_report(folder)).rows[-2:] == [header, ["3", "4", "2", "52"]]


def test_a_class_without_images_and_the_split_of_the_matrix(folder):
    write_confusion(folder / "confusion.csv", ["cats", "dogs"], pairs([[5, 1], [0, 0]]))
    val_only = {name: value for name, value in METRICS.items() if name.startswith("val")}
    result = json.loads((folder / "result.json").read_text())
    write_json(folder / "result.json", result | {"metrics": val_only})
    assert "1 of 6 val images were taken for another class." in Page(write_report(folder)).texts


def test_the_same_files_give_the_same_page_whatever_matplotlib_is_set_to(folder):
    first = write_report(folder).read_bytes()
    with matplotlib.rc_context({"axes.facecolor": "black", "text.usetex": True, "font.size": 30}):
        assert write_report(folder).read_bytes() == first
        assert matplotlib.rcParams["font.size"] == 30
    assert str(matplotlib.__version__) not in first.decode()


def test_many_lines_can_all_be_told_apart():
    lines = {f"run {number}": ([1, 2], [number, number]) for number in range(12)}
    drawn = plots.line_plot(lines, "epoch", "accuracy").axes[0].get_lines()
    assert len({(line.get_color(), line.get_linestyle()) for line in drawn}) == 12


def test_a_phone_and_a_dark_screen_are_thought_of(folder):
    page = Page(write_report(folder))
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags
    assert "prefers-color-scheme: dark" in page.source
    assert "max-width: 100%;" in page.source


def test_matplotlib_waits_for_the_first_report():
    code = (
        "import sys; import src.engine.reports.report; print([n for n in ('matplotlib', 'torch') if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=command_environment()
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_a_run_without_a_page_gets_it_by_a_command(command, tmp_path):
    page = tmp_path / "runs/one/report.html"
    words = (*WITH_PAGE, "report.page=false", "name=one", "trainer.max_epochs=1")
    done = command("train", *words)
    assert done.code == 0, done.text
    assert "report.html" not in done.text
    assert "finished already" in command("train", *words).out
    assert not page.exists()
    assert command("report", "run=runs/one").code == 0
    assert page.exists()


def test_a_page_is_there_before_the_result_and_is_made_again_where_it_is_missing(command, tmp_path):
    run = tmp_path / "runs" / "one"
    assert command("train", *WITH_PAGE, "name=one", "trainer.max_epochs=1").code == 0
    assert (run / "result.json").stat().st_mtime_ns >= (run / "report.html").stat().st_mtime_ns
    (run / "report.html").unlink()  # as where the disk was full just then
    again = command("train", *WITH_PAGE, "name=one", "trainer.max_epochs=1")
    assert "finished already" in again.out
    assert (run / "report.html").exists()
