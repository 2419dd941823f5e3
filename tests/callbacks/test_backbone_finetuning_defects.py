"""Why there is a freezing of our own: six defects of Lightning's BackboneFinetuning, each beside ours without it.

The sixth needs two processes: tests/distributed/test_freezing_ddp.py. docs/freezing.md lists all of them.
"""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from tests.engine.runs.small_training import Stock, classifier, fit, freezing, images, plan

MENDED = "Lightning has mended this defect: strike it from docs/freezing.md, and this test"
IMAGES = torch.stack([images().read(index) for index in range(6)])


def features(model, training=None):
    """What the backbone makes of six images, in the mode its layers are in or, if told, all in train or eval mode."""
    if training is not None:
        model.network.train(training)
    with torch.no_grad():
        return model.network.features(IMAGES)


def test_defect_1_a_frozen_backbone_changes():
    """Its BatchNorm stays in train mode and goes on moving its statistics."""
    stock, ours = Stock(), classifier()
    pretrained = features(ours, training=False)
    fit(stock, 2, BackboneFinetuning(unfreeze_backbone_at_epoch=2))
    fit(ours, 2, freezing(preset="head_only"))
    assert not features(stock, training=False).allclose(pretrained, atol=0.01), MENDED
    assert features(ours, training=False).equal(pretrained)


def test_defect_1_a_frozen_backbone_keeps_its_activations():
    """Its BatchNorm still takes gradients, for which the activations of the whole backbone are kept."""

    def kept(model) -> int:
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: sizes.append(tensor.numel()), lambda _: None):
            model.network(IMAGES)
        return sum(sizes)

    stock, ours = Stock(), classifier()
    BackboneFinetuning().freeze_before_training(stock)
    everything = kept(ours)
    plan(preset="head_only").apply(ours.network, 0)
    assert kept(stock) > everything / 2, MENDED
    assert kept(ours) < everything / 50


class WithoutBatchNorm(BackboneFinetuning):
    """How its documentation says that BatchNorm is to be frozen too."""

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.backbone, train_bn=False)


def test_defect_2_frozen_batchnorm_trains_on_other_features_than_it_is_evaluated_on():
    """track_running_stats=False makes it normalise by the batch in training, by the stored statistics in eval mode."""
    stock, ours = Stock(), classifier()
    stock.backbone.dropout = ours.network.backbone.dropout = torch.nn.Identity()
    fit(stock, 1, WithoutBatchNorm())
    fit(ours, 1, freezing(preset="head_only"))
    assert not features(stock).allclose(features(stock, training=False), atol=0.1), MENDED
    assert features(ours).equal(features(ours, training=False))


def test_defect_3_a_continued_run_freezes_again(tmp_path):
    def learns_after_continuing(build_model, build_callback) -> bool:
        model, again = build_model(), build_model()
        fit(model, 3, build_callback()).save_checkpoint(tmp_path / "last.ckpt")
        assert model.network.backbone.stem[0].weight.requires_grad
        fit(again, 4, build_callback(), resume=tmp_path / "last.ckpt")
        return again.network.backbone.stem[0].weight.requires_grad

    assert not learns_after_continuing(Stock, lambda: BackboneFinetuning(unfreeze_backbone_at_epoch=1)), MENDED
    assert learns_after_continuing(classifier, lambda: freezing(preset="last_n", unfreeze_epoch=1))


def test_defect_4_a_parameter_that_equals_another_is_never_trained():
    """What is in the optimizer already is found by value: a bias of zeros seems to be another bias of zeros."""
    stock, ours = Stock(), classifier()
    for model in (stock, ours):
        model.network.head = torch.nn.Sequential(torch.nn.BatchNorm1d(8), model.network.head)
    zeros = "backbone.layer2.1.bias"  # BatchNorm's, as the head's own BatchNorm has one
    fit(stock, 1, BackboneFinetuning(unfreeze_backbone_at_epoch=0))
    fit(ours, 1, freezing(preset="full"))
    assert stock.network.get_parameter(zeros).eq(0).all(), MENDED
    assert not ours.network.get_parameter(zeros).eq(0).any()


@pytest.mark.parametrize(
    ("scheduler", "same_of_ours"),
    [
        (lambda optimizer: LambdaLR(optimizer, lambda epoch: 0.9**epoch), "constant"),
        (lambda optimizer: OneCycleLR(optimizer, 0.1, 12), "onecycle"),
    ],
    ids=["LambdaLR", "OneCycleLR"],
)
def test_defect_5_a_group_that_is_added_later_breaks_schedulers(scheduler, same_of_ours):
    fit(classifier(3, schedule=same_of_ours), 3, freezing(preset="last_n", unfreeze_epoch=1))
    try:
        fit(Stock(scheduler), 3, BackboneFinetuning(unfreeze_backbone_at_epoch=1))
    except (ValueError, KeyError):
        return
    pytest.fail(MENDED)
