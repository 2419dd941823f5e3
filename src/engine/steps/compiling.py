"""trainer.compile: torch.compile for the backbone's training passes.

Val, test and model/ use the backbone as it is: their numbers are those that src.evaluate repeats, and a checkpoint does not
show how it was trained.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import torch
from torch import Tensor, nn

from src.engine.commands.user_command import corrected
from src.engine.runs.errors import ExitCode, UserError
from src.engine.runs.text import printable

log = logging.getLogger(__name__)


@functools.cache
def compiled_pass() -> Callable[[nn.Module, Tensor], Tensor]:
    """(module, its input) -> its output, compiled at the first call for every module, mode and set of trained weights.

    A function and not nn.Module.compile: a copy of the module, as data.batch_size=auto makes it, is compiled as what it is.
    """
    return torch.compile(_pass)


def _pass(module: nn.Module, inputs: Tensor) -> Tensor:
    return module(inputs)


def check_compiler(device: torch.device) -> None:
    """Raises UserError where torch.compile does not work on this device, before images are read."""
    try:
        torch.compile(lambda numbers: numbers.exp() + 1)(torch.ones(4, device=device))
    except Exception as error:  # whatever Triton, a C++ compiler or the driver may raise
        raise UserError(
            f"torch.compile does not work on this machine: {printable(str(error).strip().partition(chr(10))[0][:300])}",
            why="on a CPU it needs a C++ compiler such as g++, on an NVIDIA GPU Triton, which torch brings on Linux",
            fix=corrected("trainer.compile=false"),
            code=ExitCode.UNAVAILABLE,
        ) from error
    log.info(
        "trainer.compile=true: the first steps of every phase of freezing wait for the compiler, on a CPU for minutes"
    )
