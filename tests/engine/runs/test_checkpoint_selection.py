"""The best epochs: by the metric, then by the loss, then the earlier one; and their files."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from src.engine.runs.checkpoint_selection import BestCheckpoint
from src.engine.runs.checksum import save_with_checksum

NAN = float("nan")


def alone(epoch):
    """A trainer of one process that goes on in an epoch."""
    removed = SimpleNamespace(broadcast=lambda value: value, remove_checkpoint=lambda path: path.unlink())
    return SimpleNamespace(current_epoch=epoch, strategy=removed)


class FakeTrainer(SimpleNamespace):
    """Writes the least that is a checkpoint where a Trainer writes the weights."""

    def __init__(self, monitor, epoch, metric, loss):
        super().__init__(
            is_global_zero=True,
            current_epoch=epoch,
            callback_metrics={"val/loss": torch.tensor(loss), monitor: torch.tensor(metric)},
            strategy=SimpleNamespace(
                remove_checkpoint=lambda path: path.unlink(missing_ok=True),
            ),
        )

    def save_checkpoint(self, path, weights_only):
        assert weights_only
        write(self.current_epoch, path)


def write(epoch, path):
    with path.open("wb") as file:
        save_with_checksum({"epoch": epoch, "global_step": 0, "state_dict": {"network.w": torch.ones(1)}}, file)


def files(folder) -> dict[str, int]:
    """Which epoch is in which file."""
    return {path.name: torch.load(path)["epoch"] for path in sorted(folder.iterdir())}


def train(folder, epochs, monitor="val/acc", top_k=1, restart_after=None) -> dict[str, int]:
    """The files after epochs of (metric, loss); a restart goes through the callback's state."""
    callback = BestCheckpoint(folder, monitor, top_k)
    for epoch, (metric, loss) in enumerate(epochs):
        if epoch == restart_after:
            state = callback.state_dict()
            callback = BestCheckpoint(folder, monitor, top_k)
            callback.load_state_dict(state)
            callback.on_train_start(alone(epoch), None)
        callback.on_validation_end(FakeTrainer(monitor, epoch, metric, loss), None)
    return files(folder)


@pytest.mark.parametrize("restart_after", [None, 1, 2])
@pytest.mark.parametrize(
    ("monitor", "epochs", "best"),
    [
        ("val/acc", [(0.5, 1.0), (0.9, 2.0), (0.8, 0.1)], 1),
        ("val/acc", [(0.9, 0.5), (0.9, 0.4), (0.9, 0.6)], 1),
        ("val/acc", [(0.9, 0.5), (0.9, 0.5)], 0),
        ("val/loss", [(0.5, 0.5), (0.3, 0.3), (0.4, 0.4)], 1),
        ("val/acc", [(NAN, NAN), (0.1, 3.0), (NAN, 0.0)], 1),
        ("val/acc", [(0.1, 3.0), (0.9, NAN), (0.9, float("inf"))], 0),  # logits of nan are the first class's
    ],
)
def test_the_best_epoch(tmp_path, monitor, epochs, best, restart_after):
    assert train(tmp_path, epochs, monitor, restart_after=restart_after) == {"best.ckpt": best}


@pytest.mark.parametrize("restart_after", [None, 1, 3])
def test_the_best_k_epochs_have_files_and_the_others_have_none(tmp_path, restart_after):
    epochs = [(0.1, 1), (0.5, 1), (0.3, 1), (0.4, 1), (0.2, 1)]
    assert train(tmp_path, epochs, top_k=3, restart_after=restart_after) == {
        "best.ckpt": 1,
        "epoch-0002.ckpt": 1,
        "epoch-0003.ckpt": 2,
        "epoch-0004.ckpt": 3,
    }


def test_an_epoch_that_is_trained_again_leaves_the_same_files(tmp_path):
    """The best files are written before the position: after a kill between the two the epoch comes again."""
    callback = BestCheckpoint(tmp_path, "val/acc", 2)
    epochs = [(0.1, 1), (0.5, 1), (0.7, 1)]
    for epoch, values in enumerate(epochs[:2]):
        callback.on_validation_end(FakeTrainer("val/acc", epoch, *values), None)
    state = callback.state_dict()
    for _ in range(2):
        callback = BestCheckpoint(tmp_path, "val/acc", 2)
        callback.load_state_dict(state)
        callback.on_train_start(alone(2), None)
        callback.on_validation_end(FakeTrainer("val/acc", 2, *epochs[2]), None)
        assert files(tmp_path) == {"best.ckpt": 2, "epoch-0002.ckpt": 1, "epoch-0003.ckpt": 2}


@pytest.mark.parametrize("what", ["missing", "damaged", "older"])
def test_a_best_file_that_is_lost_is_said_and_chosen_anew(tmp_path, caplog, what):
    callback = BestCheckpoint(tmp_path, "val/acc")
    callback.on_validation_end(FakeTrainer("val/acc", 5, 0.9, 1.0), None)
    best = tmp_path / "best.ckpt"
    if what == "missing":
        best.unlink()
    elif what == "damaged":
        best.write_bytes(best.read_bytes()[:-9])
    else:
        write(3, best)
    callback.on_train_start(alone(6), None)
    assert "best.ckpt" in caplog.text
    callback.on_validation_end(FakeTrainer("val/acc", 6, 0.2, 1.0), None)
    assert files(tmp_path) == {"best.ckpt": 6}


@pytest.mark.parametrize("what", ["missing", "damaged", "of another epoch"])
def test_lost_files_of_the_best_epochs_are_said_and_the_others_are_kept(tmp_path, caplog, what):
    callback = BestCheckpoint(tmp_path, "val/acc", 3)
    for epoch, metric in enumerate([0.5, 0.9, 0.7]):
        callback.on_validation_end(FakeTrainer("val/acc", epoch, metric, 1.0), None)
    lost, left_over = tmp_path / "epoch-0003.ckpt", tmp_path / "epoch-0000.ckpt"
    left_over.write_bytes(b"of a run that was killed before it removed the file")
    (tmp_path / "epoch-0002.ckpt").unlink()  # best.ckpt has that epoch too
    if what == "missing":
        lost.unlink()
    elif what == "damaged":
        lost.write_bytes(lost.read_bytes()[:-9])
    else:
        write(7, lost)
    callback.on_train_start(alone(4), None)
    assert [score.epoch for score in callback.kept] == [1, 0]
    assert "epoch 3: epoch-0003.ckpt" in caplog.text
    assert "epoch 2" not in caplog.text
    assert not left_over.exists()


def test_a_best_file_that_is_newer_than_the_position_is_no_loss(tmp_path, caplog):
    """The run was killed between the two; it will train that epoch again."""
    callback = BestCheckpoint(tmp_path, "val/acc")
    callback.on_validation_end(FakeTrainer("val/acc", 0, 0.5, 1.0), None)
    write(3, tmp_path / "best.ckpt")
    callback.on_train_start(alone(1), None)
    assert [score.epoch for score in callback.kept] == [0]
    assert not caplog.text
