"""How many epochs and steps a run trains for; trainer.max_epochs=auto.

Twelve epochs of 40 images are 24 steps, in which a network learns next to nothing: docs/freezing.md has the figures. So a run
has at least FEWEST_STEPS steps, whatever its number of images.
"""

from __future__ import annotations

import math

from src.engine.commands.schema import Config

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


def steps_of(config: Config, images: int) -> int:
    """Optimizer steps of a run, which the learning rate's schedule spans. images: in train."""
    trainer = config.trainer
    batches = batches_per_epoch(images, config.data.batch_size)
    steps = epochs_of(config, images) * min(batches, trainer.limit_batches or batches)
    return min(steps, trainer.max_steps) if trainer.max_steps > 0 else steps


def batches_per_epoch(images: int, batch_size: int) -> int:
    """How many global batches an epoch has."""
    full, rest = divmod(images, batch_size)
    return full + (1 if rest > 1 or full == 0 else 0)
