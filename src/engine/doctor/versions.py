"""The versions of Python and of the libraries against those that pyproject.toml asks for, and where src comes from.

Only the standard library is imported at the top: what is missing is said before anything else needs it.
"""

from __future__ import annotations

import importlib.metadata
import platform
import re
import tomllib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from src.engine.doctor.findings import Findings
from src.engine.project import PROJECT
from src.engine.runs.errors import ExitCode, UserError
from src.engine.runs.text import few, shell_word

# https://github.com/Lightning-AI/pytorch-lightning/issues/21691
MALWARE = {"lightning": ("2.6.2", "2.6.3"), "pytorch-lightning": ("2.6.2", "2.6.3")}
SHOWN = ("torch", "torchvision", "lightning", "hydra-core", "numpy", "pillow")


def refuse_missing() -> None:
    """Raises UserError for packages that pyproject.toml asks for and that are not installed."""
    missing = [name for name in map(_name, _project()["dependencies"]) if _version(name) is None]
    if missing:
        raise UserError(
            f"packages are not installed: {few(missing)}",
            where=str(PROJECT / "pyproject.toml"),
            why="every command imports them",
            fix=f"pip install -e {shell_word(PROJECT)}",
            code=ExitCode.UNAVAILABLE,
        )


def check_versions(findings: Findings) -> None:
    for name, bad in MALWARE.items():
        if (version := _version(name)) in bad:
            findings.fail("versions", _malware(name, version))
            return
    shown = ", ".join(f"{name} {_version(name)}" for name in SHOWN)
    findings.ok("versions", f"Python {platform.python_version()}, {shown}")
    for wanted, version in _out_of_bounds():
        findings.warn(
            "versions", f"{_name(wanted)} is {version}, and {wanted} is wanted", f"pip install {shell_word(wanted)}"
        )
    here = Path.cwd() / "src"
    if here.resolve() != PROJECT / "src" and (here / "engine").is_dir():
        findings.warn(
            "src", f"this folder has a src/, and Python takes {PROJECT / 'src'}", "unset PYTHONSAFEPATH PYTHONPATH"
        )
    elif Path.cwd() != PROJECT:
        findings.ok("src", f"{PROJECT / 'src'}, conf/ beside it")


def _out_of_bounds() -> Iterator[tuple[str, str]]:
    """(requirement, installed version) of each installed package that breaks one of pyproject.toml, or torchvision's."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    project = _project()
    if not SpecifierSet(project["requires-python"]).contains(platform.python_version(), prereleases=True):
        yield f"python{project['requires-python']}", platform.python_version()
    extras = [line for lines in project.get("optional-dependencies", {}).values() for line in lines]
    with suppress(importlib.metadata.PackageNotFoundError):  # each version of torchvision is built for one of torch
        extras += [line for line in importlib.metadata.requires("torchvision") or [] if _name(line) == "torch"]
    for line in dict.fromkeys([*project["dependencies"], *extras]):
        requirement, version = Requirement(line), _version(_name(line))
        if version and not requirement.specifier.contains(version, prereleases=True):
            yield f"{requirement.name}{requirement.specifier}", version


def _malware(name: str, version: str) -> UserError:
    return UserError(
        f"{name} {version} is malware: its upload was compromised",
        why="importing it runs an attacker's code; if that has happened, change the passwords and tokens kept here",
        fix=f"pip uninstall -y {name} && pip install -e {shell_word(PROJECT)}",
        code=ExitCode.UNAVAILABLE,
    )


def _project() -> dict[str, Any]:
    return tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def _name(requirement: str) -> str:
    return re.match(r"[\w.-]*", requirement)[0]  # type: ignore[index]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
