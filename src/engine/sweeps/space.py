"""The search space of a sweep, read from Hydra's override grammar by `read_space`.

    model.head=linear,mlp   choice(linear,mlp)   glob(*)    one of these; glob is for config groups
    seed=range(0,6,2)                                       0, 2 or 4: the end is left out
    model.dropout=interval(0,0.5)                           any number between the two
    freeze.last_n=int(interval(1,12))                       any whole number between the two, both ends included
    optimizer.lr=tag(log,interval(1e-5,1e-1))               every power of ten is as likely as the next
    trainer.max_epochs=5                                    the same in all trials

Hydra itself makes an interval's ends floats, so whole numbers need int(); hydra-optuna-sweeper has the same rule.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, Quote, QuotedString, Sweep, Transformer
from omegaconf import DictConfig, ListConfig, OmegaConf
from ray import tune
from ray.tune.search.sample import Domain, Integer

from src.engine.commands.user_command import key_of
from src.engine.runs.errors import UserError
from src.engine.sweeps.settings import SPACE, sweep_command

PLAIN = re.compile(r"(?!(null|true|false|nan|inf)$)[a-z_][a-z0-9_./-]*", re.ASCII | re.IGNORECASE)  # needs no quotes


class Written(str):
    """A list or a mapping in Hydra's grammar, such as '{0:[head]}': no quotes are put around it. Files get plain text."""


def plain(value: Any) -> Any:
    """A plain Python value: numpy's scalars, which searches return, and nested configs are converted."""
    if isinstance(value, ListConfig | DictConfig):
        return Written(written(OmegaConf.to_container(value, resolve=True)))
    return value.item() if isinstance(value, np.generic) else value


def identity_of(value: Any) -> int | float | str:
    """Equal for 1 and 1.0, which are one point; 1, true and '1' are three."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if is_number else written(value)


def written(value: Any) -> str:
    """A value as Hydra's grammar reads it back."""
    value = plain(value)
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Written | int | float):
        return str(value)
    if isinstance(value, str):
        return value if PLAIN.fullmatch(value) else QuotedString(value, Quote.single).with_quotes()
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{written(key)}:{written(inner)}" for key, inner in value.items()) + "}"
    return "[" + ",".join(map(written, value)) + "]"


@dataclass(frozen=True)
class Parameter:
    """A setting that differs between trials."""

    key: str  # as typed: optimizer.lr, +new.key, model (a config group)
    name: str  # the key as Tune and tables have it: without "+", "/" (nesting to Tune) and "@"
    domain: Domain
    values: tuple[Any, ...] | None  # int, float, bool, str, None, Written, in their order; None: an interval
    log: bool = False

    @property
    def whole(self) -> bool:
        """An interval of whole numbers; domain.upper is then one more than the last."""
        return self.values is None and isinstance(self.domain, Integer)

    @property
    def ends(self) -> tuple[float, float]:
        """The smallest and the largest value of an interval."""
        return self.domain.lower, self.domain.upper - 1 if self.whole else self.domain.upper

    @cached_property
    def _by_identity(self) -> dict[int | float | str, Any]:
        return {identity_of(value): value for value in self.values or ()}

    def spelled(self, value: Any) -> Any:
        """The equal value of the space: 0 where the space has 0 and the config, or a search, has 0.0."""
        if self.whole and isinstance(value, float) and value.is_integer():
            return int(value)
        return self._by_identity.get(identity_of(value), value)

    def override(self, value: Any) -> str:
        """'optimizer.lr=0.001': Hydra reads the same value back."""
        return f"{self.key}={written(self.spelled(value))}"

    def read(self, text: str) -> Any:
        """The value that `override` wrote behind the =."""
        if text.startswith(("[", "{")):
            return self.spelled(Written(text))
        return self.spelled(_element(OverridesParser.create().parse_override(f"{self.key}={text}").value()))

    def contains(self, value: Any) -> bool:
        """Whether the value is one of those that are searched."""
        if self.values is not None:
            return identity_of(value) in self._by_identity
        if isinstance(value, bool) or not isinstance(value, int if self.whole else int | float):
            return False
        return self.ends[0] <= value <= self.ends[1]

    def describe(self) -> str:
        """'1e-05 to 0.1, logarithmic' or 'linear, mlp'."""
        if self.values is None:
            low, high = self.ends
            kinds = (", whole numbers" if self.whole else "") + (", logarithmic" if self.log else "")
            return f"{low:.12g} to {high:.12g}{kinds}"
        texts = [written(value) for value in self.values]
        if len(texts) <= 8:
            return ", ".join(texts)
        return ", ".join([*texts[:4], "...", texts[-1]]) + f" ({len(texts)} values)"

    def identity(self) -> list[str] | str:
        """For sweep.json: a list of values may grow from one start to the next, an interval has to stay."""
        return self.describe() if self.values is None else [written(value) for value in self.values]


