"""What reaches the user of errors that libraries raise while Lightning trains."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from src.engine.runs.errors import ExitCode, UserError
from src.engine.runs.fit_errors import explained

TRAINER = SimpleNamespace(global_step=4)


def test_one_image_for_batchnorm_is_said_with_the_step():
    """torch's own error, so that another wording of it is noticed."""
    with pytest.raises(UserError, match="BatchNorm cannot normalise a single image") as caught, explained(TRAINER):
        torch.nn.BatchNorm1d(2)(torch.zeros(1, 2))
    assert caught.value.where.startswith("step 5; torch says: Expected more than 1 value")


def test_a_fault_of_the_gpu_is_explained():
    with pytest.raises(UserError) as caught, explained(TRAINER):
        raise RuntimeError("CUDA error: device-side assert triggered")
    assert caught.value.code == ExitCode.GPU_FAULT


def test_lightnings_exit_is_ctrl_c():
    with pytest.raises(KeyboardInterrupt), explained(TRAINER):
        raise SystemExit(1)


@pytest.mark.parametrize("error", [ValueError("shapes"), RuntimeError("shapes"), KeyError("shapes")])
def test_other_errors_stay_as_they_are(error):
    with pytest.raises(type(error)) as caught, explained(TRAINER):
        raise error
    assert caught.value is error
