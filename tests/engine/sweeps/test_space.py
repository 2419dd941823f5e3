"""Hydra's override grammar as a search space: the values that are tried are the ones that the user's text names."""

from __future__ import annotations

import json
import shlex

import numpy as np
import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from ray.tune.search.sample import Categorical, Integer

from src.engine.commands.hydra_words import for_hydra
from src.engine.runs.errors import UserError
from src.engine.sweeps import settings
from src.engine.sweeps.results import single_run_command
from src.engine.sweeps.space import Space, default_point, read_space
from src.engine.sweeps.sweep_journal import TrialRecord
from tests.conftest import ROOT


@pytest.fixture
def hydra():
    """Hydra as a sweep has it."""
    settings.register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        yield GlobalHydra.instance()


def space_of(*arguments: str, **params) -> Space:
    """Without config groups."""
    return read_space(arguments, params, None)


def one_of(argument: str):
    return next(iter(space_of(argument).parameters.values()))


def drawn(argument: str, times: int = 400) -> set:
    state = np.random.RandomState(0)
    return {one_of(argument).domain.sample(random_state=state) for _ in range(times)}


def check_refused(words, *culprits: str):
    """The words of a sweep are refused, all culprits are named, and what is suggested instead is a sweep that composes."""
    with pytest.raises(UserError) as caught:
        space_of(*words)
    check_sweep_error(caught.value, *culprits)


def check_sweep_error(error: UserError, *culprits: str):
    text = error.render()
    assert len(text.splitlines()) <= 15, text
    assert all(culprit in text for culprit in culprits), text
    commands = [fix for fix in error.fix if fix.startswith("python -m src.train -m hydra/sweeper=ray_tune")]
    assert commands, text
    for fix in commands:
        check_sweep_command(fix)


def check_sweep_command(command: str):
    """The settings of the sweep compose, and so does the first trial."""
    settings.register()
    words = shlex.split(command)[4:]
    own = [word for word in words if word.startswith("hydra")]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        compose("train", overrides=own, return_hydra_config=True)
        space = read_space([word for word in words if word not in own], {}, GlobalHydra.instance().config_loader())
        state = np.random.RandomState(0)
        point = {name: domain.sample(random_state=state) for name, domain in space.domains.items()}
        compose("train", overrides=space.overrides(point))


@pytest.mark.parametrize(
    ("argument", "values"),
    [
        ("a=linear,mlp", ("linear", "mlp")),
        ("a=1,2.5,null,true,x", (1, 2.5, None, True, "x")),
        ("a=choice(1,x)", (1, "x")),
        ("a='x y','c,d'", ("x y", "c,d")),
        ("a=range(1,4)", (1, 2, 3)),
        ("a=range(0,6,2)", (0, 2, 4)),
        ("a=range(1,8,3)", (1, 4, 7)),
        ("a=range(5,0,-2)", (5, 3, 1)),
        ("a=range(0,1,0.25)", (0.0, 0.25, 0.5, 0.75)),
        ("a=sort(3,1,2)", (1, 2, 3)),
        ("a=1,1,2", (1, 2)),
    ],
)
def test_discrete_values_are_typed_in_order_and_the_only_ones_that_are_drawn(argument, values):
    parameter = one_of(argument)
    assert parameter.values == values
    assert [type(value) for value in parameter.values] == [type(value) for value in values]
    assert drawn(argument) == set(values)
    assert all(parameter.contains(value) for value in values)
    assert not parameter.contains(99)
    assert space_of(argument).size() == len(values)


@pytest.mark.parametrize(("argument", "step"), [("a=range(3,9)", 1), ("a=range(4,17,4)", 4), ("a=range(9,2,-1)", 1)])
def test_whole_numbers_of_a_range_keep_their_order(argument, step):
    """A search that knows an order learns from neighbours; Optuna's translation has exactly the same values."""
    optuna_search = pytest.importorskip("ray.tune.search.optuna")
    parameter = one_of(argument)
    assert isinstance(parameter.domain, Integer)
    translated = optuna_search.OptunaSearch.convert_search_space({"a": parameter.domain})["a"]
    values = sorted(parameter.values)
    assert (translated.low, translated.high, translated.step) == (values[0], values[-1], step)


def test_a_range_that_tune_cannot_count_is_a_choice():
    assert isinstance(one_of("a=range(1,8,3)").domain, Categorical)


