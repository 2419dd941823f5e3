"""The import of torch and lightning, which takes most of a short command's time."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """Inside, modules are imported. Python looks for garbage neither meanwhile, which would take a quarter of the time, nor
    later among what they brought."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
        gc.freeze()
