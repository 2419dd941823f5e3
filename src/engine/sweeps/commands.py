"""Commands that messages about a sweep suggest: the user's own, corrected."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

from src.engine.commands.user_command import corrected, key_of, rewritten, typed_words
from src.engine.sweeps.settings import SweeperSettings

SWEEP_KEYS = {knob.name for knob in fields(SweeperSettings)} - {"seed"}
SPACE = "optimizer.lr=tag(log,interval(1e-5,1e-1))"


def sweep_command(*words: str, remove: Sequence[str] = ()) -> str:
    """The user's command with these words; a setting without a section, such as scheduler=asha, is the sweep's own.

    A program that is not src.train has no such command: then it is a whole example.
    """
    section = "hydra.launcher" if _by_launcher() else "hydra.sweeper"
    named = [f"{section}.{word}" if key_of(word).partition(".")[0] in SWEEP_KEYS else word for word in words]
    left_out = [f"{section}.{key}" if key in SWEEP_KEYS else key for key in remove]
    if typed_words():
        return corrected(*named, remove=left_out)
    plugin = section.replace(".", "/") + "=ray_tune"
    space = [SPACE] if not any(word.startswith(("optimizer.lr=", "seed=")) for word in named) else []
    return rewritten(["-m", plugin, *named, *space])


def _by_launcher() -> bool:
    keys = [key_of(word) for word in typed_words()]
    return any(key.startswith(("hydra/launcher", "hydra.launcher")) for key in keys)
