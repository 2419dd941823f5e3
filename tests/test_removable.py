"""scripts/remove_feature.py, in copies of the project: what is left works and says nothing of the room."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from scripts import remove_feature
from scripts.remove_feature import chosen, files_of, without
from src.engine import features
from src.engine.runs.errors import UserError
from tests import warm
from tests.conftest import WITH_PAGE
from tests.warm import ROOT, command_environment

# What a room brings to the command line: words that --help and --cfg job name with it, and words that are refused without it.
NAMES = {
    "batch_size": ("data.batch_size=auto",),
    "dp": (" dp ",),
    "export": ("src.export",),
    "memory_growth": ("detect_growth",),
    "pipeline": ("pipeline", "model_parallel", "split_at", "micro_batches"),
    "reports": ("src.report", "explain"),
    "sweeps": ("ray_tune", "tune_head"),
}
REFUSED = {
    "batch_size": "data.batch_size=auto",
    "dp": "strategy=dp",
    "memory_growth": "memory.detect_growth=false",
    "pipeline": "strategy=pipeline",
    "reports": "report.explain=true",
    "sweeps": "experiment=tune_head",
}
WITHOUT = ("sweeps", "pipeline")  # which go at once where tests/test_new_project.py makes a project
QUICK = (  # tests that run in each copy: few, since CI does it for every room
    "tests/house/test_limits.py",
    "tests/engine/runs/test_tables.py",
    "tests/readme/test_readme.py",
    "tests/test_rules.py::test_the_threads_of_a_job_are_divided_among_those_that_compute_at_once",
)


def tracked() -> list[str]:
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("without git it is not known which files are the project's")
    done = subprocess.run(["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True, check=True)
    return [name for name in done.stdout.splitlines() if (ROOT / name).is_file()]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for name in tracked():
        (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, tmp_path / "copy" / name)
    return tmp_path / "copy"


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """python words... in a copy, whose own packages come first; a module in a fork, which saves the import of torch."""
    if words[0] == "-m":
        return warm.run(words[1], words[2:], folder, command_environment(), timeout=600)
    environment = command_environment() | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )


def imported(file: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(file.read_text())))
    modules = {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    return modules | {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}


def test_what_is_removed_is_no_longer_named_and_the_rest_works(copy, room):
    removed = run(copy, "scripts/remove_feature.py", "--force", room)
    assert removed.returncode == 0, removed.stderr
    check_without(copy, [room])


def check_without(copy: Path, rooms: Sequence[str], package: str = "src") -> None:
    """In a copy of the project nothing names the rooms, and a training, the linter and some tests work."""
    going = [feature.name for feature in chosen(rooms)]
    for name in going:
        assert not (copy / package / "engine" / name).exists()
        assert not (copy / "tests/engine" / name).exists()
        for file in copy.rglob(f"{package}/**/*.py"):
            assert not [module for module in imported(file) if module.startswith(f"{package}.engine.{name}")], file
    for command in (("ruff", "check", "."), ("ruff", "format", "--check", ".")):
        done = run(copy, "-m", *command)
        assert done.returncode == 0, done.stdout + done.stderr

    train = f"{package}.train"
    text = "".join(run(copy, "-m", train, *words).stdout for words in (["--help"], ["--cfg", "job"]))
    assert "trainer.max_epochs" in text
    for name in going:
        assert not [word for word in NAMES.get(name, ()) if word in text]
        if name in REFUSED:
            refused = run(copy, "-m", train, REFUSED[name])
            assert refused.returncode == 64, refused.stderr
            assert "is not a" in refused.stderr or "is out of range" in refused.stderr
    trained = run(copy, "-m", train, *WITH_PAGE, "name=one", "trainer.max_epochs=1")
    assert trained.returncode == 0, trained.stderr
    assert (copy / "runs/one/model/model.safetensors").exists()
    assert (copy / "runs/one/report.html").exists() is ("reports" not in going)

    left_out = "not test_every_command_of_the_page_works and not upgrade"
    tested = run(copy, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *QUICK, "-k", left_out)
    assert tested.returncode == 0, tested.stdout[-3000:]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "room" in metafunc.fixturenames:
        elsewhere = WITHOUT if (ROOT / "tests/test_new_project.py").exists() else ()
        rooms = [pytest.param(name, marks=pytest.mark.slow) for name in features.names() if name not in elsewhere]
        metafunc.parametrize("room", rooms)


@pytest.mark.slow
def test_without_its_folder_and_its_line_alone_the_rest_works(copy):
    """By hand, of all rooms at once: lines that are marked may stay."""
    for feature in features.FEATURES:
        for path in files_of(feature):
            (copy / path.relative_to(ROOT)).unlink(missing_ok=True)
        shutil.rmtree(copy / "src/engine" / feature.name)
    (copy / "src/features.py").write_text("")
    trained = run(copy, "-m", "src.train", *WITH_PAGE, "name=one", "trainer.max_epochs=1")
    assert trained.returncode == 0, trained.stderr
    measured = run(copy, "-m", "src.evaluate", "run=runs/one")
    assert measured.returncode == 0, measured.stderr
    assert "strategy=dp is not a choice" in run(copy, "-m", "src.train", "strategy=dp").stderr


def test_a_room_goes_with_those_that_need_it():
    if {"reports", "sweep_reports"} <= {*features.names()}:
        assert [feature.name for feature in chosen(["reports"])] == ["reports", "sweep_reports"]
    for name in features.names():
        assert name in [feature.name for feature in chosen([name])]


@pytest.mark.skipif(not features.names(), reason="all rooms are gone")
def test_a_room_that_does_not_exist_is_answered_with_the_nearest():
    with pytest.raises(UserError) as caught:
        chosen([features.names()[0] + "x"])
    assert f"did you mean {features.names()[0]}?" in caught.value.found
    with pytest.raises(UserError, match="is not a room of this project"):
        chosen(["kitchen"])


def test_changes_that_are_not_committed_are_not_mixed_with_what_goes(tmp_path, monkeypatch):
    monkeypatch.setattr(remove_feature, "ROOT", tmp_path)
    with pytest.raises(UserError, match="this is no git repository"):
        remove_feature.check_git(force=False)
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True, env=os.environ | {"GIT_CONFIG_GLOBAL": os.devnull})
    remove_feature.check_git(force=False)
    (tmp_path / "new.py").touch()
    with pytest.raises(UserError, match="changes that are not committed"):
        remove_feature.check_git(force=False)
    remove_feature.check_git(force=True)


PAGE = """# Page
- **One** is here.
  It has a second line.
- **Two** goes. <!-- room: attic -->
  With its second line.
- **Three** stays,
  but not all of it. <!-- room: attic -->
  This does.

## The attic <!-- room: attic -->

```bash
# no heading
```

### Deeper

## Next
| a | b <!-- room: attic --> |
| c | d <!-- room: cellar --> |
"""


def test_a_marked_line_goes_with_what_belongs_to_it():
    left = without(PAGE, ["attic"], is_markdown=True)
    assert (
        left
        == """# Page
- **One** is here.
  It has a second line.
- **Three** stays,
  This does.

## Next
| c | d <!-- room: cellar --> |
"""
    )
    code = "one = 1\nif two:  # room: attic\n    three = 3\n"
    assert without(code, ["attic"], is_markdown=False) == "one = 1\n    three = 3\n"
