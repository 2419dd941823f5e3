"""A sweep that is taken up: whose folder it is, and which trials are handed out again."""

from __future__ import annotations

import json
import sys

import pytest
from ray.tune.search import ConcurrencyLimiter, Searcher

from src.errors import ExitCode, UserError
from src.tuning.launch import GivenJobs, Jobs
from src.tuning.points import GridPoints, Points
from src.tuning.resuming import IDENTITY, Again, open_sweep, trials_of
from tests.tuning.test_space import space_of

FINISHED = Searcher.FINISHED
SAME = {"kind": "sweeper", "space": ("lr=1,2",), "seed": 0}


def begin(folder, identity=SAME, resume="auto"):
    with open_sweep(folder, identity, resume) as journal:
        journal.started(0, str(folder / "0"), {"lr": 1}, ["lr=1"])


def refused(folder, identity=SAME, resume="auto") -> UserError:
    with pytest.raises(UserError) as error, open_sweep(folder, identity, resume):
        pass
    return error.value


@pytest.mark.parametrize("resume", ["auto", "true", "True"])
def test_the_same_sweep_goes_on_with_what_it_knows(tmp_path, resume):
    begin(tmp_path)
    with open_sweep(tmp_path, SAME, resume) as journal:
        assert journal.trials[0].params == {"lr": 1}
    assert (tmp_path / ".tune" / "returned").is_dir()


def test_another_sweep_is_refused_with_what_differs(tmp_path):
    begin(tmp_path)
    error = refused(tmp_path, SAME | {"seed": 1, "search": "grid"})
    assert error.found == f"{tmp_path.name} is the folder of another sweep"
    assert error.why == "seed: 0 there, 1 now\nsearch: None there, grid now"
    assert json.loads((tmp_path / IDENTITY).read_text())["seed"] == 0
    begin(tmp_path)


def test_where_no_trial_has_begun_anything_may_be_changed(tmp_path):
    """The first command was mistyped, or ended at once."""
    with open_sweep(tmp_path, SAME, "auto"):
        pass
    begin(tmp_path, SAME | {"seed": 1}, resume="false")
    assert "seed: 1 there" in refused(tmp_path).why


def test_resume_is_taken_at_its_word(tmp_path):
    error = refused(tmp_path, resume="true")
    assert (error.found, error.code) == ("there is no sweep to go on with", ExitCode.NO_INPUT)
    assert not list(tmp_path.iterdir())
    begin(tmp_path, resume="false")
    assert refused(tmp_path, resume="false").found == f"a sweep named {tmp_path.name} exists already"
    assert refused(tmp_path, resume="maybe").found == "resume=maybe is not a choice"


def test_two_commands_do_not_work_on_one_sweep(tmp_path):
    with open_sweep(tmp_path, SAME, "auto"):
        assert refused(tmp_path).code == ExitCode.BUSY
    begin(tmp_path)


def test_the_folder_is_free_again_after_a_failure(tmp_path):
    with pytest.raises(RuntimeError, match="of a trial"), open_sweep(tmp_path, SAME, "auto"):
        raise RuntimeError("of a trial")
    begin(tmp_path)


@pytest.fixture
def again(monkeypatch):
    """again(search, failed, handed_out): as a sweep that is taken up makes it ready."""

    def make(search, failed=(), handed_out=()):
        monkeypatch.setattr(Again, "failed", list(failed))
        monkeypatch.setattr(Again, "handed_out", list(handed_out))
        return Again(search)

    return make


def grid() -> Points:
    space = space_of("lr=1,2,3,4")
    points = Points(GridPoints(space), space, seed=0)
    points.set_search_properties("acc", "max", {})
    return points


def all_of(search) -> list:
    found = []
    while (point := search.suggest(f"t{len(found)}")) != FINISHED:
        found.append(point)
        assert len(found) < 9, "it never ends"
    return found


def test_failed_trials_come_first_under_their_numbers(again, tmp_path):
    before = again(grid())
    for number in range(3):
        before.suggest(str(number))
    before.save(str(tmp_path / "state"))
    handed_out = [{"job": number, "lr": number + 1} for number in range(3)]
    search = again(grid(), [handed_out[1]], handed_out)
    search.restore(str(tmp_path / "state"))
    assert all_of(search) == [{"job": 1, "lr": 2}, {"job": 3, "lr": 4}]


