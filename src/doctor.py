"""Says whether a training would start here, what it would take, and what to mend. Trains nothing and leaves no run.

    python -m src.doctor                                         the first run of the README
    python -m src.doctor data=image_folder data.root=photos/     your own: any words of src.train
    python -m src.doctor strategy=ddp trainer.devices=auto       whether the processes reach each other

Looks at versions, CPU, memory, disk, GPUs, processes, the images, and a few real steps of the run that was typed, in this
order. Each finding is ok, a warning, or a problem with the command that mends it. Exit code: 0 if the training would start,
otherwise the one that it would end with (docs/errors.md).
"""

from __future__ import annotations

from src.engine.runs import signals

if __name__ == "__main__":
    signals.end_at_once()  # what follows takes a while to import

import sys

from src.engine.commands.user_command import speak_of
from src.engine.doctor.versions import refuse_missing
from src.engine.runs.errors import run_and_report


def work() -> None:
    if {"--help", "-h"} & {*sys.argv[1:]}:
        print(__doc__)
        return
    speak_of("src.train")  # whose command the findings correct
    refuse_missing()
    from src import rules  # noqa: F401 (registers the settings)
    from src.engine.commands.command_line import run_hydra
    from src.engine.doctor.doctor import diagnose, refuse_sweep

    refuse_sweep()
    run_hydra(diagnose)


if __name__ == "__main__":
    sys.exit(run_and_report(work))
