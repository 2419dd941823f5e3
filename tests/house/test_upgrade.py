"""`git checkout TEMPLATE -- src/engine` of UPGRADING.md, with the engine, and with the src/, of one commit before."""

from __future__ import annotations

import ast
import io
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from scripts.house import trees
from src import engine
from src.config import Config
from src.engine.commands import config_checks, schema
from src.engine.commands.schema import KNOBS, READ_BY_ENGINE
from src.engine.features import FEATURES
from src.engine.runs.errors import UserError
from tests.conftest import SMALL
from tests.warm import ROOT, command_environment

OUTSIDE = ("src", ":!src/engine", "conf")  # what is the owner's


def git(*words: str) -> bytes:
    """The output of a git command. Skips where there is no history to ask."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("there is no git history here to take an older engine from")
    done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True)
    if done.returncode != 0:
        pytest.skip(f"the history here has no commit before: {done.stderr.decode().strip()[-200:]}")
    return done.stdout


@pytest.fixture(scope="module")
def before() -> str:
    """The commit before the last change of src/engine, which may not be committed yet."""
    if git("status", "--porcelain", "--", "src/engine"):
        return "HEAD"
    changed = git("log", "-1", "--format=%H", "--", "src/engine").decode().strip()
    return git("rev-parse", "--verify", f"{changed}^").decode().strip()


def extract(commit: str, folder: Path, *paths: str) -> None:
    with tarfile.open(fileobj=io.BytesIO(git("archive", commit, "--", *paths))) as archive:
        archive.extractall(folder, filter="data")


def copy(folder: Path, *names: str) -> None:
    for name in names:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))


def number(file: Path, pattern: str) -> int:
    return int(re.search(pattern, file.read_text())[1])


def run(folder: Path, name: str, *words: str) -> subprocess.CompletedProcess[str]:
    environment = command_environment() | {"PYTHONPATH": str(folder)}
    command = [sys.executable, "-m", f"src.{name}", *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize("older", ["src/engine", "the rest of src/"])
def test_the_parts_of_two_commits_work_together_or_say_what_to_edit(older, before, tmp_path):
    if older == "src/engine":
        copy(tmp_path, "src", "conf")
        shutil.rmtree(tmp_path / "src/engine")
        extract(before, tmp_path, "src/engine")
    else:
        extract(before, tmp_path, *OUTSIDE)
        copy(tmp_path, "src/engine")
    wanted = number(tmp_path / "src/__init__.py", r"require\((\d+)\)")
    has = number(tmp_path / "src/engine/__init__.py", r"\nVERSION = (\d+)")
    trained = run(tmp_path, "train", *SMALL, "name=first")
    if wanted != has:
        assert trained.returncode == 64, trained.stderr
        assert f"written for version {wanted} of src/engine, which has version {has}" in trained.stderr
        assert not (tmp_path / "runs").exists()
        return
    how = "src/ must be edited with this change of the engine: raise VERSION and say so, as UPGRADING.md describes"
    assert trained.returncode == 0, f"{how}\n{trained.stderr}"
    measured = run(tmp_path, "evaluate", "run=runs/first")
    assert measured.returncode == 0, f"{how}\n{measured.stderr}"
    assert (tmp_path / "runs/first/evaluation.json").exists()


def test_src_is_written_for_this_engine_which_says_what_to_edit():
    assert number(ROOT / "src/__init__.py", r"require\((\d+)\)") == engine.VERSION
    assert f"\n## Engine {engine.VERSION}\n" in (ROOT / "src/engine/CHANGES.md").read_text()


@pytest.mark.parametrize(
    ("version", "says"), [(engine.VERSION - 1, f'"Engine {engine.VERSION}"'), (99, "an older engine")]
)
def test_another_version_ends_the_program_with_what_to_do(version, says, capsys):
    with pytest.raises(SystemExit) as end:
        engine.require(version)
    assert end.value.code == 64
    assert says in capsys.readouterr().err


def test_a_setting_that_the_engine_reads_and_src_lacks_is_named_before_the_run(monkeypatch):
    monkeypatch.delitem(schema.KNOBS, "trainer.threads")
    with pytest.raises(UserError, match=r"lacks trainer\.threads") as error:
        config_checks.read({})
    assert error.value.where == "src/config.py, the class Trainer"
    assert "grep ' threads:'" in error.value.fix[0]


def test_the_engine_declares_the_settings_that_it_reads():
    """By the last two names of what it reads: config.trainer.threads, data.batch_size, settings.seed."""
    assert {section for section in READ_BY_ENGINE if section} <= Config.__dataclass_fields__.keys()
    read = set()
    for file, tree in trees().items():
        if file.startswith("src/engine/"):
            for node in ast.walk(tree):
                if isinstance(node, ast.Attribute):
                    *_, section, name = ast.unparse(node).split(".")
                    read.add(name if section in ("config", "settings") else f"{section}.{name}")
    for template in (ROOT / "src/engine").rglob("*.j2"):
        read |= set(re.findall(r"\bconfig\.(\w+\.\w+)", template.read_text()))
    declared = {f"{section}.{name}".lstrip(".") for section, line in READ_BY_ENGINE.items() for name in line.split()}
    declared |= {key for feature in FEATURES for key in feature.reads}
    assert sorted(key for key in read & KNOBS.keys() if key not in declared | READ_BY_ENGINE.keys()) == []
