"""retrain=true: the settings of a sweep's winner, trained once more with another seed as an ordinary run.

The best of many trials is also the luckiest on val. The retraining has the same images in the same splits, and nothing was
chosen by its numbers, of val or of test.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.engine.commands.hydra_words import without_quotes
from src.engine.commands.user_command import key_of, named
from src.engine.runs import signals
from src.engine.runs.errors import ExitCode, UserError
from src.engine.runs.run_dir import read_result
from src.engine.runs.run_settings import flat, stored_settings
from src.engine.sweeps.sweep_journal import Goal, Journal, TrialRecord, ranking

LARGEST_SEED = 2**63 - 1
STOPPED = {signals.code_of(number): number for number in (signal.SIGINT, signal.SIGTERM)}  # by exit code


def single_run_words(trial: TrialRecord) -> list[str]:
    """The words of src.train that do what the trial did, without a name."""
    words = [word for word in trial.overrides if key_of(word) != "name"]
    kept = [without_quotes(word) for word in words if not key_of(word).startswith(("hydra.", "hydra/"))]
    if any(key_of(word) == "experiment" for word in words):
        kept.append("hydra.mode=RUN")  # a recipe of a sweep would begin the sweep again
    return kept


@dataclass(frozen=True)
class Retraining:
    folder: Path
    seed: int
    words: list[str]  # of src.train

    @classmethod
    def of(cls, journal: Journal, goal: Goal) -> Retraining | None:
        """That of the sweep's winner; None where no trial has a value, or the winner's folder is not that of a run."""
        ranked, sweep = ranking(journal.trials, goal), journal.path.parent
        if not ranked or not (sweep / str(ranked[0].number) / "config.yaml").is_file():
            return None
        best = ranked[0]
        try:
            settings = flat(stored_settings(sweep / str(best.number)))
        except (UserError, OSError):  # of a damaged file; the sweep's own numbers are there all the same
            return None
        if not {"seed", "runs_dir"} <= settings.keys():
            return None
        own, split_seed = settings["seed"], settings.get("data.split_seed")
        swept = [trial.params.get("seed") for trial in journal.trials.values()]
        highest = max(own, *(seed for seed in swept if isinstance(seed, int)), 0)
        seed = highest + 1 if highest < LARGEST_SEED else 0
        changed = {"seed": str(seed)}
        if settings.get("data.split_file") is None:  # else the file says what is in each split
            changed["data.split_seed"] = str(own if split_seed is None else split_seed)
        runs_dir = settings["runs_dir"]
        inside = os.path.relpath(sweep, runs_dir)
        name = sweep.name if inside.startswith("..") else Path(inside).as_posix()
        changed["name"] = f"{name}/retrained_{best.number}_seed_{seed}"
        kept = [word for word in single_run_words(best) if key_of(word) not in changed]
        words = [*kept, *(f"{key}={value}" for key, value in changed.items())]
        return cls(Path(runs_dir, changed["name"]), seed, words)

    @property
    def command(self) -> str:
        return shlex.join(["python", "-m", "src.train", *self.words])

    def measured(self) -> dict[str, Any] | None:
        """What the sweep's summary says of it; None while it is not finished."""
        result = read_result(self.folder)
        if result.get("state") != "finished":
            return None
        intervals = {name: list(ends) for name, ends in (result.get("intervals") or {}).items()}
        own = {"folder": self.folder.as_posix(), "seed": self.seed, "command": self.command}
        return own | {"metrics": result["metrics"], "intervals": intervals}

    def run(self, sweep: str) -> None:
        """Trains in a process of its own, which has this one's terminal and gets its signals. sweep: the name of the sweep.

        Raises UserError where it fails, and KeyboardInterrupt or Terminated; the repeated command goes on with it.
        """
        environment = {name: value for name, value in os.environ.items() if name != "TRAIN_COMMAND"}
        received: list[int] = []
        sent = 0
        sys.stdout.flush()
        with signals.handled_by(lambda number, _: received.append(number)):
            process = subprocess.Popen(
                [sys.executable, "-m", "src.train", *self.words],
                stdin=subprocess.DEVNULL,
                env=environment,
                process_group=0 if os.name == "posix" else None,  # so that Ctrl-C reaches it once
            )
            try:
                while process.poll() is None:
                    for number in received[sent:]:
                        sent += 1
                        process.send_signal(number)
                    time.sleep(0.1)
            finally:
                process.kill()
        code = process.returncode
        if received or code in STOPPED:
            number = received[0] if received else STOPPED[code]
            signals.end_begins(number)
            raise signals.error_of(number)
        if code:
            raise UserError(
                f"the retraining of the winner ended with exit code {code}",
                where=str(self.folder),
                why="its own message is above",
                fix=f"{named(sweep)} # goes on with it",
                code=ExitCode(code) if code in set(ExitCode) else ExitCode.TRIALS_FAILED,
            )
