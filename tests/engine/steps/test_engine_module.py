"""What a training step and a position are, beside the tests of those who use them."""

from __future__ import annotations

import copy

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from tests.engine.runs.small_training import CLASSES, WIDTH, classifier, fit


class Batches(L.LightningDataModule):
    """The same one of 6 images, or of their features, to train on and to validate."""

    def __init__(self, inputs: torch.Tensor) -> None:
        super().__init__()
        labels = torch.arange(6) % CLASSES
        self.loader = DataLoader([*zip(inputs, labels, strict=True)], batch_size=6)

    def train_dataloader(self):
        return self.loader

    val_dataloader = train_dataloader


@pytest.mark.parametrize(
    ("inputs", "threads"),
    [(torch.rand(6, WIDTH), {1}), (torch.zeros(6, 3, 8, 8, dtype=torch.uint8), {2})],
    ids=["features", "images"],
)
def test_features_are_computed_with_one_thread(inputs, threads, monkeypatch):
    """Two that wait for each other at every operation take 20 times as long beside another program that computes."""
    before, seen = torch.get_num_threads(), set()
    module = classifier(1)
    monkeypatch.setattr(module, "mean_loss", lambda *arguments: seen.add(torch.get_num_threads()) or loss(*arguments))
    loss = type(module).mean_loss.__get__(module)
    torch.set_num_threads(2)
    try:
        fit(module, 1, module=Batches(inputs))
        assert seen == threads
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_position_of_automatic_optimization_is_continued(tmp_path):
    """Runs of older versions counted their steps in Lightning's other loop."""
    whole = classifier(3)
    fit(whole, 3)
    path = tmp_path / "last.ckpt"
    fit(classifier(3), 1).save_checkpoint(path)
    saved = torch.load(path, weights_only=True)
    loop = saved["loops"]["fit_loop"]
    manual = loop["epoch_loop.manual_optimization.optim_step_progress"]
    loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"] = copy.deepcopy(manual)
    manual["total"] = manual["current"] = {"ready": 0, "completed": 0}
    torch.save(saved, path)

    fit(classifier(3), 2, resume=path).save_checkpoint(path)  # has the old counter beside its own
    continued = classifier(3)
    assert fit(continued, 3, resume=path).global_step == 12
    for name, tensor in whole.state_dict().items():
        assert tensor.equal(continued.state_dict()[name]), name
