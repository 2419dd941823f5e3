"""Shared by all tests: the real commands as a user types them, small folders of images, and the quick tier."""

from __future__ import annotations

import os
import shlex
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from PIL import Image

from src import rules  # noqa: F401 (registers the settings)
from src.engine import features
from src.engine.commands.hydra_words import for_hydra
from src.engine.runs.cores import cpu_cores
from src.engine.runs.errors import ExitCode, UserError
from tests import warm
from tests.warm import ROOT, command_environment

# A run that takes seconds: synthetic images, a small network with random weights.
SMALL = (
    "data=synthetic",
    "data.num_images=60",
    "data.batch_size=16",
    "model.backbone=shufflenet_v2_x0_5",  # a checkpoint of 3 MB; a ResNet18's has 130
    "model.weights=none",
    "trainer.max_epochs=2",
    "trainer.threads=1",
    "logger=csv",
    *(["report.page=false"] if "reports" in features.names() else []),  # which takes a third of so short a run's time
    "baseline=none",
)
WITH_PAGE = tuple(word for word in SMALL if word != "report.page=false")


LINES = [line for line in (ROOT / "tests/slow.txt").read_text().splitlines() if not line.startswith("#")]
# Name -> '', or which of its cases stay in the quick tier: '5' of 'every 5'.
SLOW = dict(line.partition(" but every ")[::2] for line in LINES)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="all tests, not the quick tier alone")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One process more than cores, since many tests wait: for a time limit, for another process, for the disk."""
    return cpu_cores() + 1


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out tests that need a room which was removed. Marks what tests/slow.txt names as slow. `pytest` without paths or
    -m runs the others: the quick tier."""
    rooms = set(features.names())
    without_room = [item for item in items if not {*_rooms_needed(item)} <= rooms]
    config.hook.pytest_deselected(items=without_room)
    items[:] = [item for item in items if item not in without_room]
    cases: Counter[str] = Counter()
    for item in items:
        name = item.nodeid.partition("[")[0]
        every = [SLOW[known] for known in (item.nodeid, name, name.partition("::")[0]) if known in SLOW]
        if every and (not every[0] or cases[name] % int(every[0])):
            item.add_marker(pytest.mark.slow)
        cases[name] += 1
    named = config.args_source is pytest.Config.ArgsSource.ARGS
    if not (named or config.option.all or config.option.markexpr):
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if not item.get_closest_marker("slow")]


def _rooms_needed(item: pytest.Item) -> Iterator[str]:
    for mark in item.iter_markers("needs"):
        yield from mark.args


@dataclass
class Done:
    """Exit code and output of a command."""

    code: int
    out: str
    err: str

    @property
    def text(self) -> str:
        return self.out + self.err


@pytest.fixture(autouse=True)
def variables() -> Iterator[None]:
    """Restores the environment variables after each test."""
    before = dict(os.environ)
    yield
    if os.environ != before:
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs `python -m src.NAME words...` in a new folder, as a user would: command('train', 'seed=1') -> Done.

    cold: in a fresh process, see tests/warm.py. environment: further variables.
    """
    monkeypatch.chdir(tmp_path)

    def run(name: str, *words: str, timeout: float = 300, cold: bool = False, **environment: str) -> Done:
        variables = command_environment() | environment
        done = warm.run(f"src.{name}", words, tmp_path, variables, timeout, cold)
        return Done(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def float64(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The test's networks, losses and metrics compute in float64: see tests/tolerance.py."""
    import torch

    torch.set_default_dtype(torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # losses take half precision to float32
    yield
    torch.set_default_dtype(torch.float32)


def of_room(room: str, *values: object):
    """A case of a parametrized test that needs an optional room."""
    return pytest.param(*values, marks=pytest.mark.needs(room))


def check_error(done: Done, code: int, *culprits: str) -> None:
    """A user's mistake gets this exit code and at most 15 lines that name the culprits; suggested commands parse."""
    assert done.code == code, done.text
    lines = done.err.strip().splitlines()
    assert lines, "nothing was printed"
    assert lines[0].startswith("ERROR"), done.err
    assert len(lines) <= 15, done.err
    for culprit in culprits:
        assert culprit in done.err, f"{culprit!r} is not named in:\n{done.err}"
    trace = next(line.split(maxsplit=1)[1] for line in lines if line.startswith("trace"))
    assert "Traceback" in Path(trace).read_text() or "UserError" in Path(trace).read_text()
    for line in lines:
        if line.startswith(("fix ", "or ")) and "python -m src.train" in line:
            words = shlex.split(line.partition("python -m src.train")[2], comments=True)
            assert parses(words), f"the suggested command does not parse: {line}"


def parses(words: list[str]) -> bool:
    """Whether Hydra composes a config from the words and the schema accepts it."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from src.engine.commands import config_checks

    OmegaConf.register_new_resolver("sweep_name", lambda name, _: name or "sweep", replace=True)
    features.register()
    words = for_hydra(words, multirun="-m" in words)
    if "-m" in words:
        words = [_as_one_run(word) for word in words]
    words = [word for word in words if word not in ("-m", "--help")]
    if "--cfg" in words:
        return True
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        composed = compose("train", overrides=words)
    try:
        config_checks.read(composed)
    except UserError as error:  # the suggestion may hold a path that does not exist, or leave another mistake
        return error.code == ExitCode.NO_INPUT or error.found.endswith("is missing")
    return True


def _as_one_run(word: str) -> str:
    """A sweep's override with its first value only."""
    if word.startswith("-"):
        return word
    override = OverridesParser.create().parse_override(word)
    if not override.is_sweep_override():
        return word
    values = override.sweep_string_iterator() if override.is_discrete_sweep() else iter([str(override.value().start)])
    return f"{override.get_key_element()}={next(values)}"


def write_images(root: Path, classes: dict[str, int], size: int = 40, seed: int = 0) -> Path:
    """A folder per class with this many PNG files: noise on the class's colour."""
    for number, (name, count) in enumerate(classes.items()):
        (root / name).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            rng = np.random.default_rng([seed, number, index])
            pixels = rng.integers(0, 80, (size, size + 8, 3))
            pixels[..., number % 3] += 40 + 130 * (number % 2 == 0)
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{index:03d}.png")
    return root
