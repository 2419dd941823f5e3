"""Transfer learning on images with Lightning. Start reading at src/run.py; README.md has the map."""

from src.engine import require

require(11)  # the version of src/engine that this src/ is written for: UPGRADING.md
