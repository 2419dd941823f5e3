"""callbacks.extra: the user's own callbacks, named in the config."""

from __future__ import annotations

from typing import Any

import lightning as L
from hydra.utils import get_object

from src.engine.commands.user_command import corrected
from src.engine.runs.errors import UserError


def own_callback(entry: Any) -> L.Callback:
    """{_target_: src.callbacks.mine.MyCallback, key: value}: a callback class of this project, called with the keys.

    Nothing else is ever called: a _target_ such as torch.load would be code from a config file.
    """
    target = entry.get("_target_") if isinstance(entry, dict) else None
    callback = None
    if isinstance(target, str) and target.startswith("src."):
        try:
            callback = get_object(target)
        except Exception as error:
            raise _refused(entry, f"it cannot be imported: {error}") from error
    if not (isinstance(callback, type) and issubclass(callback, L.Callback) and callback.__module__.startswith("src.")):
        raise _refused(entry, "a callback is a class below src. that inherits from lightning.Callback")
    values = {key: value for key, value in entry.items() if key != "_target_"}
    try:
        return callback(**values)
    except TypeError as error:
        raise _refused(entry, str(error)) from error


def _refused(entry: Any, why: str) -> UserError:
    target = str(entry.get("_target_", "") if isinstance(entry, dict) else "")
    package, _, name = target.rpartition(".")
    fix = [corrected("callbacks.extra=[{_target_: src.callbacks.mine.MyCallback}]")]
    if target.startswith("src.callbacks.mine.") or (target.startswith("src.") and "argument" in why):
        fix = [corrected(f"callbacks.extra=[{{_target_: {target}}}]"), corrected("callbacks.extra=[]")]
    elif package and name.isidentifier() and not target.startswith("src."):  # a class of two lines makes it ours
        keys = "".join(f", {key}: {value}" for key, value in entry.items() if key != "_target_")
        fix = [
            f"printf 'from {package} import {name} as Base\\nclass {name}(Base):\\n    pass\\n' > src/callbacks/mine.py",
            corrected(f"callbacks.extra=[{{_target_: src.callbacks.mine.{name}{keys}}}]"),
        ]
    return UserError(f"callbacks.extra: {entry} is not allowed", where="callbacks.extra", why=why, fix=fix)
