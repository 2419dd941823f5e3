"""src.train's command line: through Hydra to the task, with Hydra's errors translated into ours.

The words of evaluate, predict and export: src/engine/commands/words.py. Nothing here imports torch.
"""

from __future__ import annotations

import difflib
import functools
import logging
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from src.engine import features
from src.engine.commands import config_checks, word_checks
from src.engine.commands.hydra_words import for_hydra
from src.engine.commands.schema import KNOBS
from src.engine.commands.stray_words import split
from src.engine.commands.suggestions import HELP, KINDS, choices, closest, default_of, did_you_mean, unknown_key
from src.engine.commands.user_command import corrected, is_typed, shell_command, standing_in, typed_value
from src.engine.project import CONF
from src.engine.runs.errors import UserError
from src.engine.runs.run_dir import REFUSALS, remove_if_nothing_ran
from src.engine.runs.run_names import check_name, new_name

log = logging.getLogger(__name__)


def run_hydra(task: Callable[[DictConfig], Any]) -> None:
    """Composes conf/train.yaml with the command line and calls the task, once per job of a multirun. Raises UserError."""
    if not CONF.is_dir():
        raise UserError(
            "the folder conf/ is missing",
            where=str(CONF),
            why="it lies beside src/ in the checkout; an installation without -e copies only src/",
            fix="pip install -e .",
        )
    features.register()
    # With this variable Hydra raises errors instead of printing them at length.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    OmegaConf.register_new_resolver("sweep_name", _sweep_name, use_cache=True, replace=True)
    OmegaConf.register_new_resolver("choices", lambda group: " | ".join(choices(group)), replace=True)  # of --help
    OmegaConf.register_new_resolver("of_rooms", features.help_lines, replace=True)
    words = sys.argv[1:]
    word_checks.check_words(words)
    if {"--help", "-h"} & {*words}:  # Hydra composes a config and lists every group of every package first: a second
        print(OmegaConf.load(CONF / "hydra/help/train.yaml").template)
        return
    failures: list[Exception] = []
    sweeps: list[Path] = []

    @functools.wraps(task)
    def job(composed: DictConfig) -> Any:
        try:
            return task(composed)
        except Exception as error:
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                sweeps.append(Path(HydraConfig.get().sweep.dir))
                raise  # Hydra names the job that failed
            failures.append(error)  # Hydra would print one line too many for a single run

    job.check = check  # type: ignore[attr-defined]
    try:
        options, typed = split(words)
        sweep = word_checks.is_sweep(words)
        # From Hydra 1.4 on a recipe that says it, such as experiment=tune_head, is too late.
        mode = ["hydra.mode=MULTIRUN"] if sweep else []
        with standing_in([*options, *for_hydra(typed, multirun=sweep), *mode]):
            hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")(job)()
    except (HydraException, OmegaConfBaseException) as error:
        raise translate(error) from error
    except UserError as error:
        if sweeps and error.code in REFUSALS:
            remove_if_nothing_ran(sweeps[0])
        raise
    except ValueError as error:
        raise _of_hydra(error) from error.__cause__
    for error in failures:
        raise translate(error) if isinstance(error, OmegaConfBaseException) else error


def check(composed: DictConfig) -> None:
    """What a sweep asks of its jobs' configs before it starts any: their own warnings would be in their logs only."""
    for warning in config_checks.without_effect(config_checks.read(composed)):
        _warn_once(warning)


@functools.cache
def _warn_once(warning: str) -> None:
    log.warning(warning)


def _sweep_name(name: str | None, runs_dir: str) -> str:
    """The name, checked before Hydra writes into the folder of a sweep."""
    return new_name() if name is None else check_name(name, runs_dir)


def _of_hydra(error: ValueError) -> Exception:
    """A UserError for what Hydra and logging.config report by a plain ValueError; other errors as they are."""
    if str(error).startswith("Unable to configure"):
        return UserError(
            f"hydra.job_logging or hydra.hydra_logging cannot be used: {error}",
            why=str(error.__cause__ or "they are configurations for Python's logging.config"),
            fix=corrected(remove=["hydra/job_logging", "hydra/hydra_logging"]),
        )
    if str(error).startswith("Only one of --run, --multirun, --cfg"):
        return UserError(
            "--cfg and --info are about one run, and -m is a sweep",
            why="a sweep has a config for each of its jobs",
            fix=[corrected(remove=["-m", "--multirun"]), corrected(remove=["--cfg", "-c", "job", "hydra", "all"])],
        )
    return error


