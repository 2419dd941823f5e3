"""The optional rooms of src/engine/, a line for each. docs/rooms.md says what they are.

A room without its line here is not used, and then its folder can be deleted. Both, and what else belongs to it:

    python scripts/remove_feature.py --list
    python scripts/remove_feature.py sweeps
"""

import src.engine.batch_size.feature  # data.batch_size=auto
import src.engine.dp.feature  # strategy=dp
import src.engine.export.feature  # python -m src.export
import src.engine.memory_growth.feature  # memory.detect_growth
import src.engine.pipeline.feature  # strategy=model_parallel and pipeline, model=model_parallel_resnet50
import src.engine.reports.feature  # report.html of a run
import src.engine.sweep_reports.feature  # report.html of a sweep
import src.engine.sweeps.feature  # hydra/launcher=ray_tune and hydra/sweeper=ray_tune
