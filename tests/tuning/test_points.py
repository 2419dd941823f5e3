"""Which points are tried: repeatable, none twice, numbered without gaps, the default first, and the same after a resume."""

from __future__ import annotations

import math
import pickle
import subprocess
import sys

import pytest
from ray.tune.search import Searcher

from src.errors import UserError
from src.tuning.choices import build_search
from src.tuning.points import BayesianPoints, GridPoints, Points, RandomPoints, random_point
from tests.conftest import command_environment
from tests.tuning.test_space import check_sweep_error, space_of

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


def points_of(inner, space, default=None, mode="max", seed=0) -> Points:
    """As Tune makes it ready."""
    points = Points(inner, space, seed, default)
    assert points.set_search_properties("acc", mode, {}, num_samples=5)
    return points


@pytest.fixture
def limit(monkeypatch):
    return lambda number: monkeypatch.setattr(Points, "limit", number)


@pytest.mark.parametrize("module", ["launch", "sweep", "trainable"])
def test_a_sweep_does_without_torch(module):
    """It takes seconds to import, and only the trials need it: a worker that is slow to start gets none of them."""
    code = f"import sys, src.tuning.{module}, src.seeding; src.seeding.key(0); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=command_environment(), timeout=120, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_a_random_point_depends_on_seed_and_number_alone():
    few, more = space_of(LR, "seed=range(0,9)"), space_of("x=interval(0,1)", LR, "seed=range(0,9)")
    first = [RandomPoints(few, seed=1).point(number) for number in range(5)]
    search = RandomPoints(few, seed=1)
    assert [search.suggest(str(number)) for number in range(5)] == first
    assert len({point["optimizer.lr"] for point in first}) == 5
    for point, wider in zip(first, map(RandomPoints(more, seed=1).point, range(5)), strict=True):
        assert point == {name: wider[name] for name in point}, "a new parameter must not change the others"
    assert RandomPoints(few, seed=2).point(0) != first[0]
    twins = space_of("a=interval(0,1)", "b=interval(0,1)")
    assert len(set(random_point(twins, 0).values())) == 2


def test_a_grid_is_every_combination_in_order():
    search = GridPoints(space_of("a=2,1", "b=x,y,z"))
    expected = [{"a": a, "b": b} for a in (2, 1) for b in "xyz"]
    assert [search.suggest(str(number)) for number in range(6)] == expected
    assert search.suggest("6") == FINISHED


def test_a_grid_names_the_parameter_that_is_an_interval():
    with pytest.raises(UserError) as caught:
        GridPoints(space_of("seed=1,2", "optimizer.lr=interval(0.1,1)"))
    check_sweep_error(caught.value, "optimizer.lr", "0.1 to 1")


def test_trials_are_numbered_and_the_default_is_the_first():
    points = points_of(Told({"a": 1}, {"a": 2}), space_of("a=1,2,3"), default={"a": 3})
    assert [points.suggest(name) for name in "xyz"] == [{"job": number, "a": a} for number, a in enumerate((3, 1, 2))]
    assert points_of(Told({"a": 1}), space_of("a=1,2")).suggest("x") == {"job": 0, "a": 1}


def test_numbers_have_no_gaps_where_the_search_waits():
    points = points_of(Told({"a": 1}, None, {"a": 2}, FINISHED), space_of("a=1,2,3"))
    assert [points.suggest(name) for name in "wxyz"] == [{"job": 0, "a": 1}, None, {"job": 1, "a": 2}, FINISHED]


def test_the_search_learns_of_the_default_when_it_can_take_it():
    space = space_of("a=1,2,3", "b=interval(0,1)")
    for default, learnt in (({"a": 3, "b": 0.5}, 1), ({"a": 4, "b": 0.5}, 0), ({"a": 3, "b": 2.0}, 0), ({"a": 3}, 0)):
        inner = Told()
        points = points_of(inner, space, default)
        points.suggest("x")
        points.on_trial_result("x", {"acc": 0.6})
        points.on_trial_complete("x", {"acc": 0.7})
        assert inner.evaluated == [(default, 0.7)] * learnt
        assert not inner.told
        assert not inner.rows
    inner = Told()
    points = points_of(inner, space, {"a": 3, "b": 0.5})
    points.suggest("x")
    points.on_trial_complete("x", error=True)
    assert not inner.evaluated, "a trial that failed has no value"
    points = points_of(RandomPoints(space, 0), space, {"a": 3, "b": 0.5})
    points.suggest("x")
    points.on_trial_complete("x", {"acc": 0.7})  # this search cannot take it, which is no error


