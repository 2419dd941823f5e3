"""hydra/launcher=ray_tune below a sweeper of somebody else's, which asks for batches and chooses the next by the last."""

from __future__ import annotations

import json
import subprocess
import sys

from src.engine.sweeps.sweep_journal import FINISHED, Journal
from tests.conftest import ROOT, command_environment

# As a package of its own would bring it; beside it there is the launcher's hydra_plugins/.
SWEEPER = """
import json
from dataclasses import dataclass
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper

@dataclass
class Climb:
    _target_: str = "hydra_plugins.climb.ClimbSweeper"

ConfigStore.instance().store(group="hydra/sweeper", name="climb", node=Climb)

class ClimbSweeper(Sweeper):
    def setup(self, *, hydra_context, task_function, config):
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments):
        seen, place = [], 0
        for step in (4, 1):
            batch = [[*arguments, f"x={place - step}"], [*arguments, f"x={place + step}"]]
            returns = self.launcher.launch(batch, initial_job_idx=len(seen))
            seen += [[list(one.overrides), one.cfg.x, one.hydra_cfg.hydra.job.num, one.return_value] for one in returns]
            place = max((one.return_value, one.cfg.x) for one in returns)[1]
        open("seen.json", "w").write(json.dumps(seen))
"""

APP = """
import time
from pathlib import Path
import hydra
from src.engine.sweeps import settings

def job(config):
    time.sleep(0.3 * (config.x < 0))  # the first of a batch ends last
    return -abs(config.x - 3)

if __name__ == "__main__":
    settings.register()
    hydra.main(version_base="1.3", config_path=str(Path("conf").absolute()), config_name="app")(job)()
"""


def test_it_gets_what_its_jobs_returned_in_their_order(tmp_path):
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "app.yaml").write_text(f"x: 0\nhydra: {{searchpath: ['file://{ROOT}/conf']}}\n")
    (tmp_path / "app.py").write_text(APP)
    (tmp_path / "hydra_plugins").mkdir()
    (tmp_path / "hydra_plugins" / "climb.py").write_text(SWEEPER)
    words = (
        "hydra/sweeper=climb",
        "hydra/launcher=ray_tune",
        "hydra.sweep.dir=sweep",
        "hydra.sweep.subdir=${hydra.job.num}",
    )
    done = subprocess.run(
        [sys.executable, "-m", "app", "-m", *words],
        cwd=tmp_path,
        env=command_environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "seen.json").read_text()) == [
        [["x=-4"], -4, 0, -7],
        [["x=4"], 4, 1, -1],
        [["x=3"], 3, 2, 0],
        [["x=5"], 5, 3, -2],
    ]
    trials = Journal(tmp_path / "sweep").trials
    assert {number: (trial.state, trial.value) for number, trial in trials.items()} == {
        0: (FINISHED, -7),
        1: (FINISHED, -1),
        2: (FINISHED, 0),
        3: (FINISHED, -2),
    }
    assert "4 trials: 4 finished" in done.stdout
