"""The first steps of the run that was typed: started as the run would be, in a folder that is removed again.

The steps are those of debug=true, in the same program as the run (src/run.py, rehearse), so that what is refused, logged and
raised is what the run would refuse, log and raise. Only loggers are left out: nothing is sent to a server.
"""

from __future__ import annotations

import csv
import json
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from src.engine.baseline.many_doubts import worth_a_look
from src.engine.commands.config_checks import without_effect
from src.engine.commands.schema import Config
from src.engine.commands.user_command import corrected
from src.engine.doctor.findings import Findings
from src.engine.processes.launching import processes_to_start, run_in_processes
from src.engine.runs.epochs import steps_of
from src.engine.runs.errors import ExitCode, UserError
from src.engine.runs.files import NAMES, original
from src.engine.runs.run_dir import LISTS_OF_MESSAGES, is_to_continue
from src.engine.runs.text import duration, plural, printable, shell_word

PARTS = re.compile(r"out of memory in .* with parts of (\d+) images: repeated in parts of (\d+)")
# What src/engine/runs/introduction.py prints: a label, and what it says.
LABELLED = re.compile(r"(images|classes|labels|values|groups|backbone|model|freezing|baseline) +(\S.*)")
DAY = 86_400.0  # seconds after which what a killed doctor has left is removed
LISTS = (*(name for name in LISTS_OF_MESSAGES if name != "error.log"), "doubts.csv")  # which findings name


def rehearse(findings: Findings, config: Config) -> None:
    """Raises the UserError that would end the training."""
    runs = Path(config.runs_dir)
    if config.name is not None and is_to_continue(runs / config.name, asdict(config), config.resume):
        findings.ok("name", f"{runs / config.name} exists and would be continued; looked at is its start")
    for earlier in runs.glob(".doctor-*"):
        names, age = {path.name for path in earlier.iterdir()}, time.time() - earlier.stat().st_mtime
        if (names and not names - {*LISTS}) or age > DAY:  # others are of a doctor that is at work
            shutil.rmtree(earlier, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=".doctor-", dir=runs))
    try:
        _run(findings, config, folder)
    finally:
        _remove(folder)


def _run(findings: Findings, config: Config, folder: Path) -> None:
    quick = replace(
        config,
        debug=True,
        baseline="none" if config.baseline == "none" else "show",
        logger=type(config.logger)(tensorboard=False),
        memory=replace(config.memory, log=True),
    )
    if config.strategy.name in ("single", "ddp") and not config.strategy.sync_batchnorm:
        quick = replace(quick, oom=replace(config.oom, policy="split"))  # finds what fits
    printed = folder / "printed"
    try:
        with printed.open("wb") as output:
            run_in_processes(quick, folder, processes_to_start(quick) or 1, output)
    finally:
        shares = _show(findings, printed.read_text(encoding="utf-8", errors="replace"), without_effect(config))
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    if shares:
        fits = corrected(f"data.batch_size={max(1, result['batch_size'] * shares[1] // shares[0])}")
        text = f"out of memory with {plural(shares[0], 'image')} at a time; {shares[1]} fit"
        if config.oom.policy == "stop":
            raise UserError(text, fix=[fits, corrected("oom.policy=split")], code=ExitCode.OUT_OF_MEMORY)
        findings.warn("memory", f"{text}: each batch would be done in parts", fits)
    _show_doubts(findings, config, result, folder / "doubts.csv")
    _show_costs(findings, config, result)


def _show(findings: Findings, printed: str, known: Sequence[str]) -> tuple[int, int] | None:
    """Turns what the rehearsal printed into findings; returns how many images did not fit into the memory of a device, and
    how many did, where that happened. known: warnings that were shown before."""
    whole = fits = 0
    for line in _messages(printed):
        if found := PARTS.search(line):
            whole, fits = whole or int(found[1]), int(found[2])
        elif line.startswith("WARNING  "):
            warning = line.removeprefix("WARNING  ")
            if warning not in known and "debug=true" not in warning:
                findings.warn("run", warning)
        elif found := LABELLED.fullmatch(line):
            findings.ok(found[1], found[2])
    return (whole, fits) if whole else None


def _messages(printed: str) -> Iterator[str]:
    """The lines, of which those that are indented belong to the one before."""
    message = ""
    for line in printed.splitlines():
        if line.startswith(" "):
            message += f" {line.strip()}"
        else:
            yield message
            message = line
    yield message


def _show_costs(findings: Findings, config: Config, result: dict[str, Any]) -> None:
    size, seconds = result["batch_size"], result["step_seconds"]
    memory = f"; at most {result['peak_mib']:,} MiB of memory" if result["peak_mib"] else ""
    speed = f"{plural(size, 'image')} in {seconds:.2g} s with loading, {size / seconds:,.3g} images/s"
    findings.ok("step", f"{speed}{memory}")
    if config.baseline == "only":
        findings.ok("length", "baseline=only trains nothing: about one pass over the images")
        return
    steps = steps_of(replace(config, data=replace(config.data, batch_size=size)), result["train_images"])
    findings.ok(
        "length",
        f"{plural(steps, 'step')}, at most about {duration(steps * seconds)} at this pace, which is that of the phase "
        f"that trains most; validation comes on top; checkpoints of {result['bytes'] / 1e6:,.0f} MB",
    )


def _show_doubts(findings: Findings, config: Config, result: dict[str, Any], path: Path) -> None:
    """What src/engine/doctor/labels.py found; path: doubts.csv, which is removed where nothing is in doubt."""
    labels = result["labels"]
    if seconds := labels.get("seconds"):
        alone = "" if config.baseline == "only" else ", as model=features does alone"
        text = f"the run lists those in doubt in doubts.csv{alone}, by a pass of about {duration(seconds)}"
        findings.ok("labels", f"not compared with what the images show: {text}")
    if not path.exists():
        return
    with path.open(newline="", **NAMES) as file:
        _, *rows = ([original(cell) for cell in row] for row in csv.reader(file))
    if not rows:
        path.unlink()
        findings.ok("labels", "none is in doubt for the baseline")
        return
    name, _, label, suggested, _ = rows[0]
    images = len({row[0] for row in rows})
    text = (
        f"{plural(len(rows), 'label')} of {images} of {result['images']} images in doubt for the baseline, the first of "
        f"{printable(name)}: {printable(label)}, where it expects {printable(suggested)}"
    )
    if worth_a_look(images, result["images"], labels.get("accuracy")):
        fix = f"less {shell_word(path)}   # look at them, and correct the labels that are wrong"
        findings.warn("labels", text, fix)
    else:
        findings.ok("labels", f"{text}; it may be wrong itself; all of them: {printable(path)}")


def _remove(folder: Path) -> None:
    """All but the lists that a finding names, such as bad_images.txt."""
    lists = [folder / name for name in LISTS if (folder / name).exists()]
    if not lists:
        shutil.rmtree(folder, ignore_errors=True)
        return
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path not in lists:
            path.unlink(missing_ok=True)
