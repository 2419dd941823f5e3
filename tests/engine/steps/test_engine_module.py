"""What a training step and a position are, beside the tests of those who use them."""

from __future__ import annotations

import copy

import torch

from tests.engine.runs.small_training import classifier, fit


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
