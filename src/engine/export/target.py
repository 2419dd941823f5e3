"""Where src.export writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from src.engine.commands.user_command import corrected
from src.engine.runs.errors import UserError
from src.engine.runs.run_dir import refuse_links
from src.engine.runs.run_lookup import fold_runs
from src.engine.runs.text import path_in


def target_folder(run: str, runs: Sequence[Path], out: str | None) -> Path:
    """out=, or export/ in the folder of the run or of data.folds. run: as typed. Raises UserError for several runs that have no
    folder in common."""
    if out is not None:
        return path_in(out)
    folds = fold_runs(path_in(run))
    if len(runs) > 1 and not folds:
        raise UserError(
            "out= is missing",
            where=f"run={run}",
            why=f"the mean of {len(runs)} runs belongs in the folder of none of them",
            fix=corrected("out=mean"),
        )
    folder = path_in(run) if folds else runs[0]
    refuse_links(folder, "export*", "export/*")
    return folder / "export"
