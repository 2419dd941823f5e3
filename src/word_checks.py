"""What is wrong with the words of src.train before Hydra reads them: flags, stray words, keys and values that cannot be.

src/command_line.py calls `check_words` first. Every answer is the user's own command, corrected. Nothing here imports torch.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

from src.config import KNOBS
from src.errors import UserError
from src.hydra_words import TEXTS, for_hydra, key_of, parsed, unquoted
from src.stray_words import check_strays, split
from src.suggestions import (
    CONF,
    HELP,
    choices,
    example,
    groups,
    is_section,
    meant_by,
    not_a_choice,
    replaced,
    setting_like,
)
from src.text import printable
from src.user_command import corrected

log = logging.getLogger(__name__)


def check_words(words: Sequence[str]) -> None:
    """Raises UserError for the first mistake that can be seen in the words alone."""
    check_strays(words)
    settings = split(words)[1]
    for word in settings:
        _check_word(word)
    _check_twice(settings)
    _check_sweep(words, settings)


def is_sweep(words: Sequence[str]) -> bool:
    """Whether the command is a sweep: -m, or a recipe that says so."""
    if any(word in ("-m", "--multirun") for word in words):
        return True
    modes = [word.partition("=")[2] for word in words if key_of(word) == "hydra.mode"]
    recipe = [_recipe(word.partition("=")[2]) for word in words if key_of(word) == "experiment"]
    if modes:
        return modes[-1] == "MULTIRUN"
    return any("MULTIRUN" in str(OmegaConf.select(one, "hydra.mode", default="")) for one in recipe)


def _check_word(word: str) -> None:
    """One word that is key=value."""
    key, _, value = word.partition("=")
    name = key_of(word)
    if key.startswith("~") and not name.startswith("hydra"):
        knob = KNOBS.get(name)
        optional = knob is not None and "None" in str(knob.type)
        raise UserError(
            f"{key} takes a setting away, which is not possible here",
            why="every setting is needed; what a setting without a value is called is null",
            fix=[*([replaced(word, f"{name}=null")] if optional else []), corrected(remove=[word])],
        )
    if not name:
        raise UserError(f"{word!r} cannot be read: it has no key", why="a setting is key=value", fix=HELP)
    if key.startswith("+") and not key.startswith("++") and (KNOBS.get(name) is not None or name in groups()):
        raise UserError(
            f"{key} adds a setting that exists", why="a + is for new settings", fix=replaced(word, f"{name}={value}")
        )
    text = name in TEXTS
    if name == "resume" and meant_by(name, value)[0].startswith("name="):
        raise UserError(
            f"{word} is not a choice: {name} is auto or never",
            why="a run continues when its command is repeated with its name=",
            fix=replaced(word, *meant_by(name, value)),
        )
    if text:
        return
    override = parsed(word)
    if is_section(name) or name in groups():
        _check_section(word, name, value)
    elif override is None:
        raise _unreadable(word, name, value)


def _check_section(word: str, section: str, value: str) -> None:
    override = parsed(word)
    if override is not None and override.is_sweep_override():
        values = value.split(",") if override.is_choice_sweep() and "(" not in value else []
    else:
        values = [] if value.startswith("{") and not choices(section) else [value.strip("'\"")]
    if section == "experiment" and value in ("", "null"):
        raise UserError(
            f"experiment={value} is not a choice",
            why="without experiment= there is no recipe",
            fix=corrected(remove=["experiment"]),
        )
    if not {one.strip() for one in values} <= {*choices(section)}:
        raise not_a_choice(word, section, [one.strip() for one in values])


def _unreadable(word: str, key: str, value: str) -> UserError:
    """A value of a number, a list or a mapping that Hydra's grammar does not know."""
    knob = KNOBS.get(key)
    close = [key] if knob is not None else setting_like(key)[:1]
    inner = f'{key}="{value}"' if knob is None and '"' not in value else None
    plain = value.strip(",;= ")
    fix = replaced(word, inner) if inner and parsed(inner) else HELP
    if close:
        is_right = (knob is None and close[0] in TEXTS) or (plain and parsed(f"{close[0]}={plain}"))
        fix = replaced(word, f"{close[0]}={plain if is_right else example(close[0])}")
    return UserError(
        f"{word!r} cannot be read" + (f"; did you mean {close[0]}?" if close and knob is None else ""),
        why="brackets and braces come in pairs, and text with blanks, brackets or umlauts in them is quoted once more"
        if any(sign in value for sign in "[]{}()")
        else "the value has signs that no number, list or mapping has",
        fix=fix,
    )