def test_an_interval_is_continuous_and_whole_only_when_it_says_so():
    fractions = drawn("a=interval(0,3)")
    assert len(fractions) == 400
    assert all(0 <= value <= 3 for value in fractions)
    assert drawn("a=int(interval(0,3))") == {0, 1, 2, 3}, "both ends are included"
    assert drawn("a=tag(log,int(interval(1,4)))") == {1, 2, 3, 4}
    assert space_of("a=int(interval(0,3))", "b=1,2").size() == 8
    assert space_of("a=interval(0,3)", "b=1,2").size() is None
    assert not one_of("a=int(interval(0,3))").contains(4)
    assert not one_of("a=int(interval(0,3))").contains(1.5)
    assert one_of("a=interval(0,3)").contains(3)
    assert not one_of("a=interval(0,3)").contains(None)


def test_a_logarithmic_interval_gives_every_power_of_ten_its_share():
    values = drawn("a=tag(log,interval(1e-5,1e-1))")
    assert one_of("a=tag(log,interval(1e-5,1e-1))").log
    for power in range(-5, -1):
        assert 60 < sum(10**power <= value < 10 ** (power + 1) for value in values) < 140


@pytest.mark.parametrize(
    "value",
    [
        *(
            1,
            -2.5,
            1e-05,
            1e16,
            True,
            None,
            "linear",
            "timm/vit_tiny",
            "x y",
            "a,b",
            "[0]",
            "{a}",
            "a=b",
            "null",
            "True",
        ),
        *("1e-3", "it's", 'a"b', "back\\slash", "back\\", "", "nan", "${seed}", "-1", "a:b", "(x)", np.float64(0.1)),
        *(np.int64(3),),
    ],
)
def test_hydra_reads_back_the_value_that_an_override_has(value):
    override = one_of("optimizer.lr=interval(0,1)").override(value)
    assert override.startswith("optimizer.lr=")
    parsed = OverridesParser.create().parse_override(override)
    assert not parsed.is_sweep_override()
    assert parsed.value() == value
    assert type(parsed.value()) is type(value.item() if isinstance(value, np.generic) else value)


def test_lists_and_mappings_are_values_too():
    parameter = one_of("freeze.phases={0:[head]},{0:[head],3:['all x']}")
    parsed = [OverridesParser.create().parse_override(parameter.override(value)) for value in parameter.values]
    assert [one.value() for one in parsed] == [{0: ["head"]}, {0: ["head"], 3: ["all x"]}]
    assert parameter.override(parameter.values[0]) == "freeze.phases={0:[head]}"


def test_names_are_harmless_and_keys_are_as_typed():
    space = space_of("+new.key=1,2", "model/head@model.head=a,b", "~gone", "seed=7", "x=1,2")
    assert list(space.parameters) == ["new.key", "model-head-at-model.head", "x"]
    assert space.fixed == ["~gone", "seed=7"]
    point = {"job": 3, "x": np.int64(2), "new.key": 1}
    assert space.overrides(point) == ["~gone", "seed=7", "+new.key=1", "x=2"]
    assert space.params(point) == {"new.key": 1, "x": 2}
    assert type(space.params(point)["x"]) is int


def test_the_command_line_replaces_what_a_recipe_sweeps():
    params = {
        "optimizer.lr": "tag(log, interval(1e-4, 1e-1))",
        "model.head": ["linear", "a,b", None],
        "seed": 5,
        "model.dropout": "0,0.5",
        "trainer.max_epochs": "range(1,3)",
    }
    space = read_space(["model.dropout=0.25", "+trainer.max_epochs=7,8", "x=1,2"], params, None)
    assert list(space.parameters) == ["optimizer.lr", "model.head", "trainer.max_epochs", "x"]
    assert space.parameters["optimizer.lr"].log
    assert space.parameters["model.head"].values == ("linear", "a,b", None)
    assert space.parameters["trainer.max_epochs"].values == (7, 8)
    assert space.fixed == ["seed=5", "model.dropout=0.25"]


def test_glob_lists_the_options_of_a_group(hydra):
    space = read_space(["optimizer=glob(*)", "precision=glob(*,exclude=[bf*,auto])"], {}, hydra.config_loader())
    assert space.parameters["optimizer"].values == ("adamw", "sgd")
    assert space.parameters["precision"].values == ("fp16", "fp32")


def test_the_default_point_is_what_the_config_has(hydra):
    words = ["optimizer=adamw,sgd", "optimizer.lr=interval(0,1)", "model.head=linear,mlp", "+new.key=1,2"]
    words += [
        "data.background=[0,0,0],[1,1,1]",
        "trainer.max_time=null,'00:01:00:00'",
        "optimizer.momentum=interval(0,1)",
    ]
    space = read_space(words, {}, hydra.config_loader())
    composed = compose("train", overrides=["optimizer=sgd"], return_hydra_config=True)
    point = default_point(space, composed)
    assert point == {
        "optimizer": "sgd",
        "optimizer.lr": 0.05,
        "model.head": "linear",
        "data.background": "[255,255,255]",
        "trainer.max_time": None,
        "optimizer.momentum": 0.9,
    }
    again = compose("train", overrides=space.overrides(point), return_hydra_config=True)
    composed.hydra = again.hydra = None
    assert again == composed
    assert not space.contains(point)
    assert space.contains(point | {"new.key": 1, "data.background": space.parameters["data.background"].values[0]})


