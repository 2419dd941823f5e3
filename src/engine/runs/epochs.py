"""trainer.max_epochs=auto: how many epochs a run trains for.

Twelve epochs of 40 images are 24 steps, in which a network learns next to nothing: docs/freezing.md has the figures. So a run
has at least FEWEST_STEPS steps, whatever its number of images.
"""

from __future__ import annotations

import math

from src.engine.commands.schema import Config
from src.engine.images.sampler import batches_per_epoch

FEWEST_EPOCHS = 12
FEWEST_STEPS = 250
USUAL_BATCH = 32  # images, where data.batch_size is not measured yet


def epochs_of(config: Config, images: int) -> int:
    """The epochs of a run. images: in train."""
    trainer, size = config.trainer, config.data.batch_size
    if (typed := typed_epochs(config)) is not None:
        return typed
    if trainer.limit_batches:  # a quick try
        return FEWEST_EPOCHS
    steps = batches_per_epoch(images, size if isinstance(size, int) else USUAL_BATCH)
    if trainer.max_steps > 0:
        return math.ceil(trainer.max_steps / steps)
    return max(FEWEST_EPOCHS, math.ceil(FEWEST_STEPS / steps))


def typed_epochs(config: Config) -> int | None:
    """None: they follow from the images."""
    return None if config.trainer.max_epochs == "auto" else config.trainer.max_epochs