@dataclass(frozen=True)
class Space:
    """All that differs between the trials of a sweep. A point is a value for each parameter, by name."""

    parameters: dict[str, Parameter]  # by name, in the order in which they were given
    fixed: list[str]  # overrides that are the same in all trials, as typed

    @property
    def domains(self) -> dict[str, Domain]:
        return {name: parameter.domain for name, parameter in self.parameters.items()}

    def overrides(self, point: Mapping[str, Any]) -> list[str]:
        """The command line of a trial. A parameter that the point lacks is left as the config has it."""
        return self.fixed + [one.override(point[name]) for name, one in self.parameters.items() if name in point]

    def params(self, point: Mapping[str, Any]) -> dict[str, Any]:
        """The point for tables and files: key without its "+" -> plain value, a list or a mapping as plain text."""
        given = {
            one.key.lstrip("+"): one.spelled(point[name]) for name, one in self.parameters.items() if name in point
        }
        return {key: str(value) if isinstance(value, Written) else plain(value) for key, value in given.items()}

    def point(self, overrides: Sequence[str]) -> dict[str, Any]:
        """The point of a trial from its command line, as `overrides` made it."""
        typed = dict(word.partition("=")[::2] for word in overrides)
        return {name: one.read(typed[one.key]) for name, one in self.parameters.items() if one.key in typed}

    def contains(self, point: Mapping[str, Any]) -> bool:
        """Whether the point has every parameter, each with a value that is searched."""
        return all(name in point and one.contains(point[name]) for name, one in self.parameters.items())

    def size(self) -> int | None:
        """How many different points there are; None where a parameter is continuous."""
        parameters = self.parameters.values()
        if any(one.values is None and not one.whole for one in parameters):
            return None
        return math.prod(
            one.domain.upper - one.domain.lower if one.values is None else len(one.values) for one in parameters
        )

    def describe(self) -> list[str]:
        """A line per parameter, aligned, for people."""
        width = max(len(parameter.key) for parameter in self.parameters.values())
        return [f"{parameter.key:<{width}}   {parameter.describe()}" for parameter in self.parameters.values()]


def read_space(arguments: Sequence[str], params: Mapping[str, Any], config_loader: ConfigLoader) -> Space:
    """The space of the command line's `arguments` and of hydra.sweeper.params, where a key may be text or a plain list.

    An argument replaces the entry of the same key. config_loader: tells glob() what a group has. Raises UserError for a
    space that cannot be searched, and Hydra's own errors for what it cannot read.
    """
    parser = OverridesParser.create(config_loader=config_loader)
    typed = parser.parse_overrides(list(arguments))
    times = Counter(key_of(override.get_key_element()) for override in typed)
    listed = parser.parse_overrides([_as_argument(key, value) for key, value in params.items()])
    parameters, fixed = {}, []
    for override in [one for one in listed if key_of(one.get_key_element()) not in times] + typed:
        if not override.is_sweep_override():
            fixed.append(override.input_line)
            continue
        if times[key_of(override.get_key_element())] > 1:
            raise UserError(
                f"{key_of(override.get_key_element())} is given twice",
                where=override.input_line,
                why="a setting that is swept can be said only once, or one of the two would be ignored",
                fix=sweep_command(override.input_line),
            )
        parameter = _parameter(override)
        parameters[parameter.name] = parameter
    if not parameters:
        raise UserError(
            "nothing is swept",
            where=" ".join(fixed) or "the command line",
            why="a search needs at least one setting with several values, here or in hydra.sweeper.params",
            fix=[sweep_command(SPACE), sweep_command("optimizer.lr=1e-4,1e-3,1e-2", "hydra.sweeper.search=grid")],
        )
    return Space(parameters, fixed)


