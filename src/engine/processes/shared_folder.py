"""The folder of a run with several ranks: rank 0 writes it, the others read it."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from src.engine.commands.user_command import corrected
from src.engine.processes.ranks import Ranks
from src.engine.runs import logs
from src.engine.runs.errors import ExitCode, UserError
from src.engine.runs.run_dir import RunFolder, note_opened


@contextmanager
def open_folder(ranks: Ranks, path: Path, config: dict[str, Any], resume: str) -> Iterator[RunFolder]:
    """Opens the run's folder, whose path rank 0 decides. Each rank has a log there.

    config: the whole config as plain values. Raises UserError if it differs between the ranks, if a rank does not see the
    folder, and for the reasons of RunFolder.open.
    """
    ranks.check_same("settings", config)
    path = Path(ranks.told_by_first(lambda: str(path)))
    with RunFolder.open(path, config, resume, writes=ranks.is_first) as folder:
        ranks.told_by_first(lambda: None)  # it exists from here on
        if not (path / "config.yaml").exists():
            raise UserError(
                f"{path} is not the same folder on all machines",
                where=f"{path.absolute()} on {platform.node()}",
                why="the first process has made it, and this one does not see it; all read the checkpoints in it",
                fix=corrected("runs_dir=/a/folder/that/all/machines/share"),
                code=ExitCode.NO_INPUT,
            )
        note_opened(path)
        with logs.to_file(path / ("train.log" if ranks.is_first else f"rank{ranks.rank}.log")):
            yield folder
