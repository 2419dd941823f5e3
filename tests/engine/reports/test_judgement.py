"""The first words of a report, and the intervals in them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from src.engine.reports.answers import calibration, read_answers
from src.engine.reports.judgement import Evidence, judge
from src.engine.runs.files import write_csv

RESULT = {"metrics": {"test/acc": 0.95}, "epochs": 5, "best_epoch": 3, "state": "finished"}


def evidence(own: float = 0.95, other: float | None = 0.8, metric: str = "acc", **changes) -> Evidence:
    result: dict[str, Any] = {**RESULT, "metrics": {f"test/{metric}": own}}
    if other is not None:
        result["baseline"] = {"metrics": {f"test/{metric}": other}}
    config = {"optimizer": {"lr": 3e-3}, "checkpoint": {"monitor": f"val/{metric}"}, "data": {"class_weights": "none"}}
    epochs = {"train/loss": [0.8, 0.6, 0.5, 0.4, 0.3], f"train/{metric}": [0.9] * 5, f"val/{metric}": [0.9] * 5}
    known = Evidence(
        config,
        result,
        epochs,
        {"train": 800, "test": 200},
        224,
        {"cat": 400, "dog": 400},
        3,
        "python -m src.train name=a",
    )
    return replace(known, **changes)


def words(known: Evidence) -> str:
    found = judge(known)
    assert found is not None
    return f"{found.reached} {found.advice} {found.command}"


def test_it_says_what_is_reached_and_whether_that_is_more_than_noise():
    assert "a test accuracy of 0.9500 (95 % interval 0.91 to 0.973) on 200 images" in words(evidence())
    assert "reaches 0.8000 (95 % interval 0.739 to 0.85). Training gained 0.1500, which is more than chance." in words(
        evidence()
    )
    paired = evidence(own=0.81)
    paired.result["baseline"] |= {"intervals": {"test/acc": [0.6, 0.9]}}
    paired.result["baseline"]["gain"] = {"metric": "test/acc", "value": 0.01, "is_sure": True, "how": "p = 0.01"}
    assert (
        "reaches 0.8000 (95 % interval 0.6 to 0.9). Training gained 0.0100, which is more than chance (p = 0.01)."
        in words(paired)
    )
    lost = words(evidence(own=0.6))
    assert "Training lost 0.2000, which is more than chance." in lost
    assert "optimizer.lr=0.001" in lost
    same = words(evidence(other=0.94))
    assert "The difference of 0.0100 may be chance." in same
    assert "python -m src.train model=features" in same
    assert "There is no baseline" in words(evidence(other=None))
    assert "the difference is 2.0000, and it is not known" in words(evidence(own=3.0, other=5.0, metric="mae")).lower()
    known = evidence(own=3.0, other=5.0, metric="mae")
    known.result["intervals"] = {"test/mae": [2.5, 3.5]}
    assert "3.0000 (95 % interval 2.5 to 3.5)" in words(known)
    assert "Training gained 2.0000, which is more than chance." in words(known)
    by_loss = evidence(config={"checkpoint": {"monitor": "val/loss"}})
    assert "a test accuracy of 0.9500" in words(by_loss)
    off_by = {"train/loss": [0.8, 0.4, 0.1], "train/off_by": [1.5] * 3, "val/off_by": [0.5] * 3}
    assert "most confident mistakes" in words(evidence(other=None, metric="off_by", epochs=off_by))
    assert "is not a number. Measure on more images" in words(evidence(own=float("nan")))
    kept = evidence()
    kept.result["weights"] = "the baseline"
    assert "It is the baseline alone" in words(kept)
    assert "No epoch was as good on val: learn more slowly. python -m src.train optimizer.lr=0.001" in words(kept)
    assert judge(evidence(own=float("nan"), result={"state": "interrupted"}, config={})) is None


@pytest.mark.parametrize(
    ("change", "advice"),
    [
        ({"epochs": {"train/loss": [2.0, 4.0, 7.0]}}, "optimizer.lr=0.0003"),
        ({"epochs": {"train/loss": [0.8, 0.6, 0.4], "val/loss": [3.5, 0.8, 0.2]}}, "optimizer.lr=0.0003"),
        ({"epochs": {"train/loss": [2.5, 1.4, 0.7], "val/loss": [0.8, 0.7, 0.2]}}, "optimizer.lr=0.0003"),
        ({"epochs": {"train/loss": [0.8, 0.6, 0.4], "val/loss": [0.8, 0.7, 0.2]}}, "most confident mistakes"),
        ({"doubts": 25}, "labels in doubt of 25 images"),
        ({"doubts": 25, "result": RESULT | {"baseline": {"metrics": {"test/acc": 0.8}}}}, "most confident mistakes"),
        ({"doubts": None}, "most confident mistakes"),
        ({"counts": {"cat": 5, "dog": 400}}, "data.class_weights=balanced"),
        (
            {"epochs": {"train/loss": [0.8, 0.4, 0.1], "train/acc": [1.0] * 3, "val/acc": [0.8] * 3}},
            "data.augment=strong",
        ),
        (
            {"epochs": {"train/loss": [0.8, 0.4, 0.1], "train/acc": [0.6] * 3, "val/acc": [0.6] * 3}},
            "data.image_size=448",
        ),
    ],
)
def test_the_next_thing_to_try_follows_from_what_is_seen(change, advice):
    assert advice in words(replace(evidence(own=0.98, other=0.92), **change))


def test_a_best_epoch_that_is_the_last_asks_for_more_and_the_baseline_alone_for_training():
    known = evidence()
    assert "trainer.max_epochs=10" in words(replace(known, result={**known.result, "best_epoch": 5}))
    alone = words(replace(known, result={**known.result, "epochs": 0, "baseline": None}))
    assert "It is the baseline alone" in alone
    assert "python -m src.train model=transfer" in alone


def test_probabilities_that_are_right_have_no_calibration_error_and_others_have(tmp_path):
    random, rows = np.random.default_rng(0), []
    for number in range(4000):
        share = random.uniform(0.5, 1)
        rows.append([f"{number}.png", "cat" if random.random() < share else "dog", "cat", share, 1 - share])
    header = ["path", "true", "predicted", "probability_cat", "probability_dog"]
    write_csv(tmp_path / "p.csv", header, rows)
    answers = read_answers(tmp_path / "p.csv")
    found = calibration(answers)
    assert "no more than noise" in found.summary
    assert float(found.summary.partition("bins): ")[2][:5]) < 0.03
    confident = [[*row[:3], min(1, row[3] + 0.15), max(0, row[4] - 0.15)] for row in rows]
    write_csv(tmp_path / "p.csv", header, confident)
    assert "too high" in calibration(read_answers(tmp_path / "p.csv")).summary
    wrong = answers.mistakes()
    assert [answer.share for answer in wrong] == sorted((answer.share for answer in wrong), reverse=True)
    assert all(answer.true == "dog" and answer.told == "cat" for answer in wrong)
    assert max(answer.margin for answer in answers.unsure()) < 0.02
    write_csv(tmp_path / "p.csv", [*header, "group"], [[*row, "tom"] for row in rows])
    assert read_answers(tmp_path / "p.csv").answers == answers.answers
    write_csv(tmp_path / "p.csv", ["path", "true", "mood"], [["a", "b", "c"]])
    assert read_answers(tmp_path / "p.csv") is None
    assert read_answers(tmp_path / "none.csv") is None
