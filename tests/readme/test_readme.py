"""Every command that README.md and docs/ show is run here, in one folder, in the order of the page.

Three things differ from a user's terminal, so that it takes minutes on two cores and no network: every training but the
first is made short (SHORT); a command that needs pretrained weights or a set from the network may answer with the
documented exit code 69; and precision=bf16 has to, on a machine that does not have it.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sqlite3
import subprocess
from pathlib import Path

import pytest
import torch

from scripts.remove_feature import without
from src.engine import features
from src.engine.runs.errors import UserError
from src.engine.steps.precision import check_precision
from tests import warm
from tests.conftest import ROOT, command_environment, write_images

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SHORT = ["debug=true", "data.batch_size=8", "logger=csv"]  # the others where the command says nothing of it
EXTRAS = [
    "baseline=none",
    *(["report.page=false"] if "reports" in features.names() else []),
]  # added on other pages than:
WITH_EXTRAS = ("baseline.md", "report.md")
# The first run is right for 98.7 % of its 269 test images, in the mean of seeds and kinds of CPU: rounding alone leads to
# other weights. The standard deviation of such a count is 0.7 %, and this is four of them less.
ACCURACY = 0.96
NEEDS_NETWORK = ("resnet50", "vit_b_16", "vgg19_append", "Flowers102")
RUN_BY_CI = ("pip install -e . && python -m src.train", 'pip install -e ".[dev]" && pytest')
NOT_RUN = (  # each with the reason
    'pip install -e ".[timm]"',  # part of the extra dev, which .ci/run installs
    "python -m src.train trainer.compile=true",  # minutes; tests/engine/steps/test_compiling.py compiles a small network
)


def shown(page: Path) -> str:
    """The page without what it says of rooms that were removed."""
    text = page.read_text()
    absent = {*re.findall(r"\broom: ([a-z_]+)", text)} - {*features.names(), "template"}
    return without(text, sorted(absent), is_markdown=True) if absent else text


def commands(page: Path) -> list[str]:
    """The lines of the page's bash blocks and of its tables of commands."""
    text = shown(page)
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    in_tables = re.findall(r"^\| `(python -m [^`]+)` \|", text, re.MULTILINE)
    return [line for block in blocks for line in block.splitlines() if line.strip()] + in_tables


@pytest.fixture
def folder(tmp_path) -> Path:
    """What the page supposes: photos/, new_photos/, an image, a table."""
    folder = tmp_path
    write_images(folder / "photos", {"cats": 10, "dogs": 10})
    write_images(folder / "new_photos", {"": 3}, seed=1)
    shutil.copy(folder / "photos/cats/000.png", folder / "cat.jpg")
    rows = [f"photos/{name}/{index:03d}.png,{name}" for name in ("cats", "dogs") for index in range(10)]
    (folder / "labels.csv").write_text("path,label\n" + "\n".join(rows) + "\n")
    rows = [
        f"photos/{name}/{index:03d}.png,{2 * index + 0.5},{index**2}"
        for name in ("cats", "dogs")
        for index in range(10)
    ]
    (folder / "ages.csv").write_text("path,age,weight\n" + "\n".join(rows) + "\n")
    tags, cells = ("cat;outdoor", "dog", "outdoor;dog", ""), ("1,0,1", "0,1,0", "0,1,1", "0,0,0")
    for name, columns, own in (("tags", "label", tags), ("columns", "cat,dog,outdoor", cells)):
        rows = [
            f"photos/{'cats' if index < 10 else 'dogs'}/{index % 10:03d}.png,{own[index % 4]}" for index in range(20)
        ]
        (folder / f"{name}.csv").write_text(f"path,{columns}\n" + "\n".join(rows) + "\n")
    (folder / "flat").mkdir()
    with sqlite3.connect(folder / "images.db") as database:
        database.execute("create table images(name, content, label, patient)")
        for path in sorted((folder / "photos").glob("*/*.png")):
            row = f"{path.parent.name}/{path.name}", path.read_bytes(), path.parent.name, f"patient {path.stem}"
            database.execute("insert into images values (?, ?, ?, ?)", row)
            shutil.copy(path, folder / "flat" / f"{path.parent.name}_{path.name}")
    return folder


