"""The optional rooms: what each adds, asked for at the few places where a run or a command has room for it.

src/features.py has a line for each room. It imports the room's feature.py, which calls `add`; no other file outside of a room
imports anything of it. A feature.py is read at every start, --help too, so it imports torch, lightning, ray and matplotlib in
the functions that need them. How a room is removed: docs/rooms.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from src.engine.own import is_own

if TYPE_CHECKING:
    from pathlib import Path

    import lightning as L
    import torch
    from lightning.pytorch.plugins import Precision
    from lightning.pytorch.strategies import Strategy
    from torch import nn

    from src.engine.commands.schema import Config, Data, Rule
    from src.engine.runs.job import Job
    from src.engine.runs.shown import Shown
    from src.engine.runs.task import RunTask


@dataclass(frozen=True, kw_only=True)
class RoomStrategy:
    """A choice of strategy= that a room brings. build: called with the config and this machine's devices."""

    build: Callable[[Config, Sequence[torch.device]], Strategy]
    precision: Callable[[str, torch.device], Precision] | None = None  # by name and device; None: as everywhere
    process_per_device: bool = False
    shares_batches: bool = True  # each device has a share of every batch; False: a part of the network
    overlaps: Callable[[Config], bool] = lambda config: False  # several parts of a batch are under way at once


@dataclass(frozen=True)
class Place:
    """The rank of a machine in its run, and where the processes of all machines meet. The defaults: a single machine."""

    node: int = 0
    nodes: int = 1
    address: str = "127.0.0.1"
    port: int | None = None  # None: a free one


class Supervisor(Protocol):
    """Who started a run and may end it: a sweep, of which the run is a trial."""

    place: Place
    interrupted: bool  # whether the run is to end as soon as its position is saved

    def answering_processes(self) -> AbstractContextManager[dict[str, str]]:
        """Inside, the processes of the run can reach it, by the environment variables that it yields."""
        ...


@dataclass(frozen=True, kw_only=True)
class Feature:
    """A room. Whatever it leaves out it does not add."""

    name: str  # of its folder in src/engine/ too
    about: str
    files: tuple[str, ...] = ()  # beside its folders in src/engine/ and tests/engine/; * is a wildcard
    needs: tuple[str, ...] = ()  # rooms without which it is of no use

    # The command line
    help: Mapping[str, str] = field(default_factory=dict)  # place in conf/hydra/help/train.yaml -> lines
    words: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # setting or group -> values that it adds
    reads: tuple[str, ...] = ()  # the settings of src/config.py that it reads and nothing else in the engine
    rules: Callable[[], list[Rule]] = list  # rows for the table of src/rules.py; called once
    register: Callable[[], None] = lambda: None  # tells Hydra what it needs to know

    # A run, in the order in which it asks
    strategies: Mapping[str, RoomStrategy] = field(default_factory=dict)
    supervisor: Callable[[], Supervisor | None] = lambda: None
    backbone: Callable[[Any], nn.Module | None] = lambda model: None  # from Config.model; None: the library's
    prepare: Callable[[Job, RunTask], Job] = lambda job, task: job  # measures, before the data are loaded
    callbacks: Callable[[Job, RunTask], list[L.Callback]] = lambda job, task: []  # called after all others
    # of a folder, its phases, result and images; gives the page's plots to loggers
    run_report: Callable[[Path, Any, dict[str, Any], Shown | None], Mapping[str, Callable[[], bytes]]] | None = None
    folds_report: Callable[[Path, Config], None] = lambda folder, config: None  # of data.folds, when all are finished
    # of a sweep's folder, its goal and its results
    sweep_report: Callable[[Path, Any, dict[str, Any]], object] | None = None
    data_of_run: Callable[[Path, Data], Data] = lambda run, data: data  # with what a run that ended found for `auto`


FEATURES: list[Feature] = []  # in the order of src/features.py


def add(feature: Feature) -> None:
    FEATURES.append(feature)


def register() -> None:
    """Tells Hydra what the rooms need it to know."""
    for feature in FEATURES:
        feature.register()


def names() -> list[str]:
    return [feature.name for feature in FEATURES]


def strategies() -> dict[str, RoomStrategy]:
    """Those of the rooms; single and ddp belong to no room."""
    return {name: strategy for feature in FEATURES for name, strategy in feature.strategies.items()}


def words(key: str) -> tuple[str, ...]:
    """The values that rooms add to a setting or group."""
    return tuple(word for feature in FEATURES for word in feature.words.get(key, ()))


def help_lines(place: str) -> str:
    """What rooms add to a place of --help, each line after a line break."""
    return "".join(f"\n{feature.help[place]}" for feature in FEATURES if place in feature.help)


def process_per_device(strategy: str) -> bool:
    """Whether strategy=NAME has a process for each device."""
    rooms = strategies()
    return rooms[strategy].process_per_device if strategy in rooms else strategy == "ddp" or is_own(strategy)


def shares_batches(strategy: str) -> bool:
    """Whether each device has a share of every batch, and not a part of the network."""
    rooms = strategies()
    return strategy not in rooms or rooms[strategy].shares_batches


def overlaps(config: Config) -> bool:
    """Whether several parts of a batch are under way at once."""
    rooms = strategies()
    return config.strategy.name in rooms and rooms[config.strategy.name].overlaps(config)


def supervisor() -> Supervisor | None:
    return next((found for feature in FEATURES if (found := feature.supervisor()) is not None), None)


def backbone(model: Any) -> nn.Module | None:
    """A room's network for Config.model, with the classifier it was pretrained with; None: the library's."""
    return next((found for feature in FEATURES if (found := feature.backbone(model)) is not None), None)


def prepare(job: Job, task: RunTask) -> Job:
    """The job with what rooms measure before a run begins, such as a number in the place of data.batch_size=auto."""
    for feature in FEATURES:
        job = feature.prepare(job, task)
    return job


def data_of_run(run: Path, data: Data) -> Data:
    for feature in FEATURES:
        data = feature.data_of_run(run, data)
    return data