@pytest.mark.parametrize("failed", [[], [{"job": 2, "lr": 3}]], ids=["under way", "failed"])
def test_trials_that_tune_had_not_saved_come_again_once(again, tmp_path, failed):
    before = again(grid())
    before.suggest("0")
    before.save(str(tmp_path / "state"))
    handed_out = [{"job": number, "lr": number + 1} for number in range(3)]
    search = again(grid(), failed, handed_out)
    search.restore(str(tmp_path / "state"))
    found = all_of(search)
    assert sorted(point["job"] for point in found) == [1, 2, 3]
    assert {point["job"]: point["lr"] for point in found} == {1: 2, 2: 3, 3: 4}
    assert found[:1] == (failed or [{"job": 1, "lr": 2}])


def jobs_of(folder, saved: int) -> GivenJobs:
    """Jobs 5, 6 and 7, of which `saved` were handed out when Tune saved its state."""
    search = GivenJobs([5, 6, 7])
    for number in range(saved):
        search.suggest(str(number))
    search.save(str(folder / "state"))
    return GivenJobs([5, 6, 7])


@pytest.mark.parametrize(("saved", "expected"), [(0, [5, 6, 7]), (1, [6, 7]), (3, [])])
def test_given_jobs_go_on_where_tune_had_saved_them(again, tmp_path, saved, expected):
    search = again(jobs_of(tmp_path, saved))
    search.restore(str(tmp_path / "state"))
    assert [point["job"] for point in all_of(search)] == expected


@pytest.mark.parametrize("saved", [0, 1, 3])
def test_a_given_job_that_failed_comes_again_once(again, tmp_path, saved):
    """Two trials of one number would write into the same folder."""
    search = again(jobs_of(tmp_path, saved), failed=[{"job": 6}], handed_out=[{"job": 5}, {"job": 6}])
    search.restore(str(tmp_path / "state"))
    numbers = [point["job"] for point in all_of(search)]
    assert numbers[:1] == [6]
    assert sorted(numbers) == sorted({6} | set([5, 6, 7][saved:]))


@pytest.mark.parametrize("max_concurrent", [None, 2])
def test_a_sweep_of_which_tune_had_saved_nothing_catches_up(again, max_concurrent):
    again(grid(), handed_out=[{"job": 0, "lr": 1}, {"job": 1, "lr": 2}])
    trials = trials_of(grid(), max_concurrent)
    assert isinstance(trials.searcher, ConcurrencyLimiter) == (max_concurrent is not None)
    trials.catch_up()
    assert [trials.searcher.suggest(name) for name in "ab"] == [{"job": 0, "lr": 1}, {"job": 1, "lr": 2}]
    trials.searcher.on_trial_complete("a", {"acc": 1.0})
    assert trials.searcher.suggest("c") == {"job": 2, "lr": 3}


def test_a_search_is_asked_for_one_point_more_than_there_is_room_for(again, monkeypatch):
    """What it suggests later, it suggests with more results known; a machine that joins gets trials at once."""
    search, room = again(grid()), [1]
    monkeypatch.setattr(Again, "room", staticmethod(lambda: room[0]))
    assert [search.suggest(name) and name for name in "abc"] == ["a", "b", None]
    search.on_trial_complete("a", {"acc": 1.0})
    assert search.suggest("c") == {"job": 2, "lr": 3}
    assert search.suggest("d") is None
    room[0] = 2
    assert search.suggest("d") == {"job": 3, "lr": 4}
    assert search.suggest("e") is None, "not the end: one of the trials may come again"
    room[0] = 9
    assert search.suggest("e") == FINISHED


def test_a_search_that_had_ended_is_asked_again(again):
    """There may be more trials now, or failed ones."""
    trials = trials_of(GivenJobs([0]), None)
    trials.set_finished()
    state = trials.get_state() | {"total_samples": sys.maxsize}
    trials = trials_of(GivenJobs([0]), None)
    trials.set_state(state)
    assert not trials.is_finished()


JOBS = Jobs(
    {
        4: ["model=small", "optimizer.lr=1e-3", "+seed=1", "name=x"],
        5: ["model=small", "optimizer.lr=2e-3", "+seed=2", "name=x"],
        6: ["model=small", "optimizer.lr=auto", "+seed=2", "name=x", "trainer.devices=2"],
    }
)


def test_what_jobs_have_in_common_is_no_parameter_and_numbers_are_numbers():
    assert JOBS.params({"job": 4}) == {"optimizer.lr": 1e-3, "seed": 1}
    assert JOBS.params({"job": 6}) == {"optimizer.lr": "auto", "seed": 2, "trainer.devices": 2}
    assert type(JOBS.params({"job": 4})["seed"]) is int
    assert JOBS.overrides({"job": 5}) == JOBS.jobs[5]
