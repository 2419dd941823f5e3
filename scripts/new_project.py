"""Makes a project of your own: a copy of this template whose package has your name, in a git repository of its own.

    python scripts/new_project.py pets ../pets                              # there: python -m pets.train
    python scripts/new_project.py pets ../pets --without sweeps,pipeline    # and without these rooms (docs/rooms.md)

NAME takes the place of src everywhere: in imports, commands, messages, pages, tests. DIR is a new or an empty folder. This
clone stays as it is. Exit code 64: a name, a room or a folder that cannot be used; 69: git or ruff is missing, or failed.
Which names can be used, and how the project takes a newer engine later: docs/rename.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import keyword
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import tomllib
from datetime import date
from itertools import chain
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts.remove_feature import chosen, without  # noqa: E402
from src.engine import VERSION  # noqa: E402
from src.engine.runs.errors import ExitCode, UserError, run_and_report  # noqa: E402

ONLY_HERE = ("scripts/new_project.py", "docs/rename.md", "tests/test_new_project.py")
REPEAT = "mend that, delete DIR if it is there, and repeat the command"
README = """# src

Fine-tunes a pretrained image classifier on your images. Write here what the project is for.

{start}

## The pages

All commands, the settings, the files of a run, a map of the code: [docs/manual.md](docs/manual.md).

{pages}
"""
CHANGELOG = """# Changes

## Unreleased

- {today}: made from {template}, by
  `{made_by}`, which an upgrade repeats (UPGRADING.md).
"""


def command(name: str, folder: object, without_rooms: str) -> str:
    rooms = ["--without", without_rooms] if without_rooms else []
    return shlex.join(["python", "scripts/new_project.py", name, str(folder), *rooms])


def check_name(options: argparse.Namespace) -> None:
    """Raises UserError for a name that cannot be imported, or that something else has."""
    name = options.name
    if not re.fullmatch("[a-z][a-z0-9_]*", name):
        found, why = f"{name} cannot be the name of a package", "it begins with a letter, and has only a-z, 0-9 and _"
    elif owner := _owner(name):
        found, why = f"{name} is taken", f"it is {owner}, and `import {name}` can mean one thing only"
    else:
        return
    close = re.sub("[^a-z0-9]+", "_", name.lower()).strip("_") or "project"
    close = f"my_{close}" if close == name or not close[0].isalpha() or _owner(close) else close
    raise UserError(found, where="NAME", why=why, fix=command(close, options.folder, options.without))


def _owner(name: str) -> str:
    """What has the name already; empty: nothing."""
    paths = [path.stem for folder in (ROOT, ROOT / "src") for path in folder.iterdir()]
    ignored = [line.strip("/") for line in (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    packages = chain(project["dependencies"], *project["optional-dependencies"].values())
    installed = importlib.util.find_spec(name)
    folders = (installed and installed.submodule_search_locations) or []
    owners = {
        "a word of Python's grammar": keyword.iskeyword(name),
        "a module of Python": name in sys.stdlib_module_names,
        "a file or folder of the project": name in {*paths, *ignored},
        "a package that the project may need": name in {re.split("[^a-z]", package)[0] for package in packages},
        # But a project that this script made is made again for an upgrade.
        "a package that is installed here": installed and not any(Path(it, "engine/own.py").exists() for it in folders),
    }
    return next((owner for owner, has_it in owners.items() if has_it), "")


def check_folder(options: argparse.Namespace) -> None:
    """Raises UserError unless the folder is new or empty, and outside of this clone."""
    folder = options.folder
    if folder.resolve().is_relative_to(ROOT):
        found, why, other = f"{folder} lies in this clone", "a repository would be in another", f"../{folder.name}"
    elif folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        found, why, other = f"{folder} is not an empty folder", "nothing is written over", f"{folder}-2"
    else:
        return
    fix = command(options.name, other, options.without)
    raise UserError(found, where=str(folder.absolute()), why=why, fix=fix)


def run(folder: Path, *command: str, fix: str = REPEAT) -> str:
    """The output of a command. Raises UserError where it fails."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode != 0:
        found, why = f"{shlex.join(command)} failed", (done.stdout + done.stderr).strip()[-400:]
        raise UserError(found, where=str(folder), why=why, fix=fix, code=ExitCode.UNAVAILABLE)
    return done.stdout.strip()


