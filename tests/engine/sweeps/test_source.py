"""What Tune gets of a sweep that goes on: the trials that are not done, and a scheduler that knows all rows."""

from __future__ import annotations

from types import SimpleNamespace

import cloudpickle
import pytest
from hydra.conf import HydraConf
from omegaconf import OmegaConf
from ray import tune
from ray.tune.schedulers import ASHAScheduler, HyperBandScheduler, MedianStoppingRule

from src.engine.sweeps.jobs import CONFIG, FINISH_AFTER, JOB
from src.engine.sweeps.launch import GivenJobs
from src.engine.sweeps.searches import SearchPoints, build_search
from src.engine.sweeps.source import TrialSource
from src.engine.sweeps.sweep_journal import FAILED, FINISHED, PAUSED, PRUNED, Goal, Journal
from tests.engine.sweeps.test_space import space_of

GOAL = Goal("acc", "max")
SPACE = space_of("lr=range(0,30)")


@pytest.fixture(scope="module", autouse=True)
def registered():
    tune.register_trainable("nothing", type("Nothing", (tune.Trainable,), {}))


def source_of(journal: Journal, scheduler=None, limit: int | None = None, jobs=None) -> TrialSource:
    """As a start of the sweep makes it, until Tune asks for trials."""
    points = jobs or SearchPoints(build_search("random", SPACE, GOAL, 0), SPACE, GOAL, 0)
    if limit is not None:
        points.limit = limit
    over = [
        number for number, one in journal.trials.items() if one.state in (FINISHED, PRUNED) and one.value is not None
    ]
    unfinished = [number for number in journal.trials if number not in over]
    source = TrialSource(points, GOAL, journal, scheduler, unfinished)
    source.compose = lambda point, number: OmegaConf.create({"lr": point.get("lr"), "hydra": HydraConf})
    source.resources = lambda config: tune.PlacementGroupFactory([{"CPU": 1.0}])
    spec = {"run": "nothing", "storage": None, "checkpoint_config": None, "max_failures": 2}
    source.add_configurations([SimpleNamespace(spec=spec)])
    return source


def asha() -> ASHAScheduler:
    scheduler = ASHAScheduler(time_attr="epoch", max_t=10, grace_period=2, reduction_factor=2)
    assert scheduler.set_search_properties("acc", "max")
    return scheduler


def begin(journal: Journal, number: int, *values: float, state: str = "", value: float | None = None) -> None:
    journal.started(number, f"runs/x/{number}", {"lr": number}, [f"lr={number}"])
    for epoch, acc in enumerate(values, start=1):
        journal.row(number, {"epoch": epoch, "acc": acc})
    if state:
        journal.ended(number, state, value)


def drawn(source: TrialSource, most: int = 9) -> list[tuple[str, dict]]:
    found = []
    while len(found) < most and (trial := source.next_trial()) is not None:
        composed = cloudpickle.loads(trial.config.pop(CONFIG))
        assert composed.lr == trial.config.get("lr")
        found.append((trial.trial_id, trial.config))
    return found


def test_a_changed_point_has_a_config_of_its_own_and_keeps_its_number(tmp_path):
    """pbt gives a trial the point of another one."""
    source = source_of(Journal(tmp_path), limit=2)
    first, second = source.next_trial(), source.next_trial()
    second.set_config({**first.config, "lr": 29})
    assert second.config[JOB] == 1
    assert cloudpickle.loads(second.config[CONFIG]).lr == 29
    second.get_json_state()  # what Tune writes down


def test_what_is_not_done_comes_first_under_its_number(tmp_path):
    journal = Journal(tmp_path)
    begin(journal, 0, 0.5, state=FINISHED, value=0.5)
    begin(journal, 1, 0.5, state=FAILED)
    begin(journal, 2, 0.5)
    begin(journal, 3, 0.5, 0.6, state=PRUNED)  # it was still measuring when the sweep was killed
    begin(journal, 4, 0.5, state=PAUSED)
    source = source_of(journal, limit=7)
    assert not source.is_done()
    found = drawn(source)
    assert [number for number, _ in found] == ["1", "2", "3", "4", "5", "6"]
    assert [config.get(FINISH_AFTER) for _, config in found[:4]] == [None, None, 2, None]
    assert [config["lr"] for _, config in found[:4]] == [1, 2, 3, 4]
    assert len({config["lr"] for _, config in found} | {0}) == 7
    assert source.is_finished()


def test_fewer_samples_leave_what_was_begun(tmp_path):
    journal = Journal(tmp_path)
    for number in range(4):
        begin(journal, number, 0.5)
    assert [number for number, _ in drawn(source_of(journal, limit=2))] == ["0", "1"]


