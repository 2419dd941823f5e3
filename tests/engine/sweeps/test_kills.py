"""Every search and every scheduler through kill -9 of the driver and the repeated command: the journal is all that is left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cloudpickle
import pytest
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler

from src.engine.sweeps.schedulers import build_scheduler
from src.engine.sweeps.searches import random_point
from src.engine.sweeps.settings import SweeperSettings
from src.engine.sweeps.space import read_space
from src.engine.sweeps.sweep_journal import FINISHED, PAUSED, PRUNED, Goal, Journal
from tests.conftest import command_environment
from tests.engine.sweeps.sweep_app.app import grown

GOAL = Goal("objective", "max")
INTERVAL = "optimizer.lr=tag(log,interval(0.01,0.2))"

pytestmark = pytest.mark.skipif(not Path("/proc").is_dir(), reason="kills the processes of a group")


class Sweep:
    """A sweep of the app in a folder: `start` it, `wait` until it has reported so many epochs, `kill` it, `end` it."""

    def __init__(self, folder: Path, *words: str) -> None:
        self.folder, self.words = folder, words
        self.sweep = folder / "runs" / "app"

    def start(self, *words: str) -> Sweep:
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "tests.engine.sweeps.sweep_app.app",
                "-m",
                "hydra/sweeper=ray_tune",
                *self.words,
                *words,
            ],
            cwd=self.folder,
            env=command_environment() | {"HYDRA_FULL_ERROR": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        return self

    def wait(self, rows: int) -> None:
        while len(self.events("row")) < rows:
            assert self.process.poll() is None, self.process.communicate()[0]
            time.sleep(0.02)

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=60)

    def end(self, code: int = 0, number: int | None = None) -> str:
        """number: of a signal that is sent first."""
        if number is not None:
            os.killpg(self.process.pid, number)
        text, _ = self.process.communicate(timeout=120)
        assert self.process.returncode == code, text
        return text

    def events(self, kind: str) -> list[dict]:
        journal = self.sweep / "trials.jsonl"
        lines = journal.read_text().splitlines() if journal.exists() else []
        return [event for line in lines if line.endswith("}") and (event := json.loads(line))["event"] == kind]

    def trials(self) -> dict:
        return Journal(self.sweep).trials

    def trained(self, number: int) -> list[int]:
        """The epochs that were computed, those twice that were lost in between."""
        return [int(line.split()[0]) for line in (self.sweep / str(number) / "trained.txt").read_text().splitlines()]

    def stopped(self) -> dict[int, tuple[str, int, float]]:
        """Trial -> how and after which epoch it ended, and its parameter."""
        return {number: (one.state, max(one.rows), one.params["optimizer.lr"]) for number, one in self.trials().items()}


def check_whole(sweep: Sweep, numbers: int) -> None:
    trials = sweep.trials()
    assert sorted(trials) == list(range(numbers))
    assert {one.state for one in trials.values()} <= {FINISHED, PRUNED}
    for number, one in trials.items():
        assert sorted(one.rows) == list(range(1, max(one.rows) + 1))
        assert len(sweep.trained(number)) - len(set(sweep.trained(number))) <= 1, "more than an epoch was lost"


def test_asha_stops_the_same_trials_at_the_same_epochs(tmp_path):
    words = ("hydra.sweeper.scheduler=asha", "hydra.sweeper.grace_epochs=1", "hydra.sweeper.reduction_factor=2")
    words += (INTERVAL, "hydra.sweeper.num_samples=9", "hydra.sweeper.max_concurrent=1", "pause=0.05")
    sweep = Sweep(tmp_path, *words).start()
    sweep.wait(12)
    sweep.kill()
    sweep.start().end()
    assert sweep.stopped() == undisturbed(9)
    assert len({state for state, *_ in sweep.stopped().values()}) == 2, "some were stopped"
    check_whole(sweep, 9)


def undisturbed(count: int) -> dict[int, tuple[str, int, float]]:
    """What Sweep.stopped() has to be: an asha that is asked about the epochs of one trial after another, without a sweep."""
    settings = SweeperSettings(scheduler="asha", grace_epochs=1, reduction_factor=2)
    space = read_space([INTERVAL], {}, None)
    scheduler, ended = build_scheduler(settings, space, GOAL, 6), {}
    for number in range(count):
        trial, weight = Trial("", stub=True, trial_id=str(number)), 0.0
        scheduler.on_trial_add(None, trial)
        rate = 0.1 if number == 0 else random_point(space, 0, "trial", number - 1)["optimizer.lr"]
        for epoch in range(1, 7):
            weight = grown(weight, rate, epoch)
            if scheduler.on_trial_result(None, trial, {"epoch": epoch, "objective": weight}) == TrialScheduler.STOP:
                break
        ended[number] = (FINISHED if epoch == 6 else PRUNED, epoch, rate)
    return ended


def test_a_grid_with_median_gets_more_values(tmp_path):
    words = ("hydra.sweeper.search=grid", "hydra.sweeper.scheduler=median", "hydra.sweeper.grace_epochs=1")
    sweep = Sweep(tmp_path, *words, "hydra.sweeper.default_first=false").start("optimizer.lr=0.1,0.15,0.2,0.12,0.01")
    sweep.wait(17)
    sweep.kill()
    sweep.start("optimizer.lr=0.1,0.15,0.2,0.12,0.01,0.011,0.18").end()
    check_whole(sweep, 7)
    rates = [one.params["optimizer.lr"] for _, one in sorted(sweep.trials().items())]
    assert rates == [0.1, 0.15, 0.2, 0.12, 0.01, 0.011, 0.18]
    assert sweep.stopped()[5][0] == PRUNED, "it is worse than what was tried before the kill"


def test_bayesopt_with_hyperband_goes_on_and_ends(tmp_path):
    words = ("hydra.sweeper.search=bayesopt", "hydra.sweeper.scheduler=hyperband", "hydra.sweeper.num_samples=6")
    sweep = Sweep(tmp_path, *words, INTERVAL, "trainer.max_epochs=4").start()
    sweep.wait(10)
    sweep.kill()
    text = sweep.start().end()
    assert "HyperBandScheduler begins anew" in text
    assert sorted(sweep.trials()) == list(range(6))
    assert {one.state for one in sweep.trials().values()} <= {FINISHED, PRUNED}


def test_the_best_of_pbt_belongs_to_weights_that_exist(tmp_path):
    words = ("hydra.sweeper.scheduler=pbt", "hydra.sweeper.grace_epochs=1", "hydra.sweeper.num_samples=4")
    sweep = Sweep(tmp_path, *words, INTERVAL, "trainer.max_epochs=8").start()
    sweep.wait(14)
    sweep.kill()
    sweep.start().end()
    assert sweep.events("copied"), "no trial took over the weights of another"
    for number, one in sweep.trials().items():
        values = json.loads((sweep.sweep / str(number) / "checkpoints" / "last.json").read_text())["values"]
        assert {epoch: row["objective"] for epoch, row in one.rows.items()} == pytest.approx(
            dict(enumerate(values, start=1))
        )
        assert one.state == FINISHED


class Payload:
    def __reduce__(self):
        return os.system, ("touch ran-code",)


def test_optuna_goes_on_with_other_settings_and_runs_no_code_of_the_folder(tmp_path):
    """The time is over, then Ctrl-C, then a kill; each start has settings of its own, and foreign pickles lie everywhere."""
    sweep = Sweep(tmp_path, "hydra.sweeper.search=optuna", INTERVAL, "pause=0.15")
    text = sweep.start("hydra.sweeper.time_budget_s=4", "hydra.sweeper.max_concurrent=1").end()
    assert "time      is over after 4 s; to go on: " in text
    done = len(sweep.trials())
    assert done < 9  # none where the machine is slow

    sweep.start("hydra.sweeper.num_samples=40").wait(len(sweep.events("row")) + 3)
    sweep.end(130, signal.SIGINT)
    assert PAUSED in {one.state for one in sweep.trials().values()}
    assert len(sweep.trials()) < 9

    code = cloudpickle.dumps(Payload())
    for folder in (".tune", ".tune/state", ".tune/tune-old/state", ".", "0", "0/checkpoints"):
        for name in (
            "tuner.pkl",
            "searcher-state-x.pkl",
            "search_gen_state-x.json",
            "experiment_state-x.json",
            "error.pkl",
        ):
            (sweep.sweep / folder).mkdir(parents=True, exist_ok=True)
            (sweep.sweep / folder / name).write_bytes(code)
    sweep.start("hydra.sweeper.num_samples=9", "hydra.sweeper.max_failures=0").end()
    check_whole(sweep, 9)
    assert len({one.params["optimizer.lr"] for one in sweep.trials().values()}) == 9
    assert not list(tmp_path.rglob("ran-code")), "a pickle of the sweep's folder was read"
    assert not list((sweep.sweep / ".tune").glob("tune-*")), "Tune's own files stay behind"
    before = sweep.events("started")
    text = sweep.start("hydra.sweeper.num_samples=9").end()
    assert "runs/app is finished: there is nothing left to run" in text
    assert "9 trials: 9 finished" in text
    assert sweep.events("started") == before


@pytest.mark.parametrize(("number", "code", "seconds"), [(signal.SIGTERM, 143, 0.5), (signal.SIGINT, 130, 2.0)])
def test_signals_while_ray_starts(tmp_path, number, code, seconds):
    """Ray takes SIGTERM for itself then, and ends with 15 or 1; before the first trial no handler of Tune's is there."""
    sweep = Sweep(tmp_path, INTERVAL).start()
    while not (sweep.sweep / ".tune" / "lock").exists():
        assert sweep.process.poll() is None, sweep.process.communicate()[0]
        time.sleep(0.02)
    time.sleep(seconds)
    sweep.end(code, number)
    assert {event["state"] for event in sweep.events("ended")} <= {"finished"}  # none, unless this machine was busy