def write_pages(folder: Path, template: str, made_by: str) -> None:
    """A README of one screen, the template's as docs/manual.md, and a CHANGELOG that begins today."""
    titles = {path.name: path.read_text(encoding="utf-8").partition("\n")[0][2:] for path in folder.glob("docs/*.md")}
    pages = ", ".join(f"[{title}](docs/{name})" for name, title in sorted(titles.items()))
    pages += ". To take over a newer engine: [UPGRADING.md](UPGRADING.md)."
    readme = (folder / "README.md").read_text(encoding="utf-8")
    manual = readme[readme.index("## Start") :]
    start = manual[: manual.index("Nothing else is to be written.")].rstrip()
    manual = re.sub(r"\]\((?!http|#)(docs/)?", lambda link: "](" if link[1] else "](../", manual)
    texts = {
        "README.md": README.format(start=start, pages=textwrap.fill(pages, 120, break_on_hyphens=False)),
        "docs/manual.md": f"# The manual\n\n{manual}",
        "CHANGELOG.md": CHANGELOG.format(today=date.today(), template=template, made_by=made_by),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def rename(folder: Path, name: str) -> None:
    """Puts the name in the place of src in all texts, except where it is an attribute or an argument: <img src=...>."""
    for path in folder.rglob("*"):
        if not path.is_file() or b"\0" in (content := path.read_bytes()):
            continue
        text = without(content.decode(), ["template"], path.suffix == ".md")
        text = re.sub(r"README\.md(?=, '| has the map|#)", "docs/manual.md", text)  # what these name is there now
        text = re.sub(r"\bsrc\b(?!=)", name, text).replace("image-transfer-learning", name)
        path.write_bytes(text.replace("A project template for transfer", "Transfer").encode())
    (folder / "src").rename(folder / name)


def tidy(folder: Path) -> None:
    """Sorts imports and breaks lines anew, by the name's letters and length; a sentence may be longer by it."""
    run(folder, sys.executable, "-m", "ruff", "check", "--no-cache", "--select", "I", "--fix", ".")
    run(folder, sys.executable, "-m", "ruff", "format", "--no-cache", ".")
    longest = max(len(line) for path in folder.rglob("*.py") for line in path.read_text(encoding="utf-8").splitlines())
    settings = (folder / "pyproject.toml").read_text(encoding="utf-8")
    settings = re.sub("(?<=max-line-length = )[0-9]+", lambda limit: str(max(longest, int(limit[0]))), settings)
    (folder / "pyproject.toml").write_text(settings, encoding="utf-8")


def commit(folder: Path, name: str) -> None:
    """One commit, by the user's git identity or, where git has none, by the project's name. Without hooks of the machine."""
    run(folder, "git", "init", "--quiet", "--initial-branch=main")
    run(folder, "git", "add", "--all")
    known = subprocess.run(["git", "var", "GIT_COMMITTER_IDENT"], cwd=folder, capture_output=True).returncode == 0
    identity = [] if known else ["-c", f"user.name={name}", "-c", f"user.email={name}@localhost"]
    run(folder, "git", *identity, "commit", "--quiet", "--no-verify", "-m", f"{name}, made from the template")


def work() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", metavar="NAME", help="of the package, as in python -m NAME.train")
    parser.add_argument("folder", metavar="DIR", type=Path, help="where the project will lie")
    parser.add_argument(
        "--without", metavar="ROOMS", default="", help="what remove_feature.py --list names, with commas"
    )
    options = parser.parse_args()
    name, folder = options.name, options.folder
    check_name(options)
    check_folder(options)
    rooms = [room.name for room in chosen([room for room in options.without.split(",") if room])]
    for needed, fix in (("git", "install git"), ("ruff", 'pip install -e ".[dev]"')):
        if not (shutil.which(needed) or importlib.util.find_spec(needed)):
            raise UserError(f"{needed} is not installed", fix=fix, code=ExitCode.UNAVAILABLE)
    to_commit = 'git init && git add . && git commit -m "The template"'
    version = run(ROOT, "git", "describe", "--always", "--dirty", fix=to_commit)

    for file in run(ROOT, "git", "ls-files", "-z").split("\0"):
        if file and file not in ONLY_HERE and (ROOT / file).is_file():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / file, folder / file)
    if rooms:
        run(folder, sys.executable, "-B", "scripts/remove_feature.py", "--force", *rooms)
    write_pages(
        folder, f"commit {version} of the template, with engine {VERSION}", command(name, "DIR", options.without)
    )
    rename(folder, name)
    tidy(folder)
    commit(folder, name)
    left_out = f", without {', '.join(rooms)}" if rooms else ""
    print(f"{folder} has the project {name}{left_out}: one commit on the branch main.")
    print(f'next    cd {shlex.quote(str(folder))} && pip install -e ".[dev]" && python -m {name}.train')


if __name__ == "__main__":
    sys.exit(run_and_report(work))
