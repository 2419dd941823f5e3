"""From the command line to a checked config, and from Hydra's complaints to ours.

train.py goes through Hydra (`run_hydra`); evaluate and predict take a few key=value words (`read_words`). Both answer a
typo with the key that was meant. Nothing here imports torch.
"""

from __future__ import annotations

import difflib
import functools
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from src import config
from src.errors import ExitCode, UserError
from src.run_dir import new_name
from src.tuning import settings

CONF = Path(__file__).resolve().parent.parent / "conf"
Words = TypeVar("Words")


def run_hydra(task: Callable[[DictConfig], Any], check: Callable[[DictConfig], Any]) -> None:
    """Composes conf/train.yaml with the command line and calls the task, once per job of a multirun. Raises UserError.

    check: what a sweep with Ray Tune asks of its jobs' configs before it starts any.
    """
    if not CONF.is_dir():
        raise UserError(
            "the folder conf/ is missing",
            where=str(CONF),
            why="it lies beside src/ in the checkout; an installation without -e copies only src/",
            fix="pip install -e .",
        )
    config.register()
    settings.register()
    # Hydra prints errors itself, at length; with this variable it raises them and we say what is to be done.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    OmegaConf.register_new_resolver("sweep_name", lambda name: name or new_name(), use_cache=True, replace=True)
    failures: list[Exception] = []
    if any(word.startswith("hydra.run.dir=") for word in sys.argv):
        raise UserError(
            "hydra.run.dir has no effect here",
            why="the folder of a run is runs_dir/name",
            fix="python -m src.train runs_dir=runs name=NAME",
        )

    @functools.wraps(task)
    def job(composed: DictConfig) -> Any:
        try:
            return task(composed)
        except Exception as error:
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                raise  # Hydra names the job that failed
            failures.append(error)  # and would print a line too many for a single run

    job.check = check  # type: ignore[attr-defined]
    try:
        hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")(job)()
    except (HydraException, OmegaConfBaseException) as error:
        raise translate(error) from error
    except ValueError as error:
        if not str(error).startswith("Only one of --run, --multirun, --cfg"):
            raise
        raise UserError(
            "--cfg and --info are about one run, and -m is a sweep",
            why="a sweep has a config for each of its jobs",
            fix=[
                "python -m src.train --cfg job optimizer.lr=1e-3",
                "python -m src.train experiment=tune_head hydra.sweeper.dry_run=true # what a sweep would do",
            ],
        ) from error
    for error in failures:
        raise translate(error) if isinstance(error, OmegaConfBaseException) else error


def translate(error: Exception) -> UserError:
    """Hydra's or OmegaConf's complaint, as what was found and what to type instead."""
    text = str(error) if not error.__cause__ else f"{error}\n{error.__cause__}"
    if isinstance(error, OverrideParseException):
        has_value = "=" in str(error.override)
        return UserError(
            f"{error.override!r} cannot be read",
            why="a setting is key=value; quote values with spaces, brackets or braces for the shell",
            fix="python -m src.train 'freeze.phases={0:[head],2:[all]}'" if has_value else "python -m src.train --help",
        )
    if found := re.search(r"Ambiguous value for argument '([^']+)'", text):
        typed = [word for word in sys.argv[1:] if word not in ("--cfg", "-c", "job", "hydra", "all")]
        return UserError(
            f"{found[1]} has several values, and this is one run",
            why="-m makes a sweep of them, one run for each; a list is written in brackets, KEY=[A,B]",
            fix=shlex.join(["python", "-m", "src.train", "-m", *typed]),
        )
    if isinstance(error, MissingConfigException):
        return _unknown_choice(text)
    if found := re.search(r"Could not override '([^']+)'", text):
        return _unknown_key(found[1])
    if found := re.search(r"Could not append to config. An item is already at '([^']+)'", text):
        return UserError(
            f"+{found[1]} adds a setting that exists",
            why="a + is for new settings",
            fix=f"python -m src.train {found[1]}=...",
        )
    if found := re.search(r"Key '([^']+)' (?:is )?not in '?(\w+)'?.*?full_key: ([\w.]+)", text, re.DOTALL):
        return _unknown_key(found[3])
    if found := re.search(r"full_key: ([\w.\[\]]+)", text):
        key = found[1].partition("[")[0]
        return UserError(
            f"{key}: {_line_with(text, 'Value')}",
            why="the type of every setting is declared in src/config.py",
            fix=_corrected(key, key, _default(key)),
        )
    return UserError(
        text.strip().splitlines()[0], why=" ".join(text.strip().splitlines()[1:3]), fix="python -m src.train --help"
    )


def _line_with(text: str, word: str) -> str:
    lines = text.strip().splitlines()
    return next((line.strip() for line in lines if word in line), lines[-1])