def translate(error: Exception) -> UserError:
    """Hydra's or OmegaConf's error as a UserError: what was found, and what to type instead."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, UserError):
        cause = cause.__cause__ or cause.__context__
    if cause is not None:  # of _sweep_name
        return cause
    text = str(error) if not error.__cause__ else f"{error}\n{error.__cause__}"
    if isinstance(error, OverrideParseException):
        return UserError(f"{error.override!r} cannot be read", why="a setting is key=value", fix=HELP)
    if found := re.search(r"Ambiguous value for argument '([^'=]+)|Sweep parameters '([^'=]+)", text):
        return _several_values(found[1] or found[2])
    if isinstance(error, MissingConfigException):
        return _unknown_choice(text)
    if found := re.search(r"Interpolation key '([^']+)' not found.*?full_key: ([\w.]+)", text, re.DOTALL):
        wrong = f"${{{found[1]}}}"
        close = [f"oc.env:{found[1]}"] if found[1] in os.environ else closest(found[1], list(KNOBS))
        meant = [f"${{{key}}}" for key in close[:1]]
        return UserError(
            f"{found[2]}: {wrong} is not a setting{did_you_mean(*meant)}",
            why="${KEY} stands for the value of another setting",
            fix=shell_command().replace(wrong, meant[0]) if meant else HELP,
        )
    if found := re.search(r"Could not override '([^']+)'", text):
        return unknown_key(found[1])
    if found := re.search(r"Key '[^']+' (?:is )?not in '?\w+'?.*?full_key: ([\w.]+)", text, re.DOTALL):
        return unknown_key(found[1])
    if found := re.search(r"full_key: ([\w.\[\]]+)", text):
        return _wrong_type(found[1].partition("[")[0], text)
    lines = text.strip().splitlines()
    return UserError(lines[0], why=" ".join(lines[1:3]), fix=HELP)


def _kind(key: str) -> str:
    """The first word of a setting's type: int, float, bool, str or list; "" for a key of a YAML file."""
    return re.match(r"\w*", str(KNOBS[key].type) if key in KNOBS else "")[0]  # type: ignore[index]


def _several_values(key: str) -> UserError:
    value = typed_value(key) or ""
    instead = []
    if key in ("trainer.devices", "model.split_at") or _kind(key) == "list":
        several = ["strategy=ddp"] if key == "trainer.devices" and not is_typed("strategy") else []
        instead = [corrected(f"{key}=[{value}]", *several)]
    elif _kind(key) == "float" and re.fullmatch(r"\d+,\d+", value):  # a decimal comma
        instead = [corrected(f"{key}={value.replace(',', '.')}")]
    return UserError(
        f"{key} has several values, and this is one run",
        why="-m makes a sweep of them, one run for each; a list is written in brackets, KEY=[A,B]",
        fix=[*instead, corrected("-m", remove=["--cfg", "-c", "job", "hydra", "all"])],
    )


def _wrong_type(key: str, text: str) -> UserError:
    """A value of another type than the schema's. text: OmegaConf's message, which shows the value in several ways."""
    kind, typed = _kind(key), typed_value(key)
    value = re.search(r"[Vv]alue '(.*?)'(?: of type| could| is|,| for|\)|$)", text)
    shown = value[1] if value else typed
    if kind not in KINDS:
        lines = [line.strip() for line in text.splitlines() if line.strip() and "_type=" not in line]
        found = f"{key}: {next((line for line in lines if not line.startswith('Error merging')), lines[0])}"
    else:
        found = f"{key} is {KINDS[kind]}" + (f", and {shown!r} is not" if shown is not None else "")
    whole = re.match(r"\[?(\d+(\.0*)?([eE]\+?\d)?)(?![.\d])", typed or "") if kind == "int" else None  # 10.0, 224x224
    instead = str(int(float(whole[1]))) if whole else default_of(key)
    return UserError(
        found, why="the type of every setting is declared in src/config.py", fix=corrected(f"{key}={instead}")
    )


def _unknown_choice(text: str) -> UserError:
    first = text.strip().splitlines()[0]
    if primary := re.search(r"Cannot find primary config '([^']+)'", text):
        configs = sorted(path.stem for path in CONF.glob("*.yaml"))
        return UserError(
            f"there is no config {primary[1]}.yaml",
            where=str(CONF),
            why=f"it holds {', '.join(configs)}; a recipe of your own is conf/experiment/NAME.yaml: experiment=NAME",
            fix=corrected(remove=["--config-name", "-cn", primary[1], f"--config-name={primary[1]}"]),
        )
    missing = re.search(r"Could not (?:find|load) '([^']+)'", text)
    name = missing[1] if missing else first
    group, _, choice = name.rpartition("/")
    if not (options := choices(group) if group else []):
        return UserError(f"{name} is missing", where=str(CONF), why=first, fix=HELP)
    options += ["basic"] if group in ("hydra/launcher", "hydra/sweeper") else []
    close = (difflib.get_close_matches(choice, options, n=1, cutoff=0.5) or options)[0]
    return UserError(
        f"{group}={choice} is not a choice{did_you_mean(f'{group}={close}')}",
        where=str(CONF / group),
        why=f"{group} is one of: {', '.join(options)}",
        fix=corrected("-m", f"{group}={close}") if group.startswith("hydra/") else corrected(f"{group}={close}"),
    )
