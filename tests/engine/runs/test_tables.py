"""The end of a run on the screen: what is there is named, as a shell takes it."""

from __future__ import annotations

import shlex

from src.engine.runs.tables import compared_metric, interval_text, metrics_table, print_result

RESULT = {
    "metrics": {"val/acc": 0.5, "val/balanced_acc": 0.4, "val/macro_f1": 0.3, "val/loss": 1.0},
    **{"best_epoch": 1, "epochs": 2, "weights": "epoch 1", "steps": 4, "wall_seconds": 1.0},
}


def test_only_the_metrics_that_a_run_has_are_columns_and_one_that_a_split_lacks_is_empty():
    header, row, _ = metrics_table({"val/acc": 0.5, "val/loss": 1.0, "test/macro_f1": 0.1}).splitlines()
    assert header.split() == ["accuracy", "macro", "F1", "loss"]
    assert row.split() == ["val", "0.5000", "1.0000"]
    assert row.endswith("1.0000")
    assert len(row) == len(header)


def test_the_loss_is_not_what_runs_are_compared_by():
    assert compared_metric("val/loss", ["test/acc", "test/loss"]) == "acc"
    assert compared_metric("val/macro_f1", ["test/acc", "test/macro_f1"]) == "macro_f1"
    assert compared_metric("val/loss", ["test/loss"]) == "loss"


def test_a_metric_of_the_owners_is_a_column_as_wide_as_its_name():
    header, row = metrics_table({**RESULT["metrics"], "val/mean_reciprocal_rank": 0.25}).splitlines()
    assert header.split()[-1] == "mean_reciprocal_rank"
    assert row.split()[-1] == "0.2500"
    assert len(row) == len(header)


def test_only_files_that_exist_are_named_and_commands_are_quoted(tmp_path, caplog):
    caplog.set_level("INFO")
    run = tmp_path / "a b [red]\x1b"
    (run / "model").mkdir(parents=True)
    (run / "metrics.csv").touch()
    print_result(run, RESULT)
    files = next(line for line in caplog.messages if line.startswith("files"))
    assert files.endswith(": metrics.csv, model/")
    assert "report.html" not in caplog.text
    assert "\x1b" not in "".join(caplog.messages)
    command = next(line for line in caplog.messages if "src.evaluate" in line)
    assert "run=$'" in command
    (tmp_path / "c d").mkdir()
    print_result(tmp_path / "c d", RESULT)
    assert shlex.split(caplog.messages[-1])[-1] == f"run={tmp_path / 'c d'}"


def test_large_values_do_not_run_into_the_next_column():
    lines = metrics_table({"val/r2": 0.5, "val/mae": 123456.7, "val/rmse": 12345678.9, "test/r2": -12.5}).splitlines()
    assert lines[0].split() == ["R2", "MAE", "RMSE"]
    assert lines[1].split() == ["val", "0.5000", "123457", "1.23457e+07"]
    assert {line.index(word) + len(word) for line, word in zip(lines, ("R2", "0.5000", "-12.5000"), strict=True)} == {
        18
    }


def test_an_interval_has_the_digits_that_its_width_needs_and_stands_below_its_number():
    ends = [(0.9312, 0.9714), (0.1, 0.7), (-1.31, -0.001), (11.26, 13.4), (950.3, 1210.8), (0.5, 0.5)]
    texts = ["0.931 to 0.971", "0.10 to 0.70", "-1.31 to 0.00", "11.3 to 13.4", "950 to 1211", "0.5000 to 0.5000"]
    assert [interval_text(*each) for each in ends] == texts
    _, row, below = metrics_table({"test/acc": 0.5, "test/loss": 1.0}, {"test/acc": (0.4, 0.6)}).splitlines()
    assert below.split() == ["95", "%", "0.40", "to", "0.60"]
    assert len(below) == row.index("0.5000") + len("0.5000")