def test_no_more_trials_at_once_than_there_is_room_for(tmp_path):
    source = source_of(Journal(tmp_path), limit=9)
    source.max_concurrent, source.room = 3, lambda: 2
    assert len(drawn(source)) == 2
    source.room = lambda: 9
    assert len(drawn(source)) == 1, "max_concurrent"
    source.on_trial_complete("0", {"acc": 1.0})
    assert len(drawn(source)) == 1
    assert not source.is_finished()


def test_the_jobs_of_a_launcher(tmp_path):
    jobs = GivenJobs({number: [f"lr={number}"] for number in (3, 4, 5)})
    journal = Journal(tmp_path)
    begin(journal, 0, 0.5)  # of another batch
    begin(journal, 3, 0.5, state=FINISHED, value=1.0)
    begin(journal, 5, state=FAILED)
    source = source_of(journal, jobs=jobs)
    assert drawn(source) == [("5", {JOB: 5}), ("4", {JOB: 4})]
    assert source.next_trial() is None
    assert source.is_finished()


def test_the_search_learns_the_best_value_and_not_the_last(tmp_path):
    journal = Journal(tmp_path)
    source = source_of(journal, limit=3)
    begin(journal, int(drawn(source, 1)[0][0]), 0.9, 0.4)
    source.on_trial_complete("0", {"acc": 0.4})
    assert list(source.points.values.values()) == [0.9]


@pytest.mark.parametrize("ended", [False, True])
def test_asha_knows_all_rows_and_ends_what_it_had_just_ended(tmp_path, ended):
    """ended: the last trial was killed between the scheduler's decision and its end."""
    journal = Journal(tmp_path)
    for number, values in enumerate([(0.1, 0.9, 0.9, 0.9), (0.1, 0.8), (0.1, 0.2 if ended else 0.95)]):
        begin(journal, number, *values, **({"state": FINISHED, "value": 1.0} if number < 2 else {}))
    scheduler = asha()
    ((number, config),) = drawn(source_of(journal, scheduler, limit=3))
    assert (number, config.get(FINISH_AFTER)) == ("2", 2 if ended else None)
    undisturbed = asha()
    trials = [tune.experiment.Trial("", stub=True, trial_id=str(number)) for number in range(3)]
    for trial in trials:
        undisturbed.on_trial_add(None, trial)
    for one, epoch in journal.order:
        if epoch:
            undisturbed.on_trial_result(None, trials[one], journal.trials[one].rows[epoch])
    assert scheduler.debug_string() == undisturbed.debug_string()


def test_median_knows_all_rows_and_nan_is_the_worst(tmp_path):
    journal = Journal(tmp_path)
    for number in range(4):
        begin(journal, number, 0.5 + number / 10, 0.6 + number / 10, state=FINISHED, value=1.0)
    begin(journal, 4, float("nan"))
    scheduler = MedianStoppingRule(time_attr="epoch", grace_period=1, min_samples_required=3)
    scheduler.set_search_properties("acc", "max")
    ((number, config),) = drawn(source_of(journal, scheduler, limit=5))
    assert (number, config[FINISH_AFTER]) == ("4", 1)


@pytest.mark.parametrize(
    "scheduler", [asha(), MedianStoppingRule(time_attr="epoch", grace_period=1)], ids=["asha", "median"]
)
def test_rows_after_an_end_and_an_end_without_rows_spoil_nothing(tmp_path, scheduler):
    """A trial that was ended, killed while it measured, and gone on with; rows that were found in its folder later."""
    scheduler.set_search_properties("acc", "max")
    journal = Journal(tmp_path)
    for number in range(3):
        begin(journal, number, 0.1 * number, 0.2, state=PRUNED, value=1.0)
        journal.row(number, {"epoch": 3, "acc": 0.9})
    begin(journal, 3, state=FINISHED, value=1.0)
    begin(journal, 4, 0.01, 0.01, 0.01, state=PRUNED)
    journal.row(4, {"epoch": 4, "acc": 0.9})
    ((number, config),) = drawn(source_of(journal, scheduler, limit=5))
    assert (number, config[FINISH_AFTER]) == ("4", 4)


def test_hyperband_says_what_it_does_not_know(tmp_path, caplog):
    journal = Journal(tmp_path)
    begin(journal, 0, 0.5, state=PRUNED, value=1.0)
    begin(journal, 1, 0.5)
    scheduler = HyperBandScheduler(time_attr="epoch", max_t=9)
    scheduler.set_search_properties("acc", "max")
    assert len(drawn(source_of(journal, scheduler, limit=2))) == 1
    assert "HyperBandScheduler begins anew" in caplog.text
    assert "not with the 1 that have ended" in caplog.text
