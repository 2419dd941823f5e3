"""Values of swept settings in Hydra's grammar, as Python has them, and when two of them are the same."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from hydra.core.override_parser.types import Quote, QuotedString
from omegaconf import DictConfig, ListConfig, OmegaConf

PLAIN = re.compile(r"(?!(null|true|false|nan|inf)$)[a-z_][a-z0-9_./-]*", re.ASCII | re.IGNORECASE)  # needs no quotes


class Written(str):
    """A list or a mapping in Hydra's grammar, such as '{0:[head]}': no quotes are put around it.

    Only points hold it: files get plain text, and `Space.point` reads a point from a trial's command line.
    """


def plain(value: Any) -> Any:
    """A plain Python value: numpy's scalars, which searches return, and nested configs are converted."""
    if isinstance(value, ListConfig | DictConfig):
        return Written(written(OmegaConf.to_container(value, resolve=True)))
    return value.item() if isinstance(value, np.generic) else value


def identity_of(value: Any) -> int | float | str:
    """Equal for 1 and 1.0, which are one point; 1, true and '1' are three."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if is_number else written(value)


def written(value: Any) -> str:
    """A value as Hydra's grammar reads it back."""
    value = plain(value)
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Written | int | float):
        return str(value)
    if isinstance(value, str):
        return value if PLAIN.fullmatch(value) else QuotedString(value, Quote.single).with_quotes()
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{written(key)}:{written(inner)}" for key, inner in value.items()) + "}"
    return "[" + ",".join(map(written, value)) + "]"