def _check_twice(settings: Sequence[str]) -> None:
    last: dict[str, str] = {}
    for word in settings:
        key = key_of(word)
        if last.get(key, word).lstrip("+") != word.lstrip("+"):
            log.warning(f"{key} is given twice: {last[key]} has no effect, {word} counts.")
        last[key] = word


def _check_sweep(words: Sequence[str], settings: Sequence[str]) -> None:
    """Words of a sweep, or for one, that would have no effect."""
    sweep = is_sweep(words)
    for word in settings:
        key, _, value = word.partition("=")
        name = key_of(word)
        override = parsed(*for_hydra([word], multirun=sweep))
        several = sweep and override is not None and override.is_sweep_override()
        if name == "hydra.run.dir":
            raise UserError(
                "hydra.run.dir has no effect here",
                why="the folder of a run is runs_dir/name",
                fix=corrected(f"runs_dir={value}", remove=["hydra.run.dir"]),
            )
        if name == "hydra.job.chdir" and value.lower() not in ("false", "null"):
            raise UserError(
                "hydra.job.chdir=true does not go with this program",
                why="relative paths, as of data.root and runs_dir, start from the folder the command is run in",
                fix=corrected(remove=["hydra.job.chdir"]),
            )
        if name.startswith(("hydra.sweep.", "hydra.sweeper.", "hydra.launcher.")) and not sweep:
            raise UserError(
                f"{name} has no effect without -m",
                why="it is about a sweep, and this is one run",
                fix=[corrected("-m"), corrected(remove=[key])],
            )
        path = Path(unquoted(value))
        if name in ("hydra.sweep.dir", "hydra.sweep.subdir") and (path.is_absolute() or {"..", "~"} & set(path.parts)):
            where = [] if name.endswith("subdir") else [f"runs_dir={path}"]
            raise UserError(
                f"{name}={printable(path)} leads out of runs_dir",
                why="the folder of a sweep is runs_dir/name, and those of its jobs are in it",
                fix=corrected(*where, remove=[name]),
            )
        is_folder = name in ("name", "runs_dir")
        is_own = name.startswith(("hydra.", "hydra/")) and not name.startswith("hydra.sweeper.params")
        if several and (is_folder or is_own):
            raise UserError(
                f"{name} has several values, and a sweep has one",
                why="its jobs are the folders 0, 1, ... in runs_dir/name; a comma in a name needs inner quotes"
                if is_folder
                else "jobs differ in their settings; how they are started and chosen is the sweep's own",
                fix=[
                    replaced(word, f"{key}={value.partition(',')[0]}"),
                    *([replaced(word, f'{key}="{value}"')] if is_folder else []),
                ],
            )
        if name == "experiment" and override is not None and override.is_sweep_override():
            _check_recipes(word, value)


def _check_recipes(word: str, value: str) -> None:
    recipes = value.split(",") if "(" not in value else choices("experiment")
    searches = [one.strip() for one in recipes if _brings_sweep(one.strip())]
    if searches:
        raise UserError(
            f"experiment={value} would run {' and '.join(searches)} without the search",
            where=str(CONF / "experiment"),
            why="a recipe that brings hydra/sweeper or hydra/launcher is a sweep itself, and no job of one",
            fix=[replaced(word, f"experiment={one}") for one in searches],
        )


def _recipe(name: str) -> object:
    file = CONF / "experiment" / f"{name}.yaml"
    return OmegaConf.load(file) if file.is_file() else OmegaConf.create({})


def _brings_sweep(name: str) -> bool:
    defaults = OmegaConf.select(_recipe(name), "defaults", default=[])  # type: ignore[arg-type]
    return any("hydra/sweeper" in str(one) or "hydra/launcher" in str(one) for one in defaults)
