"""callbacks.extra and logger.extra: the user's own callbacks and loggers, and some callbacks of Lightning's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import EarlyStopping, Timer
from lightning.pytorch.loggers import Logger

from src.engine.commands.user_command import corrected
from src.engine.own import build_part, is_own
from src.engine.runs.errors import UserError

# Lightning's callbacks that go with the engine: others save, show, schedule or freeze, which it does itself.
LIGHTNING = {f"{EarlyStopping.__module__.rpartition('.')[0]}.{kind.__name__}": kind for kind in (EarlyStopping, Timer)}


def own_callback(entry: Any) -> L.Callback:
    """{_target_: src.callbacks.mine.MyCallback, key: value}: a callback class, called with the keys. Raises UserError.

    Nothing else is ever called: a _target_ such as torch.load would be code from a config file.
    """
    name: Any = entry.get("_target_") if isinstance(entry, dict) else None
    if not (is_own(name) or name in LIGHTNING):
        raise _refused(entry, str(name))
    values = {key: value for key, value in entry.items() if key != "_target_"}
    return build_part("callbacks.extra", name, LIGHTNING, {}, values, L.Callback)


def own_logger(entry: Any, folder: Path) -> Logger:
    """{_target_: src.my_loggers.JsonLines, key: value}: a logger class, called with the keys, and with the run's folder where
    it asks for that. Raises UserError."""
    name: Any = entry.get("_target_") if isinstance(entry, dict) else None
    if not is_own(name):
        raise UserError(
            f"logger.extra: {entry} is not allowed",
            why="a logger is a class below src. that inherits from lightning's Logger (docs/your_own.md)",
            fix=corrected("logger.extra=[{_target_: src.my_loggers.JsonLines}]"),
        )
    values = {key: value for key, value in entry.items() if key != "_target_"}
    return build_part("logger.extra", name, {}, {"folder": folder}, values, Logger)


def _refused(entry: Any, name: str) -> UserError:
    allowed = [other for other in LIGHTNING if name and other.endswith(f".{name.rpartition('.')[2]}")]
    fix = [
        corrected(f"callbacks.extra=[{{_target_: {target}}}]") for target in (*allowed, "src.my_callbacks.MyCallback")
    ]
    package, _, kind = name.rpartition(".")
    if package and kind.isidentifier() and not allowed:  # a class of two lines makes it the owner's
        keys = "".join(f", {key}: {value}" for key, value in entry.items() if key != "_target_")
        fix = [
            f"printf 'from {package} import {kind} as Base\\nclass {kind}(Base):\\n    pass\\n' > src/my_callbacks.py",
            corrected(f"callbacks.extra=[{{_target_: src.my_callbacks.{kind}{keys}}}]"),
        ]
    return UserError(
        f"callbacks.extra: {entry} is not allowed",
        where="callbacks.extra",
        why=f"a callback is a class below src. that inherits from lightning.Callback, or one of {', '.join(LIGHTNING)}",
        fix=fix,
    )
