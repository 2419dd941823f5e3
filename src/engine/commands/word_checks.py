"""What is wrong with the words of src.train before Hydra reads them: keys and values that cannot be.

src/engine/commands/command_line.py calls `check_words` first; src/engine/commands/stray_words.py looks for words that
are not key=value. Every answer is the user's own command, corrected. Nothing here imports torch.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from src.engine.commands import suggestions
from src.engine.commands.hydra_words import for_hydra, is_text, parsed, unquoted
from src.engine.commands.schema import KNOBS
from src.engine.commands.stray_words import check_strays, split
from src.engine.commands.user_command import corrected, key_of, replaced
from src.engine.project import CONF
from src.engine.runs.errors import UserError
from src.engine.runs.text import printable

log = logging.getLogger(__name__)


def check_words(words: Sequence[str]) -> None:
    """Raises UserError for the first mistake that can be seen in the words alone."""
    check_strays(words)
    settings, sweep = split(words)[1], is_sweep(words)
    for word in settings:
        _check_word(word)
    last: dict[str, str] = {}
    for word in settings:
        key = key_of(word)
        if last.get(key, word).lstrip("+") != word.lstrip("+"):
            log.warning(f"{key} is given twice: {last[key]} has no effect, {word} counts.")
        last[key] = word
    for word in settings:
        _check_hydra(word, sweep)
        _check_values(word, sweep)
    for word in settings:
        _check_key(word)


def is_sweep(words: Sequence[str]) -> bool:
    """Whether the command is a sweep: -m, or a recipe that says so."""
    if "-m" in words or "--multirun" in words:
        return True
    typed = {key_of(word): word.partition("=")[2] for word in words}
    if "hydra.mode" in typed:
        return typed["hydra.mode"] == "MULTIRUN"
    return "MULTIRUN" in str(OmegaConf.select(_recipe(typed.get("experiment", "")), "hydra.mode", default=""))


def _check_word(word: str) -> None:
    """One word that is key=value."""
    key, _, value = word.partition("=")
    name = key_of(word)
    if key.startswith("~") and not name.startswith("hydra"):
        optional = name in KNOBS and "None" in str(KNOBS[name].type)
        raise UserError(
            f"{key} takes a setting away, which is not possible here",
            why="every setting is needed; a setting without a value is null",
            fix=[*([replaced(word, f"{name}=null")] if optional else []), corrected(remove=[word])],
        )
    if not name:
        raise UserError(f"{word!r} cannot be read: it has no key", why="a setting is key=value", fix=suggestions.HELP)
    if key.startswith("+") and not key.startswith("++") and (name in KNOBS or name in suggestions.groups()):
        fix = replaced(word, f"{name}={value}")
        raise UserError(f"{key} adds a setting that exists", why="a + is for new settings", fix=fix)
    if name == "resume" and (meant := suggestions.meant_by(name, value))[0].startswith("name="):
        raise UserError(
            f"{word} is not a choice: {name} is auto or never",
            why="a run continues when its command is repeated with its name=",
            fix=replaced(word, *meant),
        )
    if is_text(name):
        return
    if suggestions.section_of(name) or name in suggestions.groups():
        _check_section(word, name, value)
    elif parsed(word) is None:
        raise _unreadable(word, name, value)


def _check_section(word: str, section: str, value: str) -> None:
    override = parsed(word)
    if override is not None and override.is_sweep_override():
        values = value.split(",") if override.is_choice_sweep() and "(" not in value else []
    else:
        values = [] if value.startswith("{") and not suggestions.choices(section) else [value.strip("'\"")]
    if section == "experiment" and value in ("", "null"):
        fix = corrected(remove=["experiment"])
        raise UserError(f"{word} is not a choice", why="without experiment= there is no recipe", fix=fix)
    values = [choice.strip() for choice in values]
    if not {*values} <= {*suggestions.choices(section)}:
        raise suggestions.not_a_choice(word, section, values)


def _unreadable(word: str, key: str, value: str) -> UserError:
    """For a number, a list or a mapping that Hydra's grammar does not know."""
    close = [key] if key in KNOBS else suggestions.setting_like(key)[:1]
    inner = f'{key}="{value}"'
    plain = value.strip(",;= ")
    fix = replaced(word, inner) if key not in KNOBS and '"' not in value and parsed(inner) else suggestions.HELP
    if close:
        is_right = (key not in KNOBS and is_text(close[0])) or (plain and parsed(f"{close[0]}={plain}"))
        fix = replaced(word, f"{close[0]}={plain if is_right else suggestions.default_of(close[0])}")
    return UserError(
        f"{word!r} cannot be read" + ("" if key in KNOBS else suggestions.did_you_mean(*close)),
        why="brackets and braces come in pairs, and text with blanks, brackets or umlauts in them is quoted once more"
        if any(sign in value for sign in "[]{}()")
        else "the value has characters that no number, list or mapping has",
        fix=fix,
    )


