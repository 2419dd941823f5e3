"""A sweep that goes on: what its folder must hold, and the failed trials, which are tried again first."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from filelock import FileLock, Timeout
from ray.tune.search import BasicVariantGenerator, ConcurrencyLimiter, Searcher
from ray.tune.search.search_generator import SearchGenerator

from src import logs
from src.errors import ExitCode, UserError
from src.reporting.sweep_journal import Journal
from src.run_dir import write_json
from src.tuning.commands import sweep_command
from src.tuning.job import STATE
from src.user_command import named

IDENTITY = "sweep.json"


@contextmanager
def open_sweep(folder: Path, identity: dict[str, Any], resume: str) -> Iterator[Journal]:
    """Makes or takes up the folder of a sweep, which no other command has meanwhile. Yields what happened in it so far.

    identity: what makes two sweeps the same. resume: auto, true or false, as in the settings. Raises UserError.
    """
    resume = resume.lower()
    if resume not in ("auto", "true", "false"):
        raise UserError(
            f"resume={resume} is not a choice",
            why="it is auto, true or false",
            fix=sweep_command("resume=auto"),
        )
    made = folder / IDENTITY
    if not made.exists():
        _check_resume(folder, resume, there=False)  # before anything is made
    (folder / STATE / "returned").mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / STATE / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"another command works on the sweep {folder.name}",
            where=str(folder),
            why="both would write into the folders of its trials",
            fix=["wait for it to end", f"{named(folder.name, '-2')} # another name"],
            code=ExitCode.BUSY,
        ) from None
    try:
        journal = Journal(folder)
        there = made.exists() and bool(journal.trials)
        _check_resume(folder, resume, there)
        identity = json.loads(json.dumps(identity, default=str))
        if there:
            _refuse_another(folder, json.loads(made.read_text(encoding="utf-8")), identity)
        write_json(made, identity)
        with logs.to_file(folder / "sweep.log"):
            yield journal
    finally:
        lock.release()


def _check_resume(folder: Path, resume: str, there: bool) -> None:
    """there: whether the folder holds a sweep."""
    if resume == "true" and not there:
        raise UserError(
            "there is no sweep to go on with",
            where=str(folder),
            why="resume=true asks for one; without a name= every sweep has a folder of its own",
            fix=sweep_command("resume=auto"),
            code=ExitCode.NO_INPUT,
        )
    if resume == "false" and there:
        raise UserError(
            f"a sweep named {folder.name} exists already",
            where=str(folder),
            why="resume=false forbids to go on with it",
            fix=[sweep_command("resume=auto"), named(folder.name, "-2")],
        )


def _refuse_another(folder: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    changed = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    if changed:
        raise UserError(
            f"{folder.name} is the folder of another sweep",
            where=str(folder / IDENTITY),
            why="\n".join(f"{key}: {old.get(key)} there, {new.get(key)} now" for key in changed[:6]),
            fix=named(folder.name, "-2"),
        )


class NumberedSearch(Searcher):
    """A search that numbers its points: {"job": number, ...}."""

    def catch_up(self, handed_out: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """After its state was restored. handed_out: all that the sweep has begun, which may be more than Tune had saved
        when it was killed. Returns those that the search does not know, and counts them as handed out."""
        raise NotImplementedError


class Again(Searcher):
    """Hands out points again before it asks the search: of a sweep that is taken up, those that failed before, and those
    that were under way and that Tune does not know of.

    It hands out one more than there is room for, so that a machine that joins gets it, and no further ones: a search
    that learns shall know as much as can be known.
    """

    # On the class, since Tune pickles the object with the sweep, and a restored one would have those of back then.
    failed: ClassVar[list[dict[str, Any]]] = []
    handed_out: ClassVar[list[dict[str, Any]]] = []
    room: ClassVar[Callable[[], float]] = staticmethod(lambda: math.inf)  # for trials at once, as it is now

    def __init__(self, search: NumberedSearch) -> None:
        super().__init__()
        # Not `searcher`, which Tune would take for one of its own wrappers and save in another way.
        self.search = search
        self.live: set[str] = set()  # handed out by this object, and not complete

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict, **spec: Any) -> bool:
        self._metric, self._mode = metric, mode
        return self.search.set_search_properties(metric, mode, config, **spec)

    def set_max_concurrency(self, max_concurrent: int) -> bool:
        return self.search.set_max_concurrency(max_concurrent)

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        if len(self.live) > self.room():
            return None
        point = self.failed.pop(0) if self.failed else self.search.suggest(trial_id)
        if isinstance(point, dict):
            self.live.add(trial_id)
        return point

    def catch_up(self) -> None:
        lost = self.search.catch_up(self.handed_out)
        self.failed.extend(point for point in lost if point not in self.failed)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        self.search.on_trial_result(trial_id, result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        self.live.discard(trial_id)
        self.search.on_trial_complete(trial_id, result, error)

    def save(self, checkpoint_path: str) -> None:
        self.search.save(checkpoint_path)

    def restore(self, checkpoint_path: str) -> None:
        self.search.restore(checkpoint_path)
        self.catch_up()


class Trials(SearchGenerator):
    """Makes Tune's trials of what a search suggests; also after the search had ended, where there are new points now."""

    def set_state(self, state: dict[str, Any]) -> None:
        super().set_state({**state, "finished": False})

    def catch_up(self) -> None:
        """What was begun is handed out first, where nothing of Tune's own state was saved."""
        search = self.searcher.searcher if isinstance(self.searcher, ConcurrencyLimiter) else self.searcher
        search.catch_up()


def trials_of(search: NumberedSearch, max_concurrent: int | None) -> Trials:
    """What Tune takes its trials from."""
    again: Searcher = Again(search)
    if max_concurrent is not None:
        again = ConcurrencyLimiter(again, max_concurrent)
    return Trials(again)


def drawn_by_tune(first: dict[str, Any] | None, max_concurrent: int | None) -> BasicVariantGenerator:
    """For pbt, which takes no other: Tune itself draws the points. first: the one of trial 0; None: drawn too."""
    return BasicVariantGenerator([first] if first is not None else None, max_concurrent=max_concurrent or 0)