def _default(key: str) -> str:
    """What a setting is when nothing is said of it, as it would be typed."""
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        value = OmegaConf.select(hydra.compose("train"), key)
    return {None: "null", True: "true", False: "false"}.get(value, str(value).replace(" ", ""))


def _unknown_key(key: str) -> UserError:
    known = config.known_keys()
    groups = sorted(folder.name for folder in CONF.iterdir() if folder.is_dir() and folder.name != "hydra")
    close = _closest(key, list(dict.fromkeys(known + groups)))
    return UserError(
        f"{key} is not a setting" + (f"; did you mean {close[0]}?" if close else ""),
        why="settings are declared in src/config.py; the whole list with its values: python -m src.train --cfg job",
        fix=[_corrected(key, guess) for guess in close[:2]] or "python -m src.train --help",
    )


def _corrected(key: str, meant: str, value: str | None = None) -> str:
    """The command line as typed, with one key (and its value, where one is given) put right."""
    words = []
    for word in sys.argv[1:]:
        name, sign, typed = word.partition("=")
        words.append(f"{meant}={value or typed}" if sign and name.lstrip("+~") == key else word)
    return shlex.join(["python", "-m", "src.train", *words])


# What other trainers call it.
ALIASES = {
    "learning_rate": "optimizer.lr",
    "epochs": "trainer.max_epochs",
    "num_epochs": "trainer.max_epochs",
    "steps": "trainer.max_steps",
    "gpus": "trainer.devices",
    "workers": "data.num_workers",
    "bs": "data.batch_size",
    "arch": "model.backbone",
    "pretrained": "model.weights",
    "metric": "checkpoint.monitor",
    "path": "data.root",
    "dataset": "data",
}


def _closest(key: str, known: Sequence[str]) -> list[str]:
    """The known keys nearest to a mistyped one, the likeliest first."""
    leaf = key.rpartition(".")[2]
    if leaf in ALIASES:
        return [ALIASES[leaf]]

    def squeeze(name: str) -> str:
        return name.replace("_", "").replace(".", "").lower()

    def alike(one: str, other: str) -> float:
        return difflib.SequenceMatcher(None, squeeze(one), squeeze(other)).ratio()

    near = {name: max(alike(key, name), alike(leaf, name.rpartition(".")[2])) for name in known}
    close = [name for name in known if near[name] >= 0.75]
    return sorted(close, key=lambda name: (-near[name], -alike(key, name)))


def _unknown_choice(text: str) -> UserError:
    missing = re.search(r"Could not (?:find|load) '([^']+)'", text)
    name = missing[1] if missing else text.strip().splitlines()[0]
    group, _, choice = name.rpartition("/")
    options = sorted(path.stem for path in (CONF / group).glob("*.yaml")) if group else []
    close = difflib.get_close_matches(choice, options, n=1, cutoff=0.5) or options[:1]
    if not options:
        return UserError(f"{name} is not a config of this project", where=str(CONF), fix="python -m src.train --help")
    return UserError(
        f"{group}={choice} is not a choice" + (f"; did you mean {group}={close[0]}?" if close else ""),
        where=str(CONF / group),
        why=f"{group} is one of: {', '.join(options)}",
        fix=_corrected(group, group, close[0]),
    )


def read_words(
    schema: type[Words], words: Sequence[str], command: str, usage: str, needed: str
) -> tuple[Words, list[str]]:
    """key=value words as the dataclass `schema`, and the data.KEY=VALUE words, which change a run's config.

    command: such as 'src.evaluate', for messages; usage: the text that --help prints; needed: a word that must be there.
    Raises UserError.
    """
    if not words or any(word in ("-h", "--help") for word in words):
        print(usage.strip())
        sys.exit(ExitCode.OK if words else ExitCode.CONFIG)
    own, others = [], []
    known = [knob.name for knob in fields(schema)]  # type: ignore[arg-type]
    for word in words:
        key, sign, _ = word.partition("=")
        if not sign:
            raise UserError(f"{word!r} cannot be read", why="a setting is key=value", fix=f"python -m {command} --help")
        if key in known:
            own.append(word)
        elif key in config.known_keys() and key.startswith("data."):
            others.append(word)
        else:
            close = _closest(key, [*known, *(name for name in config.known_keys() if name.startswith("data."))])
            raise UserError(
                f"{key} is not a setting of {command}" + (f"; did you mean {close[0]}?" if close else ""),
                why=f"it takes {', '.join(known)}",
                fix=f"python -m {command} --help",
            )
    if not any(word.startswith(f"{needed}=") for word in own):
        raise UserError(
            f"{needed}= is missing", why=f"{command} cannot do without it", fix=f"python -m {command} --help"
        )
    try:
        values = OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.from_dotlist(own))
        return OmegaConf.to_object(values), others  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise translate(error) from error
