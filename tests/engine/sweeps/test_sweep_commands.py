"""Sweeps with Ray Tune as they are typed: what they leave, how they go on, and what they answer to mistakes."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import yaml

from src.engine import features
from src.engine.runs.files import read_metrics
from src.engine.sweeps.sweep_journal import FAILED, FINISHED, PRUNED, Journal
from tests.conftest import SMALL, check_error, parses
from tests.running import result

LAUNCHER = ("-m", "hydra/launcher=ray_tune", *SMALL)
SWEEPER = ("-m", "hydra/sweeper=ray_tune", *SMALL)
RATE = "optimizer.lr=tag(log,interval(1e-5,1e-1))"


def test_a_grid_its_failures_and_its_winner(command, tmp_path):
    """One job in four asks for what the images do not have; the others go on, and only it is tried again."""
    words = (*LAUNCHER, "optimizer.lr=0.001,0.01", "model.num_classes=null,7", "name=grid")
    done = command("train", *words)
    assert done.code == 1, done.text
    for number in (1, 3):
        assert f"#{number} " in done.err
        assert f"runs/grid/{number}" in done.err
        assert (tmp_path / f"runs/grid/{number}/error.log").exists()
    assert "model.num_classes=7" in done.err
    trials = Journal(tmp_path / "runs/grid").trials
    assert {number: trial.state for number, trial in trials.items()} == {0: FINISHED, 1: FAILED, 2: FINISHED, 3: FAILED}
    for number, rate in ((0, 0.001), (2, 0.01)):
        folder = tmp_path / f"runs/grid/{number}"
        assert yaml.safe_load((folder / "config.yaml").read_text())["optimizer"]["lr"] == rate
        assert result(folder)["state"] == "finished"
        assert [path.name for path in (folder / "checkpoints").iterdir()] == ["best.ckpt"], "it goes on no more"
        assert sorted(trials[number].rows) == [1, 2]
        assert trials[number].value == result(folder)["metrics"]["val/acc"]
    page = tmp_path / "runs/grid/report.html"
    assert (page.exists() and "<svg" in page.read_text()) is ("sweep_reports" in features.names())
    assert len((tmp_path / "runs/grid/sweep.csv").read_text().splitlines()) == 5

    results = yaml.safe_load((tmp_path / "runs/grid/optimization_results.yaml").read_text())
    winner = Path(results["best_folder"])
    again = command(*shlex.split(results["command"])[2:][0].split(".")[1:], *shlex.split(results["command"])[3:])
    assert again.code == 0, again.text
    assert result(tmp_path / "runs/grid-best")["metrics"] == result(tmp_path / winner)["metrics"]
    assert read_metrics(tmp_path / "runs/grid-best/metrics.csv")[-1]["val/loss"] == pytest.approx(
        read_metrics(tmp_path / winner / "metrics.csv")[-1]["val/loss"], rel=1e-6
    )

    before = (tmp_path / "runs/grid/trials.jsonl").read_text()
    assert command("train", *words).code == 1
    events = [
        json.loads(line) for line in (tmp_path / "runs/grid/trials.jsonl").read_text()[len(before) :].splitlines()
    ]
    assert {event["trial"] for event in events if event["event"] == "started"} == {1, 3}


def test_a_search_that_prunes_and_gets_more_trials(command, tmp_path):
    words = (*SWEEPER, "trainer.max_epochs=4", RATE, "model.head=choice(linear,mlp)", "name=search")
    words += ("hydra.sweeper.search=optuna", "hydra.sweeper.scheduler=asha", "hydra.sweeper.grace_epochs=1")
    # Of nine images an accuracy is often the same, and asha stops no equals.
    words += ("hydra.sweeper.metric=val/loss",)
    done = command("train", *words, "hydra.sweeper.num_samples=5")
    assert done.code == 0, done.text
    folder = tmp_path / "runs/search"
    trials = Journal(folder).trials
    assert sorted(trials) == [0, 1, 2, 3, 4]
    assert trials[0].params == {"optimizer.lr": 0.003, "model.head": "linear"}  # the default config
    states = [trial.state for trial in trials.values()]
    assert states.count(PRUNED) + states.count(FINISHED) == 5
    pruned = next(trial for trial in trials.values() if trial.state == PRUNED)
    assert max(pruned.rows) < 4
    run = folder / str(pruned.number)
    assert result(run)["state"] == "finished"  # it was measured and packaged all the same
    assert result(run)["epochs"] == max(pruned.rows)
    assert all((run / name).exists() for name in ("checkpoints/best.ckpt", "model/model.json"))
    assert (folder / ".tune/returned" / f"{pruned.number}.json").exists()

    words += ("hydra.sweeper.retrain=true",)
    more = command("train", *words, "hydra.sweeper.num_samples=7")
    assert more.code == 0, more.text
    retrained = yaml.safe_load((folder / "optimization_results.yaml").read_text())["retrained"]
    again, winner = Path(retrained["folder"]), Path("runs/search", more.out.rpartition("winner    runs/search/")[2][0])
    assert result(again)["metrics"] == retrained["metrics"]
    assert retrained["metrics"]["test/acc"] is not None
    assert f"retrained {again}: val/loss" in more.out
    members = [[row.split(",")[::2] for row in (run / "split.csv").read_text().splitlines()] for run in (again, winner)]
    assert members[0] == members[1], "the same images in the same splits"
    after = Journal(folder).trials
    assert sorted(after) == list(range(7))
    assert all(after[number].params == trials[number].params for number in trials)
    assert len({json.dumps(trial.params) for trial in after.values()}) == 7

    other = command("train", *words, "hydra.sweeper.metric=val/acc")
    check_error(other, 64, "metric: val/loss there, val/acc now")
    changed = command("train", *words, "trainer.max_epochs=5", "trainer.threads=2")
    check_error(changed, 64, "trainer.max_epochs: 4 there, 5 now", "trainer.max_epochs=4", "name=search-2")
    assert "threads" not in changed.err.partition("why")[2].partition("fix")[0], "it changes no result"


def test_jobs_with_different_numbers_of_devices(command, tmp_path):
    """Each gets as many cores as it has devices; the processes report through their first, and are stopped together."""
    done = command(
        *("train", *LAUNCHER, "trainer.accelerator=cpu", "strategy=ddp", "trainer.devices=1,2", "name=mixed"),
        *("trainer.max_epochs=3", "hydra.launcher.time_budget_s=300"),
    )
    assert done.code == 0, done.text
    trials = Journal(tmp_path / "runs/mixed").trials
    for number in (0, 1):
        assert sorted(trials[number].rows) == [1, 2, 3]
        rows = read_metrics(tmp_path / f"runs/mixed/{number}/metrics.csv")
        assert [row["val/acc"] for row in rows] == pytest.approx(
            [trials[number].rows[epoch]["val/acc"] for epoch in (1, 2, 3)], rel=1e-6
        )
    assert not (tmp_path / "runs/mixed/0/rank1.log").exists()
    assert (tmp_path / "runs/mixed/1/rank1.log").exists()


def test_a_population_keeps_its_numbers(command, tmp_path):
    """An exchange after every epoch: with a single one, no trial would change if the worst happened to arrive first."""
    done = command(
        *("train", *SWEEPER, "trainer.max_epochs=5", RATE, "name=population", "hydra.sweeper.metric=val/loss"),
        *("hydra.sweeper.scheduler=pbt", "hydra.sweeper.grace_epochs=1", "hydra.sweeper.num_samples=4"),
    )
    assert done.code == 0, done.text
    folder = tmp_path / "runs/population"
    trials = Journal(folder).trials
    assert sorted(trials) == [0, 1, 2, 3]
    assert sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) == [0, 1, 2, 3]
    events = [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]
    rates: dict[int, set[float]] = {}
    for event in events:
        if event["event"] == "started":
            rates.setdefault(event["trial"], set()).add(event["params"]["optimizer.lr"])
    assert any(len(values) > 1 for values in rates.values()), "no trial was changed"
    first = next(event for event in events if event["trial"] == 0)
    assert first["params"]["optimizer.lr"] == 0.003, "the config as it is"
    for number, trial in trials.items():
        assert sorted(trial.rows) == [1, 2, 3, 4, 5]
        assert result(folder / str(number))["state"] == "finished"
        used = yaml.safe_load((folder / str(number) / "config.yaml").read_text())["optimizer"]["lr"]
        assert used == trial.params["optimizer.lr"]


def test_a_metric_that_nobody_reports(command):
    done = command("train", *LAUNCHER, "seed=0,1", "hydra.launcher.metric=val/accuracy")
    check_error(done, 64, "the trials do not report val/accuracy; did you mean val/acc?", "val/macro_f1")


def test_a_dry_run_does_nothing(command, tmp_path):
    words = (RATE, "seed=range(0,3)", "hydra.sweeper.dry_run=true", "hydra.sweeper.num_samples=9", "name=dry")
    done = command("train", *SWEEPER, *words)
    assert done.code == 0, done.text
    assert "1e-05 to 0.1, logarithmic" in done.out
    assert "trials    9" in done.out
    assert "runs/dry" in done.out
    assert "backbone: shufflenet_v2_x0_5" in done.out
    assert not (tmp_path / "runs").exists()


def test_the_longest_trial_counts_for_the_scheduler(command):
    """Of two epochs nothing could be stopped at the fifth."""
    shared = [word for word in SWEEPER if not word.startswith("trainer.max_epochs=")]
    words = (*shared, "trainer.max_epochs=2,9", "hydra.sweeper.scheduler=asha", "hydra.sweeper.dry_run=true")
    done = command("train", *words, "hydra.sweeper.grace_epochs=5", "hydra.sweeper.default_first=false")
    assert done.code == 0, done.text
    done = command("train", *words, "hydra.sweeper.grace_epochs=14", "hydra.sweeper.default_first=false")
    check_error(done, 64, "no trial could ever be stopped", "trainer.max_epochs=9")


def test_a_grid_is_tried_whole_beside_the_config_as_it_is(command, tmp_path):
    """The default background, white, is not in the grid. Lists go through all that a sweep leaves, and are known again."""
    words = (
        "data.background=[0,0,0],[9,9,9]",
        "hydra.sweeper.search=grid",
        "hydra.sweeper.num_samples=9",
        "name=whole",
    )
    done = command("train", *SWEEPER, *words, "trainer.max_epochs=1")
    assert done.code == 0, done.text
    assert "hydra.sweeper.num_samples=9 has no effect: search=grid tries every combination" in done.text
    folder = tmp_path / "runs/whole"
    trials = Journal(folder).trials
    backgrounds = ["[255,255,255]", "[0,0,0]", "[9,9,9]"]
    assert [trials[number].params["data.background"] for number in sorted(trials)] == backgrounds
    for number, background in enumerate(backgrounds):
        config = yaml.safe_load((folder / str(number) / "config.yaml").read_text())
        assert config["data"]["background"] == json.loads(background)
    results = yaml.safe_load((folder / "optimization_results.yaml").read_text())
    assert results["best_params"]["data.background"] in backgrounds
    assert parses(shlex.split(results["command"])[3:])
    assert "[9,9,9]" in (folder / "sweep.csv").read_text()

    again = command("train", *SWEEPER, *words, "trainer.max_epochs=1")
    assert again.code == 0, again.text
    assert len(Journal(folder).trials) == 3, "no point is tried twice"


MISTAKES = [  # the words, the exit code, and what the answer must name
    (("hydra/sweeper=ray_tune", "optimizer.learning_rate=choice(1,2)"), 64, "did you mean optimizer.lr?"),
    (
        ("hydra/sweeper=ray_tune", "optimizer.lr=choice(0.1,-1)", "hydra.sweeper.default_first=false"),
        64,
        "optimizer.lr",
    ),
    (("hydra/sweeper=ray_tune", "optimizer.lr=0.1"), 64, "nothing is swept"),
    (("hydra/sweeper=ray_tune", "strategy=choice(ddp_spawn,ddp)"), 64, "ddp_spawn"),
    (("hydra/launcher=ray_tune", "strategy=ddp_spawn", "seed=0,1"), 64, "ddp_spawn"),
    (("hydra/launcher=ray_tune", "optimizer.lr=0.1,-1"), 64, "optimizer.lr=-1"),
    (("hydra/launcher=ray_tune", "seed=0,1", "hydra.launcher.num_sample=3"), 64, "num_sample"),
    (("hydra/launcher=ray_tune", "seed=0,1", "hydra.launcher.scheduler=pbt"), 64, "pbt"),
    (("hydra/launcher=ray_tune", "seed=0,1", "hydra.sweep.subdir=x"), 64, "hydra.sweep.subdir"),
    (("hydra/launcher=ray_tune", "seed=0,1", "hydra.launcher.resume=true", "name=none"), 66, "no sweep to go on with"),
    (("hydra/launcher=ray_tune", "hydra/sweeper=ray_tune", "seed=choice(0,1)"), 64, "hydra/launcher=ray_tune has no"),
    (("hydra/sweeper=ray_tune", "optimizer.lr=choice(0.1,0.2)", "hydra.sweeper.search=tpe"), 64, "optuna"),
    (
        ("hydra/sweeper=ray_tune", RATE, "hydra.sweeper.search=optuna", "hydra.sweeper.scheduler=pbt"),
        64,
        "search=optuna does not go with scheduler=pbt",
    ),
    (("hydra/sweeper=ray_tune", RATE, "hydra.sweeper.num_samples=-1"), 64, "num_samples=-1 needs an end"),
    (
        ("hydra/sweeper=ray_tune", RATE, "hydra.sweeper.search={_target_: os.system}"),
        64,
        "ray.tune.search",
    ),
]


@pytest.mark.parametrize(
    ("words", "code", "named"), MISTAKES, ids=lambda value: " ".join(value) if isinstance(value, tuple) else ""
)
def test_a_mistake_is_found_before_ray_starts(command, words, code, named):
    done = command("train", "-m", *words, PATH="/nonexistent")  # Ray starts its processes by name
    check_error(done, code, named)


def test_without_m_it_says_so(command):
    done = command("train", "hydra/sweeper=ray_tune", "optimizer.lr=0.1")
    check_error(done, 64, "hydra/sweeper=ray_tune has no effect without -m")
    assert "python -m src.train -m hydra/sweeper=ray_tune optimizer.lr=0.1" in done.err


def test_more_than_the_machine_has(command):
    done = command("train", *LAUNCHER, "seed=0,1", "hydra.launcher.resources.cpu=999")
    check_error(done, 69, "a trial asks for 999 CPU", "the cluster has 1 machine")
