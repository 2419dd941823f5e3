"""Checkpoints that somebody else put into the folder of a run: refused, with a whole one beside them used instead."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import lightning as L
import pytest
import torch

from src.engine.runs.checksum import save_with_checksum
from src.engine.runs.errors import ExitCode, UserError
from src.engine.runs.fit_errors import explained
from src.engine.runs.reading import flaw, newest_position
from src.engine.runs.selection import best_weights


class Steps(L.LightningModule):
    """Four batches an epoch of a linear layer, with an optimizer and a schedule that have a state."""

    def __init__(self) -> None:
        super().__init__()
        self.network = torch.nn.Linear(3, 2)

    def training_step(self, batch, batch_idx):
        return self.network(batch[0]).square().mean()

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters())
        return [optimizer], [
            {"scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0), "interval": "step"}
        ]

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(8, 3)), 2)


def fit(folder: Path, epochs: int, start: Path | None = None) -> L.Trainer:
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    with explained(trainer, start):
        trainer.fit(Steps(), ckpt_path=start, weights_only=True)
    return trainer


@pytest.fixture(scope="module")
def position(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("position")
    fit(folder, 1).save_checkpoint(folder / "plain.ckpt")
    return torch.load(folder / "plain.ckpt", weights_only=True)


def write(content: object, path: Path) -> Path:
    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as file:
        save_with_checksum(content, file)
    return path


class Payload:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def changed(position: dict, **values) -> dict:
    """A copy; key a__b stands for ["a"]["b"], and a value of None takes the key away."""
    content = copy.deepcopy(position)
    for key, value in values.items():
        *way, last = key.split("__")
        inner = content
        for part in way:
            inner = inner[int(part) if isinstance(inner, list) else part]
        inner.pop(last) if value is None else inner.update({last: value})
    return content


EPOCHS, STEPS = "loops__fit_loop__epoch_progress__current", "loops__fit_loop__epoch_loop.batch_progress__total"
CHANGES = {
    "without loops": {"loops": None},
    "without weights": {"state_dict": None},
    "with empty weights": {"state_dict": {}},
    "with other things for weights": {"state_dict": {"network.weight": [1.0]}},
    "without optimizer": {"optimizer_states": None},
    "without schedule": {"lr_schedulers": []},
    "epoch too high": {"epoch": 10**18},
    "epoch below 0": {"epoch": -1},
    "epoch not a number": {"epoch": float("nan")},
    "epoch a truth": {"epoch": True},
    "more epochs than the run has": {"epoch": 99, f"{EPOCHS}__processed": 99, f"{EPOCHS}__ready": 99},
    "epochs that contradict": {f"{EPOCHS}__processed": 3},
    "steps that contradict": {"global_step": 2},
    "more steps than batches": {f"{STEPS}__ready": 1},
    "a counter below 0": {f"{STEPS}__started": -5},
    "a counter of text": {f"{STEPS}__completed": "4"},
    "callbacks no mapping": {"callbacks": [1]},
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_position_that_is_none_is_refused_and_a_whole_one_beside_it_is_used(tmp_path, position, caplog, what):
    last = write(changed(position, **CHANGES[what]), tmp_path / "last.ckpt")
    with pytest.raises(UserError) as caught:
        newest_position(tmp_path, 5)
    assert caught.value.code == ExitCode.DATA
    assert "is no checkpoint of this run" in caught.value.why
    previous = write(position, tmp_path / "previous.ckpt")
    assert newest_position(tmp_path, 5) == previous
    assert f"{last} holds code, or is no checkpoint" in caplog.text
    write(position, last)  # the negative control
    assert newest_position(tmp_path, 5) == last


@pytest.mark.parametrize("content", [[1, 2], {}, "text", None, torch.ones(2), {1: 2}, {"epoch": 0}, [[]] * 3])
def test_files_of_other_things_are_refused(tmp_path, content):
    assert "is no checkpoint" in flaw(write(content, tmp_path / "best.ckpt"))


@pytest.mark.parametrize("name", ["last.ckpt", "best.ckpt"])
def test_a_checkpoint_with_code_and_a_right_checksum_is_refused_without_torchs_advice(tmp_path, position, name):
    mark = tmp_path / "ran"
    for content in (Payload(mark), position | {"state_dict": Payload(mark)}, position | {"more": Payload(mark)}):
        write(content, tmp_path / name)
        with pytest.raises(UserError) as caught:
            newest_position(tmp_path) if name == "last.ckpt" else best_weights(tmp_path, [0], {"x": torch.ones(1)})
        assert caught.value.code in (ExitCode.DATA, ExitCode.DAMAGED)
        assert "holds code" in caught.value.render()
        assert "weights_only" not in caught.value.render()
    assert not mark.exists()


def test_best_weights_of_another_network_give_way_to_those_of_this_one(tmp_path, position):
    own = {name.removeprefix("network."): tensor for name, tensor in position["state_dict"].items()}
    write(changed(position, state_dict={"network.weight": torch.ones(5, 5)}), tmp_path / "best.ckpt")
    with pytest.raises(UserError) as caught:
        best_weights(tmp_path, [0], own)
    assert caught.value.code == ExitCode.DATA
    write(position, tmp_path / "epoch-0001.ckpt")
    assert best_weights(tmp_path, [0], own)[0] == position["epoch"] + 1


RESTORED = {
    "weights of another shape": {"state_dict": {"network.weight": torch.ones(7, 3), "network.bias": torch.ones(7)}},
    "weights of other names": {"state_dict": {"other": torch.ones(2)}},
    "optimizer of other groups": {"optimizer_states": [{"state": {}, "param_groups": []}]},
    "optimizer of another shape": {
        "optimizer_states__0__state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.ones(9), "exp_avg_sq": 1}}
    },
    "optimizer of text": {"optimizer_states": ["text"]},
    "a schedule that replaces a method": {"lr_schedulers__0__step": 3},
    "a schedule of another kind": {"lr_schedulers__0__last_epoch": "3"},
}


@pytest.mark.parametrize("what", RESTORED)
def test_what_does_not_fit_the_run_is_refused_before_the_first_step(tmp_path, position, what):
    start = write(changed(position, **RESTORED[what]), tmp_path / "last.ckpt")
    with pytest.raises(UserError) as caught:
        fit(tmp_path, 2, start)
    assert caught.value.code == ExitCode.DATA
    assert str(start) in caught.value.found
    assert fit(tmp_path, 2, write(position, start)).global_step == 8  # the negative control


def test_a_mistake_after_the_position_was_taken_up_is_not_blamed_on_the_file(tmp_path, position, monkeypatch):
    monkeypatch.setattr(
        Steps, "training_step", lambda self, batch, batch_idx: 1 / 0 if batch_idx else {}["no such key"]
    )
    start = write(position, tmp_path / "last.ckpt")
    with pytest.raises(KeyError):
        fit(tmp_path, 2, start)