def files_of(page: Path) -> dict[str, str]:
    """The files that the page shows, each a block that begins with its path: # src/my_heads.py."""
    return dict(re.findall(r"```(?:python|yaml)\n# (\S+)\n(.*?)```", page.read_text(), re.DOTALL))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_the_page_works(folder, page):
    """One test for a page: later commands use what earlier ones made. The first is a fresh process, as all are for a
    user; the others save the import of torch (tests/warm.py). FIRST_RUN: a file with what `python -m src.train` printed,
    which .ci/run has run already."""
    if files := files_of(page):  # parts of the reader's own: beside a copy of the project
        for part in ("src", "conf"):
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        for path, text in files.items():
            (folder / path).write_text(text)
    lines = [line for line in commands(page) if line not in RUN_BY_CI + NOT_RUN]
    short = SHORT if page.name in WITH_EXTRAS else SHORT + EXTRAS
    for number, line in enumerate(lines):
        check_command(folder, line, short, cold=number == 0)


def check_command(folder: Path, line: str, short: list[str], cold: bool) -> None:
    words = shlex.split(line)
    if words == ["python", "-m", "src.train"] and (recorded := os.environ.get("FIRST_RUN")):
        check_first_run(Path(recorded).read_text())
        return
    shortened = words[:3] == ["python", "-m", "src.train"] and not {"--help", "--cfg", "debug=true"} & set(words)
    if shortened and len(words) > 3:
        words += [word for word in short if word.split("=")[0].split(".")[-1] not in line]
    environment = command_environment() | {"TORCH_HOME": str(folder / "no_weights")}
    if words[:2] == ["python", "-m"]:
        done = warm.run(words[2], words[3:], folder, environment, timeout=600, cold=cold)
    else:
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=600, env=environment)
    if "precision=bf16" in words and not has_bf16():
        assert done.returncode == 69, done.stdout + done.stderr
        assert "precision=bf16 does not work on" in done.stderr
        return
    if done.returncode == 69 and any(word in line for word in NEEDS_NETWORK):
        assert "network" in done.stderr or "download" in done.stderr, done.stderr
        return
    assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    if words == ["python", "-m", "src.train"]:
        check_first_run(done.stdout + done.stderr)


def has_bf16() -> bool:
    """Whether the device that trainer.accelerator=auto takes on this machine computes in bfloat16."""
    kind = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        check_precision("bf16", torch.device(kind))
    except UserError:
        return False
    return True


def check_first_run(printed: str) -> None:
    """The first thing a new user sees: 42 lines at most, an accuracy worth showing, and a next command."""
    assert len(printed.splitlines()) <= 42
    assert "python -m src.predict run=" in printed
    test = next(line for line in printed.splitlines() if line.startswith("test"))
    assert float(test.split()[1]) >= ACCURACY


def test_ci_runs_the_first_two_commands():
    ci = (ROOT / ".ci" / "run").read_text()
    shown = commands(PAGES[0])
    for line in RUN_BY_CI:
        assert line in shown
        for part in line.split(" && "):
            assert part.replace("pip install", "pip install --quiet") in ci


def test_what_contributors_are_told_to_run_is_there():
    """Their own commands are not run: they install hooks into git, or are what .ci/run does."""
    shown = commands(ROOT / "CONTRIBUTING.md")
    assert len(shown) == 4
    for script in re.findall(r"python (scripts/\S+)", (ROOT / "CONTRIBUTING.md").read_text()):
        assert (ROOT / script).exists()


def test_the_map_of_the_house_is_true():
    """Every file and folder that the map names exists, and every folder of src/ is on it."""
    house = re.search(r"## The house\n\n```\n(.*?)```", "".join(map(shown, PAGES)), re.DOTALL)[1]
    for folder in (ROOT / "src", ROOT / "src" / "engine"):
        part = re.search(rf"^{folder.relative_to(ROOT)}/ .*\n((?:  .*\n)*)", house, re.MULTILINE)[1]
        for names in re.findall(r"^  ((?:\w+\.py )*\w+(?:\.py|/))", part, re.MULTILINE):
            for name in names.split():
                assert (folder / name).exists(), name
        for path in folder.iterdir():
            if path.is_dir() and path.name not in ("__pycache__", "engine"):
                assert f"  {path.name}/" in part, f"{path.name}/ is not on the map"


def test_links_lead_somewhere():
    for page in [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "UPGRADING.md"]:
        for target in re.findall(r"\]\(([^)#:]+)\)", shown(page)):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_exit_codes_of_the_page_are_those_of_the_program():
    from src.engine.runs.errors import ExitCode

    page = (ROOT / "docs" / "errors.md").read_text()
    assert [int(code) for code in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)] == [code.value for code in ExitCode]
