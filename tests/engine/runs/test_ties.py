"""What val cannot tell apart, at the end of a run."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import pytest

from src.engine.runs.intervals import Z, share_interval
from src.engine.runs.ties import standard_error, tied, tied_epochs, ties_text

SPLITS = {"val": range(269)}


def config(monitor: str = "val/acc", limit: int | None = None) -> Any:
    return Namespace(checkpoint=Namespace(monitor=monitor), trainer=Namespace(limit_batches=limit))


def write_epochs(folder, values: list[float], name: str = "val/acc") -> None:
    rows = [f"{epoch},{epoch * 4},{value}" for epoch, value in enumerate(values, start=1)]
    (folder / "metrics.csv").write_text("\n".join([f"epoch,step,{name}", *rows]) + "\n")


def test_the_error_is_that_of_the_interval():
    assert standard_error((0.5 - Z * 0.01, 0.5 + Z * 0.01)) == pytest.approx(0.01)
    assert standard_error(share_interval(0.97, 269)) == pytest.approx((0.97 * 0.03 / 269) ** 0.5, rel=0.1)
    assert standard_error(None) is None


def test_epochs_within_it_are_named(tmp_path):
    write_epochs(tmp_path, [0.5, 0.9, 0.965, 0.97, 0.962])
    ties = tied_epochs(tmp_path, config("val/acc"), {"val/acc": (0.97 - Z * 0.01, 0.97 + Z * 0.01)}, SPLITS)
    assert ties == {"epochs": [3, 4, 5], "of": 5, "standard_error": pytest.approx(0.01), "images": 269}
    assert ties_text(ties) == "cannot tell epochs 3 to 5 apart (269 images: ±0.010)"
    assert ties_text(ties | {"epochs": [1, 3, 4]}) == "cannot tell 3 of 5 epochs apart (269 images: ±0.010)"
    assert ties_text(None) is None
    assert tied_epochs(tmp_path, config(limit=3), {"val/acc": (0.95, 0.99)}, SPLITS) is None, "of a part of val"


def test_nothing_is_said_where_the_best_epoch_stands_out_or_nothing_is_known(tmp_path):
    sure = {"val/acc": (0.96, 0.98)}
    assert tied_epochs(tmp_path, config("val/acc"), sure, SPLITS) is None, "no epoch was measured"
    write_epochs(tmp_path, [0.5, 0.97, 0.9])
    assert tied_epochs(tmp_path, config("val/acc"), sure, SPLITS) is None
    write_epochs(tmp_path, [0.97, 0.97], "val/loss")
    assert tied_epochs(tmp_path, config("val/loss"), sure, SPLITS) is None, "a loss has no interval"
    assert tied_epochs(tmp_path, config("val/acc"), sure, SPLITS) is None


def test_where_less_is_better_and_an_epoch_was_nan(tmp_path):
    write_epochs(tmp_path, [float("nan"), 3.0, 2.0, 2.05], "val/mae")
    found = tied_epochs(tmp_path, config("val/mae"), {"val/mae": (1.8, 2.2)}, SPLITS)
    assert found["epochs"] == [3, 4]
    assert tied({}, 1.0, True) == []
