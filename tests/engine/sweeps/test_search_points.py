"""Which points are tried: repeatable, none twice, numbered without gaps, the default first, and the same after a resume."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys

import pytest
from ray.tune.search import Searcher

from src.engine.runs.errors import ExitCode, UserError
from src.engine.sweeps.searches import SearchPoints, build_search, grid_points, random_point
from src.engine.sweeps.sweep_journal import Goal, TrialRecord
from tests.conftest import command_environment
from tests.engine.sweeps.test_space import check_sweep_error, space_of

FINISHED = Searcher.FINISHED
LR = "optimizer.lr=tag(log,interval(1e-5,1e-1))"


class Told(Searcher):
    """A search that suggests what it was given, and keeps what it was told."""

    def __init__(self, *points):
        super().__init__()
        self.points, self.told, self.evaluated, self.rows, self.properties = list(points), [], [], [], None

    def suggest(self, trial_id):
        return self.points.pop(0)

    def on_trial_complete(self, trial_id, result=None, error=False):
        self.told.append((trial_id, result and result["acc"], error))

    def on_trial_result(self, trial_id, result):
        self.rows.append((trial_id, result["acc"]))

    def add_evaluated_point(self, parameters, value):
        self.evaluated.append((parameters, value))

    def set_search_properties(self, metric, mode, config, **spec):
        self.properties = metric, mode, config, spec
        return False

    def set_max_concurrency(self, max_concurrent):
        return max_concurrent == 3


def points_of(inner, space, default=None, mode="max", seed=0) -> SearchPoints:
    return SearchPoints(inner, space, Goal("acc", mode), seed, default)


@pytest.mark.parametrize("module", ["launch", "sweep", "trainable"])
def test_a_sweep_does_without_torch(module):
    """It takes seconds to import, and only the trials need it: a worker that is slow to start gets none of them."""
    imports = f"import sys, src.engine.sweeps.{module}; from src.engine.runs import seeding"
    code = f"{imports}; seeding.key(0); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=command_environment(), timeout=120, capture_output=True)
    assert done.returncode == 0, done.stderr


def random_points(space, count: int, seed: int) -> list:
    return list(itertools.islice(build_search("random", space, Goal("acc", "max"), seed), count))


def test_a_random_point_depends_on_seed_and_number_alone():
    few, more = space_of(LR, "seed=range(0,9)"), space_of("x=interval(0,1)", LR, "seed=range(0,9)")
    first = random_points(few, 5, seed=1)
    assert random_points(few, 5, seed=1) == first
    assert len({point["optimizer.lr"] for point in first}) == 5
    for point, wider in zip(first, random_points(more, 5, seed=1), strict=True):
        assert point == {name: wider[name] for name in point}, "a new parameter must not change the others"
    assert random_points(few, 1, seed=2) != first[:1]
    twins = space_of("a=interval(0,1)", "b=interval(0,1)")
    assert len(set(random_point(twins, 0).values())) == 2


def test_a_grid_is_every_combination_in_order():
    found = list(grid_points(space_of("a=2,1", "b=x,y,z")))
    assert found == [{"a": a, "b": b} for a in (2, 1) for b in "xyz"]


def test_a_grid_names_the_parameter_that_is_an_interval():
    with pytest.raises(UserError) as caught:
        grid_points(space_of("seed=1,2", "optimizer.lr=interval(0.1,1)"))
    check_sweep_error(caught.value, "optimizer.lr", "0.1 to 1")


def test_trials_are_numbered_and_the_default_is_the_first():
    points = points_of(Told({"a": 1}, {"a": 2}), space_of("a=1,2,3"), default={"a": 3})
    assert [points.suggest() for _ in range(3)] == [{"job": number, "a": a} for number, a in enumerate((3, 1, 2))]
    assert points_of(Told({"a": 1}), space_of("a=1,2")).suggest() == {"job": 0, "a": 1}


def test_numbers_have_no_gaps_where_the_search_waits():
    points = points_of(Told({"a": 1}, None, {"a": 2}, FINISHED), space_of("a=1,2,3"))
    assert [points.suggest() for _ in range(4)] == [{"job": 0, "a": 1}, None, {"job": 1, "a": 2}, FINISHED]


def test_the_search_learns_of_the_default_when_it_can_take_it():
    space = space_of("a=1,2,3", "b=interval(0,1)")
    for default, learnt in (({"a": 3, "b": 0.5}, 1), ({"a": 4, "b": 0.5}, 0), ({"a": 3, "b": 2.0}, 0), ({"a": 3}, 0)):
        inner = Told()
        points = points_of(inner, space, default)
        points.suggest()
        points.report(0, {"acc": 0.6})
        points.complete(0, 0.7)
        assert inner.evaluated == [(default, 0.7)] * learnt
        assert not inner.told
        assert not inner.rows
    inner = Told()
    points = points_of(inner, space, {"a": 3, "b": 0.5})
    points.suggest()
    points.complete(0, None)
    assert not inner.evaluated, "a trial that failed has no value"


def test_the_search_is_told_what_happened():
    inner = Told(*({"a": number} for number in range(4)))
    points = points_of(inner, space_of("a=range(0,9)"))
    for _ in range(3):
        points.suggest()
    points.report(0, {"acc": 0.5})
    points.report(0, {"loss": 0.5})  # without the metric: Ray's OptunaSearch would fail
    points.complete(0, 0.6)
    points.complete(1, None)
    points.complete(2, -1e30)
    points.complete(2, 0.9)
    assert [row[1] for row in inner.rows] == [0.5]
    assert [(value, error) for _, value, error in inner.told] == [(0.6, False), (None, True), (-1e30, False)]


def test_a_point_is_tried_once_and_the_search_learns_what_came_of_it():
    inner = Told({"a": 1}, {"a": 1}, {"a": 2}, {"a": 1}, {"a": 2}, {"a": 3})
    points = points_of(inner, space_of("a=range(0,9)"))
    assert points.suggest()["a"] == 1
    assert points.suggest()["a"] == 2
    assert inner.told == [(inner.told[0][0], None, True)], "nothing is known of the first 1 yet"
    points.complete(0, 0.6)
    del inner.told[:]
    assert points.suggest() == {"job": 2, "a": 3}
    assert [(value, error) for _, value, error in inner.told] == [(0.6, False), (None, True)]
    assert len({name for name, *_ in inner.told}) == 2, "each suggestion is answered under its own id"


def test_the_default_is_not_tried_again():
    space = space_of("a=1,2", "b=1,2")
    points = points_of(grid_points(space), space, default={"a": 1, "b": 2})
    assert [points.suggest()["b"] for _ in range(4)] == [2, 1, 1, 2]
    assert points.suggest() == FINISHED


def test_a_search_that_repeats_itself_gets_a_random_point():
    inner = Told(*[{"a": 1}] * 50)
    points = points_of(inner, space_of("a=range(0,9)"))
    points.suggest()
    found = points.suggest()
    assert found["job"] == 1
    assert found["a"] != 1
    again = points_of(Told(*[{"a": 1}] * 50), points.space)
    assert [again.suggest()["a"], again.suggest()["a"]] == [1, found["a"]], "a function of seed and number"
    told = len(inner.told)
    points.complete(1, 0.5)
    assert inner.evaluated == [({"a": found["a"]}, 0.5)], "the search learns of it all the same"
    assert len(inner.told) == told


@pytest.mark.parametrize(("default", "trials"), [(None, 6), ({"a": 1, "b": 2}, 6), ({"a": 7, "b": 2}, 7)])
def test_a_finite_space_ends_when_every_point_was_tried(default, trials):
    space = space_of("a=1,2,3", "b=int(interval(1,2))")
    points = points_of(search_of("random", space), space, default)
    found = [points.suggest() for _ in range(trials)]
    assert [point["job"] for point in found] == list(range(trials))
    assert len({(point["a"], point["b"]) for point in found}) == trials
    assert points.suggest() == FINISHED


def test_the_limit_counts_trials():
    space = space_of("a=range(0,9)")
    points = points_of(search_of("random", space), space)
    points.limit = 2
    assert [points.suggest() == FINISHED for _ in range(3)] == [False, False, True]
    points.limit = 3
    assert points.suggest()["job"] == 2
    assert points.suggest() == FINISHED


INTERVALS = space_of(LR, "model.dropout=interval(0,0.5)", "n=int(interval(1,8))")
SEARCHES = ["random", "optuna", "bayesopt"]


def search_of(name: str, space=INTERVALS):
    return build_search(name, space, Goal("acc", "max"), seed=0)


def advance(points: SearchPoints, first: int, last: int) -> list:
    """Every fifth trial fails. Returns the points."""
    found = []
    for number in range(first, last):
        found.append(points.suggest())
        lr = found[-1]["optimizer.lr"]
        points.complete(number, None if number % 5 == 4 else -abs(math.log10(lr) + 3))
    return found


def taken_up(name: str, before: SearchPoints, found: list, default) -> SearchPoints:
    """What the next start of a sweep makes of its journal."""
    points = points_of(search_of(name), INTERVALS, default)
    records = [TrialRecord(point["job"], "", {}, INTERVALS.overrides(point)) for point in found]
    values = {number: before.values[tuple(one.overrides)] for number, one in enumerate(records)}
    points.take_up(
        {one.number: points.read(one) for one in records},
        {number: value for number, value in values.items() if value is not None},
    )
    return points


@pytest.mark.parametrize("name", SEARCHES)
def test_a_search_of_a_sweep_that_goes_on_knows_what_was_tried(name):
    default = {"optimizer.lr": 0.003, "model.dropout": 0.0, "n": 4}
    undisturbed = points_of(search_of(name), INTERVALS, default)
    expected = advance(undisturbed, 0, 16)
    points = points_of(search_of(name), INTERVALS, default)
    assert advance(points, 0, 12) == expected[:12], "repeatable"
    resumed = taken_up(name, points, expected[:12], default)
    assert resumed.values == points.values
    more = advance(resumed, 12, 16)
    assert [point["job"] for point in more] == [12, 13, 14, 15]
    assert len({tuple(point.values())[1:] for point in expected[:12] + more}) == 16, "no point twice"
    if name == "random":
        assert more == expected[12:]
    if name == "optuna":
        told = resumed.search._ot_study.trials[: sum(value is not None for value in points.values.values())]
        assert [one.value for one in told] == [value for value in points.values.values() if value is not None]


def test_a_grid_that_goes_on_takes_what_is_left_and_what_is_new():
    space, wider = space_of("a=1,2,3"), space_of("a=1,5,2,3")
    points = points_of(grid_points(wider), wider)
    records = [TrialRecord(number, "", {}, space.overrides({"a": a})) for number, a in enumerate((1, 2))]
    points.take_up({one.number: points.read(one) for one in records}, {0: 0.5})
    assert [points.suggest() for _ in range(3)] == [{"job": 2, "a": 5}, {"job": 3, "a": 3}, FINISHED]


@pytest.mark.parametrize("words", [["a=7"], ["a=${oc.env:HOME}"], ["a=]["], ["a"], ["b=1"], []])
def test_a_trial_of_a_foreign_journal_is_no_point_of_the_space(words):
    space = space_of("a=1,2,3")
    points = points_of(grid_points(space), space, default={"a": 9})
    with pytest.raises(UserError, match="trial 4 of the sweep is no point of its space") as caught:
        points.read(TrialRecord(4, "", {}, words))
    assert caught.value.code == ExitCode.DATA
    with pytest.raises(UserError):
        points.read(TrialRecord(4, "", {}, ["a=9"]))
    assert points.read(TrialRecord(0, "", {}, ["a=9"])) == {"a": 9}, "the default is trial 0"


@pytest.mark.parametrize("mode", ["max", "min"])
def test_bayesopt_finds_the_power_of_ten_although_some_trials_diverge_or_fail(mode):
    """Searched as it is, 0.00001 to 0.1 would have nearly all points above 0.001."""
    goal, space = Goal("acc", mode), space_of(LR, "n=int(interval(1,4))")
    points = SearchPoints(build_search("bayesopt", space, goal, seed=0), space, goal, 0)
    tried = []
    for number in range(22):
        point = points.suggest()
        assert space.contains({name: value for name, value in point.items() if name != "job"})
        tried.append(math.log10(point["optimizer.lr"]))
        value = -goal.sign * ((tried[-1] + 4) ** 2 + 0.1 * abs(point["n"] - 2))
        points.complete(number, {0: goal.worst, 3: None, 12: goal.worst}.get(number, value))
    assert sum(power < -3 for power in tried[:10]) >= 3, "the first are spread over the powers"
    assert sum(abs(power + 4) < 0.5 for power in tried[-8:]) >= 5
    told = [one.value for one in points.search._ot_study.trials]
    assert told[0] == told[12] == -goal.sign * math.inf, "1e30 would make all others look alike"


def test_bayesopt_suggests_other_points_while_some_are_computed_and_when_its_first_trials_fail():
    goal = Goal("acc", "max")
    points = SearchPoints(build_search("bayesopt", INTERVALS, goal, seed=0), INTERVALS, goal, 0)
    for number in range(10):
        points.suggest()
        points.complete(number, None)
    for number in range(10, 20):
        points.complete(number, points.suggest()["optimizer.lr"])
    found = [points.suggest() for _ in range(3)]
    assert len({tuple(point.values())[1:] for point in found}) == 3