def _check_key(word: str) -> None:
    """Hydra would say it too, after composing the config twice, which takes longer than all the rest."""
    name = key_of(word)
    if word.startswith("+") or not re.fullmatch(r"[\w.]+", name) or name.partition(".")[0] == "hydra":
        return
    parents = [name[:end] for end in (*(dot.start() for dot in re.finditer(r"\.", name)), len(name))]
    is_known = any(parent in KNOBS and not suggestions.section_of(parent) for parent in parents)
    if not is_known and name not in suggestions.groups() and not suggestions.section_of(name):
        raise suggestions.unknown_key(name)


def _check_hydra(word: str, sweep: bool) -> None:
    """Hydra's own settings that would have no effect, or lead out of the folder of runs."""
    name, value = key_of(word), word.partition("=")[2]
    path = Path(unquoted(value))
    found = why = ""
    fix = [corrected(remove=[name])]
    if name == "hydra.run.dir":
        found, why = f"{name} has no effect here", "the folder of a run is runs_dir/name"
        fix = [corrected(f"runs_dir={value}", remove=[name])]
    elif name == "hydra.job.chdir" and value.lower() not in ("false", "null"):
        found = f"{name}=true does not go with this program"
        why = "relative paths, as of data.root and runs_dir, start from the folder the command is run in"
    elif name.startswith(("hydra.sweep.", "hydra.sweeper.", "hydra.launcher.")) and not sweep:
        found, why = f"{name} has no effect without -m", "it is about a sweep, and this is one run"
        fix = [corrected("-m"), *fix]
    elif name in ("hydra.sweep.dir", "hydra.sweep.subdir") and (path.is_absolute() or {"..", "~"} & set(path.parts)):
        found = f"{name}={printable(path)} leads out of runs_dir"
        why = "the folder of a sweep is runs_dir/name, and those of its jobs are in it"
        fix = [corrected(f"runs_dir={path}", remove=[name])] if name == "hydra.sweep.dir" else fix
    if found:
        raise UserError(found, why=why, fix=fix)


def _check_values(word: str, sweep: bool) -> None:
    """Several values of a setting that a sweep has one of; recipes that are sweeps themselves."""
    key, _, value = word.partition("=")
    name = key_of(word)
    override = parsed(*for_hydra([word], multirun=sweep))
    if override is None or not override.is_sweep_override():
        return
    is_folder = name in ("name", "runs_dir")
    if sweep and (is_folder or (name.startswith(("hydra.", "hydra/")) and not name.startswith("hydra.sweeper.params"))):
        quoted = [replaced(word, f'{key}="{value}"')] if is_folder else []
        raise UserError(
            f"{name} has several values, and a sweep has one",
            why="its jobs are the folders 0, 1, ... in runs_dir/name; a comma in a name needs inner quotes"
            if is_folder
            else "jobs differ in their settings; how they are started and chosen is the sweep's own",
            fix=[replaced(word, f"{key}={value.partition(',')[0]}"), *quoted],
        )
    if name == "experiment":
        recipes = [
            recipe.strip() for recipe in (value.split(",") if "(" not in value else suggestions.choices("experiment"))
        ]
        if searches := [recipe for recipe in recipes if _brings_sweep(recipe)]:
            raise UserError(
                f"experiment={value} would run {' and '.join(searches)} without the search",
                where=str(CONF / "experiment"),
                why="a recipe that brings hydra/sweeper or hydra/launcher is a sweep itself, and no job of one",
                fix=[replaced(word, f"experiment={recipe}") for recipe in searches],
            )


def _recipe(name: str) -> Any:
    file = CONF / "experiment" / f"{name}.yaml"
    return OmegaConf.load(file) if file.is_file() else OmegaConf.create({})


def _brings_sweep(name: str) -> bool:
    defaults = OmegaConf.select(_recipe(name), "defaults", default=[])
    return any("hydra/sweeper" in str(entry) or "hydra/launcher" in str(entry) for entry in defaults)