def test_the_search_is_told_what_happened():
    inner = Told(*({"a": number} for number in range(6)))
    points = points_of(inner, space_of("a=range(0,9)"))
    for name in "uvwxyz":
        points.suggest(name)
    points.on_trial_result("u", {"acc": 0.5})
    points.on_trial_result("u", {"loss": 0.5})  # without the metric: Ray's OptunaSearch would fail
    points.on_trial_complete("u", {"acc": 0.6})
    points.on_trial_complete("v", {"acc": 0.6, "failed": True})
    points.on_trial_complete("w", {"acc": math.nan})
    points.on_trial_complete("x", {"loss": 1.0})
    points.on_trial_complete("y", error=True)
    points.on_trial_complete("z", {"acc": math.inf})
    points.on_trial_complete("y", {"acc": 0.9})  # the failed trial of a resumed sweep, run again
    assert [row[1] for row in inner.rows] == [0.5]
    assert [(value, error) for _, value, error in inner.told] == [(0.6, False)] + [(None, True)] * 5
    assert inner.properties == ("acc", "max", points.space.domains, {"num_samples": 5})
    assert points.metric == "acc"
    assert points.set_max_concurrency(3)


def test_a_point_is_tried_once_and_the_search_learns_what_came_of_it():
    inner = Told({"a": 1}, {"a": 1}, {"a": 2}, {"a": 1}, {"a": 2}, {"a": 3})
    points = points_of(inner, space_of("a=range(0,9)"))
    assert points.suggest("x")["a"] == 1
    assert points.suggest("y")["a"] == 2
    assert inner.told == [(inner.told[0][0], None, True)], "nothing is known of the first 1 yet"
    points.on_trial_complete("x", {"acc": 0.6})
    del inner.told[:]
    assert points.suggest("z") == {"job": 2, "a": 3}
    assert [(value, error) for _, value, error in inner.told] == [(0.6, False), (None, True)]
    assert len({name for name, *_ in inner.told}) == 2, "each suggestion is answered under its own id"
    assert points.skipped == 3


def test_the_default_is_not_tried_again():
    space = space_of("a=1,2", "b=1,2")
    points = points_of(GridPoints(space), space, default={"a": 1, "b": 2})
    assert [points.suggest(str(number))["b"] for number in range(4)] == [2, 1, 1, 2]
    assert points.suggest("4") == FINISHED


def test_a_search_that_repeats_itself_gets_a_random_point():
    inner = Told(*[{"a": 1}] * 50)
    points = points_of(inner, space_of("a=range(0,9)"))
    points.suggest("x")
    found = points.suggest("y")
    assert found["job"] == 1
    assert found["a"] != 1
    assert points.skipped == 20
    again = points_of(Told(*[{"a": 1}] * 50), points.space)
    assert [again.suggest("p")["a"], again.suggest("q")["a"]] == [1, found["a"]], "a function of seed and number"
    told = len(inner.told)
    points.on_trial_complete("y", {"acc": 0.5})
    assert inner.evaluated == [({"a": found["a"]}, 0.5)], "the search learns of it all the same"
    assert len(inner.told) == told


@pytest.mark.parametrize(("default", "trials"), [(None, 6), ({"a": 1, "b": 2}, 6), ({"a": 7, "b": 2}, 7)])
def test_a_finite_space_ends_when_every_point_was_tried(default, trials):
    space = space_of("a=1,2,3", "b=int(interval(1,2))")
    points = points_of(RandomPoints(space, 0), space, default)
    found = [points.suggest(str(number)) for number in range(trials)]
    assert [point["job"] for point in found] == list(range(trials))
    assert len({(point["a"], point["b"]) for point in found}) == trials
    assert points.suggest("last") == FINISHED


def test_the_limit_counts_trials_and_can_be_raised_in_a_pickled_search(limit):
    space = space_of("a=range(0,9)")
    points = points_of(RandomPoints(space, 0), space)
    limit(2)
    assert [points.suggest(name) == FINISHED for name in "xyz"] == [False, False, True]
    points = pickle.loads(pickle.dumps(points))
    limit(3)
    assert points.suggest("z")["job"] == 2
    assert points.suggest("z") == FINISHED
    limit(1)
    assert points.suggest("z") == FINISHED


INTERVALS = space_of(LR, "model.dropout=interval(0,0.5)", "n=int(interval(1,8))")
SEARCHES = ["random", "optuna", "bayesopt"]


