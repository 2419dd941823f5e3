"""The words of src.train as Hydra's grammar takes them: a text setting holds the text that the shell gave.

To Hydra's grammar blanks, brackets, quotes, commas, umlauts and `=` are syntax, and `1e3` is a number. A user has
already quoted them for the shell and means the characters. So src/engine/commands/command_line.py puts Hydra's quotes
around the values of text settings before Hydra reads the command line. What only the grammar can say (a sweep, an
interpolation, null, a value in inner quotes) stays as it is. Nothing here imports torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, Quote, QuotedString
from hydra.errors import HydraException

from src.engine.commands.schema import KNOBS
from src.engine.runs.text import at_home

# Settings that name a file or folder: `~` is the home folder, and a path that exists is meant, whatever characters it has.
PATHS = ("data.root", "data.table", "data.split_file", "runs_dir", "model.weights", "hydra.sweep.dir")
# Free text may hold a comma. In other texts, which are words from a list, a comma asks for a sweep.
FREE = (*PATHS, "name", "data.group", "logger.project", "logger.tracking_uri")


def is_text(key: str) -> bool:
    """Whether any text is a value of the setting."""
    return key == "hydra.sweep.dir" or (key in KNOBS and KNOBS[key].type in ("str", "str | None"))


def is_option(key: str) -> bool:
    """Whether a setting is an argument of one of the owner's parts, such as data.options.path: any name is one."""
    section = key.rpartition(".")[0]
    return section in KNOBS and KNOBS[section].type == "dict[str, Any]"


def for_hydra(words: Sequence[str], *, multirun: bool) -> list[str]:
    """The words with Hydra's quotes where a text needs them. multirun: whether they are a sweep's."""
    quoted = []
    for word in words:
        key, sign, value = word.partition("=")
        name = key.lstrip("+")
        if sign and name == key and is_option(name):
            word = f"++{word}"  # to Hydra it is a new key
        elif sign and is_text(name):
            word = f"{key}={_value(name, value, multirun)}"
        elif sign and re.fullmatch(r"(['\"])\d+\1", value):
            word = f"{key}={value[1:-1]}"  # a number, for settings that may be a word too (data.batch_size)
        quoted.append(word)
    return quoted


def parsed(word: str) -> Override | None:
    """The word as Hydra reads it; None if its grammar has no such word."""
    try:
        return OverridesParser.create().parse_override(word)
    except HydraException:
        return None


def unquoted(value: str) -> str:
    """A value of a job's command line without Hydra's quotes."""
    override = parsed(f"key={value}")
    return str(override.value()) if override is not None and _is_quoted(value) else value


def without_quotes(word: str) -> str:
    """A word of a job's command line as a user would type it, before the shell's quotes."""
    key, _, value = word.partition("=")
    plain = f"{key}={unquoted(value)}"
    return plain if for_hydra([plain], multirun=False) == [word] else word


def _value(key: str, value: str, multirun: bool) -> str:
    if value in ("", "null"):
        return value
    expanded = at_home(value) if key in PATHS else value
    if key in PATHS and _exists(expanded):
        return _text(expanded, re.sub(r"(\\*)\$\{", r"\1\1\\${", expanded))
    override = parsed(f"key={value}")
    is_sweep = override is not None and override.is_sweep_override()
    if override is not None and not is_sweep and _is_quoted(value):
        return value
    if override is not None and is_sweep:
        sweep = override.value()
        if not (isinstance(sweep, ChoiceSweep) and sweep.simple_form):
            return value  # choice(...), range(...): not the name of a folder
        if not multirun and (key not in FREE or (key in PATHS and _all_exist(value))):
            return value  # Hydra refuses several values without -m, and that message is the right one
    if multirun and len(values := _split(value)) > 1:
        return ",".join(_value(key, each, multirun=False) for each in values)
    # A ${ without its end is no interpolation.
    return _text(expanded, re.sub(r"(\\*)\$\{(?!.*\})", r"\1\1\\${", expanded, flags=re.DOTALL))


def _text(value: str, escaped: str) -> str:
    """The text in Hydra's quotes if it reads another text without. escaped: the value for OmegaConf's interpolations."""
    if value == escaped and "${" not in value:
        override = parsed(f"key={value}")
        if override is not None and isinstance(override.value(), str) and override.value() == value:
            return value
    return QuotedString(text=escaped, quote=Quote.single).with_quotes()


def _is_quoted(value: str) -> bool:
    return len(value) > 1 and value[0] == value[-1] and value[0] in "'\""


def _exists(path: str) -> bool:
    try:
        return os.path.lexists(path)
    except (OSError, ValueError):  # too long, or a null character
        return False


def _all_exist(value: str) -> bool:
    return all(path in ("default", "none") or _exists(at_home(path)) for path in _split(value))


def _split(value: str) -> list[str]:
    """The values of a sweep: split at commas outside of quotes and of ${...}."""
    values = re.findall(r"""(?:\$\{[^}]*\}|'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|[^,])+""", value)
    return [each.strip() for each in values if each.strip()]
