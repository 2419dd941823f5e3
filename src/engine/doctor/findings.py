"""What src.doctor found, printed at once, in 80 columns: ok, warning or problem, and the commands that mend it."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence

from src.engine.runs.errors import ErrorOfProcess, UserError
from src.engine.runs.text import plural, printable

WIDTH = 80


class Findings:
    """Prints each finding, and keeps what the last line says: the number of warnings, and the first problem."""

    def __init__(self) -> None:
        self.warnings = 0
        self.problem: UserError | None = None  # the first: a training would end with its exit code
        self.fix = ""  # of that problem

    def ok(self, title: str, text: str) -> None:
        _print("ok", title, text)

    def warn(self, title: str, text: str, *fix: str) -> None:
        self.warnings += 1
        _print("warning", title, text, fix)

    def fail(self, title: str, error: UserError) -> None:
        """A problem. error: what a training would end with."""
        text, fix = _of_process(error) if isinstance(error, ErrorOfProcess) else (_sentence(error), error.fix)
        _print("problem", title, text, fix)
        if self.problem is None:
            commands = [command for command in fix if command.startswith(("python -m", "pip install"))]
            self.problem, self.fix = error, next(iter([*commands, *fix]), "")

    def conclude(self, command: str) -> None:
        """Prints the last line: what to do. command: the training that was looked at."""
        noted = f" {plural(self.warnings, 'warning')} above." if self.warnings else ""
        print()
        if self.problem is None:
            print(f"A training would start.{noted}\n  {command}", flush=True)
        else:
            code = self.problem.code.value
            text = f"A training would end with exit code {code}.{noted} First the problem" + (":" if self.fix else ".")
            print(text + (f"\n  {self.fix}" if self.fix else ""), flush=True)


def _print(mark: str, title: str, text: str, fix: Sequence[str] = ()) -> None:
    """Commands stay on one line, so that they can be pasted."""
    indent = " " * 20
    first = f"{mark:<8} {title:<10} "
    print(textwrap.fill(printable(text), WIDTH, initial_indent=first, subsequent_indent=indent, break_on_hyphens=False))
    for number, command in enumerate(fix):
        print(f"{'':8} {'or' if number else 'fix':<10} {printable(command)}")
    print(end="", flush=True)


def _sentence(error: UserError) -> str:
    where = f" ({error.where})" if error.where else ""
    return f"{error.found}{where}" + (f": {error.why}" if error.why else "")


def _of_process(error: ErrorOfProcess) -> tuple[str, list[str]]:
    """The text and the fixes of an error that another process has printed in rows, as UserError.render does."""
    rows: list[tuple[str, str]] = []
    for line in error.found.splitlines():
        label, text = line[:8].strip(), line[8:].strip()
        if label or not rows:
            rows.append((label, text))
        else:
            rows[-1] = (rows[-1][0], f"{rows[-1][1]} {text}")
    texts = {label: text for label, text in rows if label in ("ERROR", "where", "why")}
    found = re.sub(r"  \(exit code \d+\)$", "", texts.pop("ERROR", error.found))
    shown = UserError(found, where=texts.get("where", ""), why=texts.get("why", ""))
    return _sentence(shown), [text for label, text in rows if label in ("fix", "or")]
