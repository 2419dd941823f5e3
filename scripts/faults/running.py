"""Runs a row against this project, its negative control, and the plain Lightning script."""

from __future__ import annotations

import shutil
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.faults.plain import Plain
from scripts.faults.programs import Program
from scripts.faults.project import Project, Unguarded
from scripts.faults.registry import Impossible, Row, all_rows

HOLDS, FAILS, MEANINGLESS, SKIPPED = "holds", "fails", "-", "not tried"


@dataclass(frozen=True)
class Result:
    state: str  # HOLDS, FAILS, MEANINGLESS or SKIPPED
    said: str
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """Results of a row."""

    number: int
    name: str
    here: Result
    plain: Result
    control: Result  # here, without the guard of the row

    @classmethod
    def of(cls, fields: dict[str, Any]) -> Outcome:
        """The inverse of dataclasses.asdict."""
        results = {name: Result(**fields[name]) for name in ("here", "plain", "control")}
        return cls(fields["number"], fields["name"], **results)

    def line(self) -> str:
        """For the screen."""
        beside = (
            ""
            if self.plain.state in (MEANINGLESS, SKIPPED)
            else f"\n{'':28}plain: {self.plain.state}, {self.plain.said}"
        )
        here = f"{self.here.state:<6} {self.here.seconds:5.1f} s  {self.here.said}"
        if self.control.state == HOLDS:
            beside += f"\n{'':28}it holds without its guard too: it shows nothing"
        return f"{self.number:>2} {self.name:<22} {here}{beside}"

    @property
    def failed(self) -> bool:
        return self.here.state == FAILS or self.control.state == HOLDS


def run_row(number: int, folder: Path, with_plain: bool = True, with_control: bool = True) -> Outcome:
    """Called in a worker process with the row's number. folder: scratch space."""
    row = next(row for row in all_rows() if row.number == number)
    control = Result(MEANINGLESS, "", 0.0)
    if row.guard is not None and with_control:
        control = break_program(row, Unguarded, folder)
    here = break_program(row, Project, folder)
    plain = Result(MEANINGLESS, "", 0.0)
    if row.plain:
        plain = break_program(row, Plain, folder) if with_plain else Result(SKIPPED, "", 0.0)
    return Outcome(row.number, row.name, here, plain, control)


def break_program(row: Row, kind: type[Program], folder: Path) -> Result:
    """Runs the row against one program in a new folder."""
    place = folder / f"{row.number:02}-{kind.__name__}"
    shutil.rmtree(place, ignore_errors=True)
    program = kind(place, folder / "undisturbed")
    if isinstance(program, Unguarded):
        program.guard = row.guard
    began = time.monotonic()
    try:
        state, said = HOLDS, row.test(program)
    except AssertionError as error:
        state, said = FAILS, " ".join(str(error).split())
    except Impossible as error:
        state, said = SKIPPED, str(error)
    except Exception:
        state, said = FAILS, traceback.format_exc().strip().splitlines()[-1]
    finally:
        program.end_processes()
    shutil.rmtree(place, ignore_errors=True)
    return Result(state, said, time.monotonic() - began)
