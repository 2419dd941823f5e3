"""What `python -m src.doctor` looks at, in this order: the cheap first, and the data and the first steps last."""

from __future__ import annotations

import shlex
import sys
from contextlib import suppress
from pathlib import Path

from omegaconf import DictConfig

from src.engine.commands import config_checks
from src.engine.commands.user_command import shell_command
from src.engine.commands.word_checks import is_sweep
from src.engine.doctor.findings import Findings
from src.engine.doctor.machine import answered, check_disk, check_machine
from src.engine.doctor.processes import check_processes
from src.engine.doctor.rehearsal import rehearse
from src.engine.doctor.versions import check_versions
from src.engine.processes.launch_checks import check_launched
from src.engine.runs.errors import UserError
from src.engine.runs.loggers import check_loggers


def refuse_sweep() -> None:
    words = sys.argv[1:]
    if is_sweep(words):
        options = ("-m", "--multirun", "hydra.mode=MULTIRUN")
        first = [word if "[" in word else word.partition(",")[0] for word in words if word not in options]
        raise UserError(
            "src.doctor looks at one run, and this is a sweep",
            why="each job of a sweep is a run with one value of each setting",
            fix=shlex.join(["python", "-m", "src.doctor", *first, *(["hydra.mode=RUN"] if is_sweep(first) else [])]),
        )


def diagnose(composed: DictConfig) -> None:
    """Prints the findings and ends with the exit code that the training would end with, 0 if it would start."""
    config = answered(Path(composed.data.root or "."), lambda _: config_checks.read(composed))
    findings = Findings()
    for warning in config_checks.without_effect(config):
        findings.warn("settings", warning)
    for title, check in (
        ("versions", lambda: check_versions(findings)),
        ("machine", lambda: check_machine(findings, config)),
        ("disk", lambda: check_disk(findings, config)),
        ("launch", lambda: check_launched(config, multirun=False)),
        ("logger", lambda: check_loggers(config.logger)),
        ("processes", lambda: check_processes(findings, config)),
        ("run", lambda: rehearse(findings, config)),
    ):
        try:
            check()
        except UserError as error:
            findings.fail(title, error)
        if findings.problem is not None:
            break  # what follows would fail for the same reason
    with suppress(OSError):  # it holds runs, or what was learned of the images
        Path(config.runs_dir).rmdir()
    findings.conclude(shell_command())
    sys.exit(findings.problem.code if findings.problem else 0)
