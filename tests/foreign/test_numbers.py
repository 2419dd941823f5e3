"""Every setting that is a number has a range, and no value of it gets further than the config or ends in a traceback."""

from __future__ import annotations

import math
from dataclasses import asdict
from operator import attrgetter

import pytest
from omegaconf.errors import OmegaConfBaseException

from src.config import Config, Data, Model, Optimizer, Precision, Strategy
from src.engine.commands import config_checks
from src.engine.commands.schema import KNOBS
from src.engine.runs.errors import ExitCode, UserError
from tests.foreign.outcome import outcome

ABSURD = (math.nan, math.inf, -math.inf, -1, -0.5, 10**18, 10**30, 1e300, 5e-324, 0.5)
OTHER_TYPES = (
    "data.batch_size",
    "trainer.max_steps",
    "trainer.devices",
)  # checked by hand, since they take words or -1


def numeric_keys() -> list[str]:
    numbers = [key for key, knob in KNOBS.items() if str(knob.type).split(" ")[0] in ("int", "float")]
    return [*numbers, "data.batch_size"]


def settings(key: str, value: float) -> dict:
    values = asdict(
        Config(
            data=Data(source="synthetic", num_images=40, num_classes=3, bits=None),
            model=Model(backbone="shufflenet_v2_x0_5", weights="none", head="mlp"),
            optimizer=Optimizer(name="sgd" if key == "optimizer.momentum" else "adamw", lr=1e-3),
            strategy=Strategy(name="single"),
            precision=Precision(name="fp32"),
        )
    )
    *way, last = key.split(".")
    attrgetter_of = values
    for part in way:
        attrgetter_of = attrgetter_of[part]
    attrgetter_of[last] = value
    return values


def test_every_number_has_a_range_without_nan_and_infinity():
    for key in set(numeric_keys()) - set(OTHER_TYPES):
        assert all(map(math.isfinite, KNOBS[key].metadata["range"])), key


@pytest.mark.parametrize("key", numeric_keys())
def test_an_absurd_number_is_refused_or_within_the_range(key):
    for value in ABSURD:
        read = outcome(lambda value=value: config_checks.read(settings(key, value)))
        if isinstance(read, UserError):
            assert read.code == ExitCode.CONFIG
            assert key in read.found
            continue
        if isinstance(
            read, OmegaConfBaseException
        ):  # of another type; src/engine/commands/command_line.py translates it
            continue
        got = attrgetter(key)(read)
        low, high = KNOBS[key].metadata.get("range", (-1, 10**9))
        assert low <= got <= high
