"""The engine: nobody has to read it, and a newer one takes its place as a whole (UPGRADING.md).

VERSION rises with a change after which src/ outside the engine has to be edited too: a function that it calls has another
parameter, or the engine reads a setting that src/config.py did not have. CHANGES.md says what to edit, under "Engine N".
"""

from __future__ import annotations

import sys

VERSION = 11


def require(version: int) -> None:
    """Ends the program, before anything of the engine is imported, unless the engine has this version."""
    if version == VERSION:
        return
    if version < VERSION:
        entries = f'"Engine {version + 1}"' + (f' to "Engine {VERSION}"' if version + 1 < VERSION else "")
        why = "a newer engine was put into its place, which src/ has not followed yet"
        fix = (
            f"edit src/ as src/engine/CHANGES.md says under {entries}, then write require({VERSION}) in src/__init__.py"
        )
    else:
        why = "an older engine was put into its place"
        fix = f"take src/engine of version {version} or later from the template, as UPGRADING.md says"
    lines = (
        f"ERROR   src/ is written for version {version} of src/engine, which has version {VERSION}  (exit code 64)",
        "where   src/__init__.py and src/engine/__init__.py",
        f"why     {why}",
        f"fix     {fix}",
        "or      git checkout --no-overlay HEAD -- src/engine   # back to the engine that you committed",
    )
    print("\n".join(lines), file=sys.stderr)
    raise SystemExit(64)  # ExitCode.CONFIG, which may not be importable here
