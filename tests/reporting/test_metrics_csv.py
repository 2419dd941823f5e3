"""metrics.csv goes on where the interrupted run stopped."""

from __future__ import annotations

from src.reporting.metrics_csv import MetricsCsv
from src.run_dir import read_metrics


def test_validation_and_training_of_an_epoch_are_one_row(tmp_path):
    logger = MetricsCsv(tmp_path / "metrics.csv")
    logger.log_metrics({"val/loss": 0.5, "epoch": 0}, step=9)
    logger.log_metrics({"train/loss": 0.25, "epoch": 0}, step=9)
    logger.log_metrics({"val/loss": 0.4, "new": 3.0, "epoch": 1}, step=19)
    assert read_metrics(tmp_path / "metrics.csv") == [
        {"epoch": 1, "step": 10, "train/loss": 0.25, "val/loss": 0.5},
        {"epoch": 2, "step": 20, "val/loss": 0.4, "new": 3.0},
    ]


def test_a_continued_run_keeps_its_rows_and_overwrites_the_repeated_ones(tmp_path):
    first = MetricsCsv(tmp_path / "metrics.csv")
    first.log_metrics({"val/loss": 0.5, "epoch": 0}, step=9)
    first.log_metrics({"val/loss": 0.4, "epoch": 1}, step=19)
    second = MetricsCsv(tmp_path / "metrics.csv")
    second.log_metrics({"val/loss": 0.4, "epoch": 1}, step=19)
    second.log_metrics({"val/loss": 0.3, "epoch": 2}, step=29)
    assert [row["val/loss"] for row in read_metrics(tmp_path / "metrics.csv")] == [0.5, 0.4, 0.3]
