"""scripts/new_project.py: what it refuses, what it makes, and that a project of another name takes a newer engine."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from scripts import new_project
from src.engine.runs.errors import UserError
from tests.conftest import ROOT, of_room
from tests.test_removable import WITHOUT, check_without, run, tracked

PAGE = (ROOT / "docs/rename.md").read_text()
COMMAND = shlex.split(re.search(r"python (scripts/new_project.py .*)", PAGE)[1])


def git(folder: Path, *words: str) -> str:
    return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True).stdout


def make(folder: Path) -> Path:
    """What the page's command makes, where git does not know who commits."""
    tracked()  # skips where there is no git
    words = [str(folder) if word == "../pets" else word for word in COMMAND]
    assert words[1:] == ["pets", str(folder), "--without", ",".join(WITHOUT)]
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("GIT_CONFIG_GLOBAL", os.devnull)
        patched.setenv("EMAIL", "")
        done = run(ROOT, *words)
    assert done.returncode == 0, done.stderr
    assert f"cd {folder} && " in done.stdout
    return folder


ROOMS = pytest.mark.needs(*WITHOUT)


@pytest.fixture(scope="module")
def pets(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("new") / "pets")


@pytest.mark.parametrize(
    ("words", "found", "fix"),
    [
        ("Pet-Photos x", "cannot be the name of a package", "pet_photos x"),
        ("3d x --without dp", "cannot be the name of a package", "my_3d x --without dp"),
        ("torch x", "torch is taken", "my_torch x"),
        ("Class x", "cannot be", "my_class x"),
        ("test x", "test is taken", "my_test x"),
        ("pytest x", "pytest is taken", "my_pytest x"),
        ("models x", "models is taken", "my_models x"),
        ("data x", "data is taken", "my_data x"),
        ("pets FULL", "is not an empty folder", "pets FULL-2"),
        (f"pets {ROOT / 'pets'} --without dp", "lies in this clone", "pets ../pets --without dp"),
        of_room("sweeps", "pets x --without sweps,dp", "sweps is not a room", "pets x --without sweeps,dp"),
    ],
)
def test_what_cannot_be_is_refused_with_the_command_corrected(words, found, fix, tmp_path, monkeypatch):
    (tmp_path / "FULL").mkdir()
    (tmp_path / "FULL/file").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["scripts/new_project.py", *words.split()])
    with pytest.raises(UserError) as caught:
        new_project.work()
    assert found in caught.value.found
    assert caught.value.fix == [f"python scripts/new_project.py {fix}"]
    assert [path.name for path in tmp_path.rglob("*")] == ["FULL", "file"]


@ROOMS
def test_a_name_that_a_project_of_the_script_has_can_be_taken_again(pets, monkeypatch):
    """For an upgrade, in the environment where the project is installed."""
    monkeypatch.syspath_prepend(pets)
    assert new_project._owner("pets") == ""


@ROOMS
def test_the_project_has_its_name_everywhere_and_nothing_of_the_template(pets):
    assert git(pets, "log", "--format=%an %s") == "pets pets, made from the template\n"
    assert git(pets, "status", "--porcelain", "--ignored") == ""
    texts = {name: (pets / name).read_text() for name in git(pets, "ls-files").split() if not name.endswith(".png")}
    assert [name for name, text in texts.items() if re.search(r"\bsrc\b(?!=)|room: template", text)] == []
    assert not [name for name in new_project.ONLY_HERE if (pets / name).exists()]
    assert len(texts["README.md"].splitlines()) < 65
    assert "A run's folder" in texts["docs/manual.md"]
    assert "manual.md" in texts["pets/run.py"]
    assert "--without sweeps,pipeline" in texts["CHANGELOG.md"]
    assert 'name = "pets"' in texts["pyproject.toml"]


@ROOMS
@pytest.mark.slow
def test_the_project_works_without_the_rooms_and_takes_a_newer_engine(pets):
    check_without(pets, WITHOUT, "pets")

    newer = make(pets.parent / "newer")
    with (newer / "pets/engine/__init__.py").open("a") as file:
        file.write("\nNEWER = True\n")
    (newer / "tests/engine/test_own.py").unlink()
    git(newer, "-c", "user.name=x", "-c", "user.email=x", "commit", "-qam", "A newer template")
    commands = re.findall(r"^git (?!-C)(.*)", PAGE, re.MULTILINE)  # those of its last block
    for line in commands:
        git(pets, *shlex.split(line))
    assert len(commands) == 3
    assert git(pets, "diff", "--name-status", "HEAD").splitlines() == [
        "M\tpets/engine/__init__.py",
        "D\ttests/engine/test_own.py",
    ]
    measured = run(pets, "-m", "pets.evaluate", "run=runs/one")  # of the run that check_without made
    assert measured.returncode == 0, measured.stderr
