"""What a piece of work ended with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from omegaconf.errors import OmegaConfBaseException

from src.engine.runs.errors import UserError


def outcome(work: Callable[[], Any]) -> Any:
    """What it returns, or the error that a user would read."""
    try:
        return work()
    except (UserError, OmegaConfBaseException) as error:
        return error