def default_point(space: Space, composed: DictConfig) -> dict[str, Any]:
    """The values that the config without the sweep has for the swept keys; those that it lacks (+new.key) are left out."""
    point, absent = {}, object()
    choices = composed.hydra.runtime.choices  # of config groups
    for name, parameter in space.parameters.items():
        key = parameter.key.lstrip("+")
        value = choices[key] if key in choices else OmegaConf.select(composed, key, default=absent)
        if value is not absent:
            point[name] = parameter.spelled(plain(value))
    return point


def _as_argument(key: str, value: Any) -> str:
    """An entry of hydra.sweeper.params as it would be typed."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"{key}={','.join(map(written, value))}"
    return f"{key}={value if isinstance(value, str) else written(value)}"


def _parameter(override: Override) -> Parameter:
    key = override.get_key_element()
    name = key.lstrip("+").replace("/", "-").replace("@", "-at-")
    sweep = override.value()
    interval = isinstance(sweep, IntervalSweep)
    if isinstance(sweep, Sweep) and (unknown := sweep.tags - ({"log"} if interval else set())):
        raise UserError(
            f"tag({', '.join(sorted(unknown))}, ...) has no meaning here",
            where=override.input_line,
            why="the only tag is log, and it is for an interval",
            fix=sweep_command(f"{key}=tag(log,interval(0.001,0.1))"),
        )
    if interval:
        return Parameter(key, name, _interval_domain(override, sweep), None, "log" in sweep.tags)
    elements = override.sweep_iterator(transformer=_element)
    values = tuple({identity_of(value): value for value in elements}.values())  # each once
    if not values:
        raise UserError(
            f"{override.input_line} has no values",
            where=key,
            why="a range ends before its end, and a glob is for the options of a config group",
            fix=sweep_command(f"{key}=1,2" if key == "seed" else "optimizer.lr=1e-4,1e-3,1e-2", remove=[key]),
        )
    return Parameter(key, name, _discrete_domain(values, override.is_range_sweep()), values)


def _element(value: Any) -> Any:
    """One of the values of a choice, as the parser has it."""
    if isinstance(value, QuotedString):
        return value.text
    return Written(Transformer.str(value)) if isinstance(value, list | dict) else value


def _interval_domain(override: Override, sweep: IntervalSweep) -> Domain:
    low, high, log, key = sweep.start, sweep.end, "log" in sweep.tags, override.get_key_element()
    linear = f"interval({low:g},{high:g})"
    if not (low < high and math.isfinite(high - low)):
        first, last = sorted((low, high)) if math.isfinite(high - low) and low != high else (0, 1)
        raise UserError(
            f"{override.input_line}: an interval needs two numbers, the smaller one first",
            where=key,
            why=f"there is nothing between {low:g} and {high:g}" if low >= high else "both have to be finite",
            fix=sweep_command(f"{key}=interval({first:g},{last:g})"),
        )
    if log and low <= 0:
        raise UserError(
            f"{override.input_line}: a logarithmic interval begins above 0",
            where=key,
            why=f"there is no logarithm of {low:g}",
            fix=[sweep_command(f"{key}={linear}"), sweep_command(f"{key}=tag(log,interval(1e-5,1e-1))")],
        )
    if isinstance(low, int):  # Tune leaves the end of whole numbers out
        return (tune.lograndint if log else tune.randint)(low, high + 1)
    return (tune.loguniform if log else tune.uniform)(low, high)


def _discrete_domain(values: tuple[Any, ...], is_range: bool) -> Domain:
    """Whole numbers of a range keep their order where Tune has a domain of exactly these; a search learns more from it."""
    if not is_range or not all(isinstance(value, int) for value in values) or len(values) < 2:
        return tune.choice(values)
    low, second, *_ = ordered = sorted(values)
    step = second - low
    if step == 1:
        return tune.randint(low, ordered[-1] + 1)
    # tune.qrandint samples multiples of the step, upper bound included
    return tune.qrandint(low, ordered[-1], step) if low % step == 0 else tune.choice(values)