def test_a_dry_run_reads_well():
    space = space_of(
        "optimizer.lr=tag(log,interval(1e-5,1e-1))",
        "model.head=linear,mlp",
        "seed=int(interval(0,3))",
        "x=range(0,100)",
    )
    assert space.describe() == [
        "optimizer.lr   1e-05 to 0.1, logarithmic",
        "model.head     linear, mlp",
        "seed           0 to 3, whole numbers",
        "x              0, 1, 2, 3, ..., 99 (100 values)",
    ]


def test_what_cannot_be_searched_is_refused_with_a_sweep_that_can():
    check_refused(["seed=3"], "nothing is swept", "seed=3")
    check_refused([], "nothing is swept")
    check_refused(["optimizer.lr=interval(0.1,0.01)"], "optimizer.lr=interval(0.1,0.01)", "0.01,0.1")
    check_refused(["optimizer.lr=interval(1,1)"], "the smaller one first")
    check_refused(["optimizer.lr=interval(1,inf)"], "finite")
    check_refused(["optimizer.lr=tag(log,interval(0,0.1))"], "begins above 0", "logarithm of 0")
    check_refused(["optimizer.lr=tag(lin,interval(0,0.1))"], "tag(lin, ...)")
    check_refused(["optimizer.lr=tag(log,choice(1,2))"], "tag(log, ...)")
    check_refused(["seed=range(3,3)"], "seed=range(3,3) has no values")
    check_refused(["seed=1,2", "x=1,2", "seed=3,4"], "seed is given twice")
    check_refused(["seed=1,2", "+seed=3"], "seed is given twice")
    assert space_of("seed=1", "seed=2", "x=1,2").fixed == ["seed=1", "seed=2"], "Hydra takes the last, as ever"


WORDS = [
    *(
        "+x=[1,2],[3,4]",
        "+x=[],{}",
        "+x=[1,2],'[1,2]'",
        "+x={a:[b,'c d']},{}",
        "freeze.phases={0:[head]},{0:[head],2:[all]}",
    ),
    *("data.background=[0,0,0],[1,1,1]", "trainer.devices=[0],[1]", "model=transfer,vgg19_append", "+experiment=a,b"),
    *(
        "+x=null,'null',true,'true',1,'1 '",
        "+x=1e-3,-5,-0.5,1_000,inf",
        "+x='it\\'s',\"a,b\",'',' a','#c','ä ö','\\\\'",
    ),
    *("+x=a b,c:d,e@f", "model.weights='/with blank','/with=sign,comma','/$HOME'", "model.head='linear',mlp"),
]


@pytest.mark.parametrize("word", WORDS)
def test_every_value_goes_through_the_journal_and_the_printed_command(word):
    space = read_space(for_hydra([word], multirun=True), {}, None)
    (parameter,) = space.parameters.values()
    assert len(parameter.values) > 1
    for value in parameter.values:
        point = {parameter.name: value}
        stored = json.loads(json.dumps([space.overrides(point), space.params(point)]))
        read = space.point(stored[0])
        assert repr(read) == repr(point)
        assert space.overrides(read) == stored[0]
        assert yaml.safe_load(yaml.safe_dump(space.params(point))) == space.params(point) == stored[1]
        command = single_run_command(TrialRecord(0, "runs/s/0", stored[1], stored[0]), "s")
        typed = for_hydra(shlex.split(command)[3:], multirun=False)[0]
        assert typed == stored[0][0], "what is pasted into a shell is what the trial was"


def test_equal_numbers_are_one_point_and_a_bool_is_another():
    parameter = one_of("a=0,0.0,1,1.0,1e-3,0.001,true,True,'1'")
    assert list(parameter.values) == [0, 1, 0.001, True, "1"]
    assert one_of("a=0,0.5").override(0.0) == "a=0", "the default is not tried twice"
    assert one_of("a=0,0.5").contains(0.0)
    assert not one_of("a=1,2").contains(True)
    assert one_of("a=int(interval(1,3))").override(2.0) == "a=2"
    space = space_of("a=1,2")
    assert space.params({"a": 1.0}) == {"a": 1}
    assert type(space.point(["a=1.0"])["a"]) is int
