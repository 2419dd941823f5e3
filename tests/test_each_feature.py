"""Each feature once from the command line: the runs of scripts/reference_runs.py end well and leave a model and metrics."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest

from scripts.reference_runs import REFERENCES, run
from src.engine import features
from src.engine.steps.precision import cpu_has_bf16
from tests import warm
from tests.conftest import of_room
from tests.warm import ROOT

ROOMS = {"dp": "dp", "model_parallel": "pipeline", "pipeline": "pipeline", "sweep": "sweeps"}
QUICK = [
    "baseline=none",
    *(["report.page=false"] if "reports" in features.names() else []),
]  # both have their own tests


@cache
def done(name: str) -> dict:
    reference = replace(REFERENCES[name], commands=[[*words, *QUICK] for words in REFERENCES[name].commands])
    return run(reference, ROOT, lambda words, *where: warm.run("src.train", words, *where, timeout=300))


def case(name: str):
    if name in ROOMS:
        return of_room(ROOMS[name], name)
    return name if name in ("single", "ddp") else pytest.param(name, marks=pytest.mark.slow)  # settings of a single run


CASES = [case(name) for name in REFERENCES if name not in ("pretrained", "continued")]


@pytest.mark.parametrize("name", CASES)
def test_a_run_leaves_a_model_and_metrics(name):
    """Left out: the first run of the README is tested there, and the continued run below."""
    if name == "bf16" and not cpu_has_bf16():
        assert done(name)["codes"] == [69]
        return
    assert done(name)["codes"] == [0]
    assert done(name)["weights"]
    losses = [values for column, values in done(name)["metrics"].items() if column.endswith("train/loss")]
    assert len(losses) == len(REFERENCES[name].runs)
    assert all(all(values) for values in losses)


def test_a_killed_run_continues_to_the_same_bits():
    assert done("continued")["codes"] == [-9, 0]
    for kind in ("weights", "metrics"):
        assert done("continued")[kind] == done("single")[kind]
