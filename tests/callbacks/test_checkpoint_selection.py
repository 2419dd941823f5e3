"""The best epoch: by the metric, then by the loss, then the earlier one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from src.callbacks.checkpoint_selection import BestCheckpoint

NAN = float("nan")


def chosen(tmp_path, monitor, epochs, restart_after=None):
    """The epoch whose checkpoint is kept, of (metric, loss) per epoch; a restart goes through the callback's state."""
    kept = []
    callback = BestCheckpoint(tmp_path / "best.ckpt", monitor)
    for epoch, (metric, loss) in enumerate(epochs):
        if epoch == restart_after:
            state = callback.state_dict()
            callback = BestCheckpoint(tmp_path / "best.ckpt", monitor)
            callback.load_state_dict(state)
        metrics = {"val/loss": torch.tensor(loss), monitor: torch.tensor(metric)}
        trainer = SimpleNamespace(
            sanity_checking=False,
            state=SimpleNamespace(fn="fit"),
            callback_metrics=metrics,
            save_checkpoint=lambda path, weights_only, epoch=epoch: kept.append(epoch),
        )
        callback.on_validation_end(trainer, None)
    return kept[-1]


@pytest.mark.parametrize(
    ("monitor", "epochs", "best"),
    [
        ("val/acc", [(0.5, 1.0), (0.9, 2.0), (0.8, 0.1)], 1),
        ("val/acc", [(0.9, 0.5), (0.9, 0.4), (0.9, 0.6)], 1),
        ("val/acc", [(0.9, 0.5), (0.9, 0.5)], 0),
        ("val/loss", [(0.5, 0.5), (0.3, 0.3), (0.4, 0.4)], 1),
        ("val/acc", [(NAN, NAN), (0.1, 3.0), (NAN, 0.0)], 1),
    ],
)
def test_the_best_epoch(tmp_path, monitor, epochs, best):
    assert chosen(tmp_path, monitor, epochs) == best
    assert chosen(tmp_path, monitor, epochs, restart_after=1) == best