def search_of(name: str) -> Searcher:
    pytest.importorskip({"bayesopt": "bayes_opt"}.get(name, "ray"))
    return build_search(name, INTERVALS, "acc", "max", seed=0)


def advance(points: Points, first: int, last: int) -> list:
    found = []
    for number in range(first, last):
        found.append(points.suggest(f"t{number}"))
        if number % 5 != 4:
            points.on_trial_complete(f"t{number}", {"acc": -abs(math.log10(found[-1]["optimizer.lr"]) + 3)})
    return found


@pytest.mark.parametrize("name", SEARCHES)
def test_a_saved_search_goes_on_as_if_nothing_had_happened(name, tmp_path):
    default = {"optimizer.lr": 0.003, "model.dropout": 0.0, "n": 4}
    undisturbed = points_of(search_of(name), INTERVALS, default)
    expected = advance(undisturbed, 0, 14)
    points = points_of(search_of(name), INTERVALS, default)
    assert advance(points, 0, 12) == expected[:12], "repeatable"
    points.skipped = 4
    points.save(str(tmp_path / "state"))
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
    resumed = points_of(search_of(name), INTERVALS, default)
    resumed.restore(str(tmp_path / "state"))
    assert advance(resumed, 12, 14) == expected[12:]
    assert resumed.skipped == 4
    assert resumed.results == undisturbed.results
    resumed.on_trial_complete("t4", {"acc": 0.5})  # a trial that ran across the restart


def test_a_grid_that_is_resumed_goes_on(tmp_path):
    space = space_of("a=1,2,3")
    points = points_of(GridPoints(space), space)
    points.suggest("x")
    points.save(str(tmp_path / "state"))
    resumed = points_of(GridPoints(space), space)
    resumed.restore(str(tmp_path / "state"))
    assert resumed.suggest("y") == {"job": 1, "a": 2}
    assert resumed.skipped == 0


@pytest.mark.parametrize("mode", ["max", "min"])
def test_bayesopt_finds_the_power_of_ten(mode):
    """Searched as it is, 0.00001 to 0.1 would have nearly all points above 0.001."""
    pytest.importorskip("bayes_opt")
    search = BayesianPoints(space_of(LR, "n=int(interval(1,4))"), "acc", mode, seed=0)
    sign = 1 if mode == "max" else -1
    tried = []
    for number in range(22):
        point = search.suggest(str(number))
        assert 1e-5 <= point["optimizer.lr"] <= 1e-1
        assert point["n"] in (1, 2, 3, 4)
        assert type(point["n"]) is int
        tried.append(math.log10(point["optimizer.lr"]))
        value = -sign * ((tried[-1] + 4) ** 2 + 0.1 * abs(point["n"] - 2))
        search.on_trial_complete(str(number), {"acc": value}, error=False)
    assert sum(power < -3 for power in tried[:10]) >= 3, "the first are spread over the powers"
    assert sum(abs(power + 4) < 0.5 for power in tried[-8:]) >= 5


def test_bayesopt_goes_on_when_its_first_trials_fail():
    """Ray's wrapper would wait for them for ever."""
    pytest.importorskip("bayes_opt")
    search = BayesianPoints(INTERVALS, "acc", "max", seed=0)
    found = [search.suggest(str(number)) for number in range(10)]
    for number in range(10):
        search.on_trial_complete(str(number), error=True)
    assert not search.optimizer.res, "a trial that failed has no value"
    found += [search.suggest(str(number)) for number in range(10, 13)]
    search.add_evaluated_point({"optimizer.lr": 1e-3, "model.dropout": 0.1, "n": 8}, 0.5)
    found += [search.suggest(f"after {number}") for number in range(3)]
    assert len({tuple(point.values()) for point in found}) == 16
    places = {tuple(round(place, 6) for place in asked.values()) for asked in search.asked.values()}
    assert len(places) == 6, "points that are still computed are not suggested again"


@pytest.mark.parametrize("value", [1, 4, 8])
@pytest.mark.parametrize("tag", ["int(interval(1,8))", "tag(log,int(interval(1,8)))", "interval(1,8)"])
def test_bayesopt_takes_back_the_points_it_makes(value, tag):
    pytest.importorskip("bayes_opt")
    space = space_of(f"n={tag}")
    search = BayesianPoints(space, "acc", "max", seed=0)
    search.add_evaluated_point({"n": value}, 0.5)
    (known,) = search.optimizer.res
    assert 0 <= known["params"]["n"] <= 1
    search.optimizer.suggest = lambda: known["params"]
    search.number = search.FIRST
    assert search.suggest("x")["n"] == pytest.approx(value)
