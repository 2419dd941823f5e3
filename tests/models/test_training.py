"""Loss, metrics, optimizer and schedule against references computed in another way."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import balanced_accuracy_score, f1_score
from torch import nn

from src.config import Optimizer
from src.models.losses import ClassificationLoss, balanced_weights, predicted_classes, probabilities
from src.models.metrics import SplitMetrics
from src.models.optimizers import build_optimizer, build_schedule


def test_metrics_are_those_of_scikit_learn():
    torch.manual_seed(0)
    labels = torch.cat([torch.zeros(40), torch.ones(8), torch.full((3,), 2)]).long()
    predicted = torch.where(torch.rand(51) < 0.6, labels, torch.randint(0, 3, (51,)))
    metrics = SplitMetrics(3)
    for part in torch.arange(51).split(20):
        metrics.update(torch.tensor(float(len(part))), predicted[part], labels[part])
    values = metrics.compute()
    assert values["acc"] == pytest.approx((labels == predicted).float().mean().item())
    assert values["balanced_acc"] == pytest.approx(balanced_accuracy_score(labels, predicted))
    assert values["macro_f1"] == pytest.approx(f1_score(labels, predicted, average="macro"))
    assert values["loss"] == pytest.approx((20 * 20 + 20 * 20 + 11 * 11) / 51)


def test_a_class_without_pictures_counts_in_no_mean():
    metrics = SplitMetrics(4)
    metrics.update(torch.tensor(1.0), torch.tensor([0, 1, 1]), torch.tensor([0, 1, 1]))
    assert metrics.compute()["balanced_acc"] == metrics.compute()["macro_f1"] == 1.0


def test_the_binary_loss_is_torchs_own():
    torch.manual_seed(0)
    logits, labels = torch.randn(9, 1), torch.randint(0, 2, (9,))
    expected = F.binary_cross_entropy_with_logits(logits[:, 0], labels.float())
    torch.testing.assert_close(ClassificationLoss("binary")(logits, labels), expected)
    factors = torch.tensor([0.7, 2.0])[labels]
    each = F.binary_cross_entropy_with_logits(logits[:, 0], labels.float(), factors, reduction="none")
    torch.testing.assert_close(ClassificationLoss("binary", [0.7, 2.0])(logits, labels), each.sum() / factors.sum())
    both = torch.cat([torch.zeros(9, 1), logits], 1)
    torch.testing.assert_close(probabilities(logits, "binary"), both.softmax(1))
    assert predicted_classes(logits, "binary").tolist() == both.argmax(1).tolist()


def test_balanced_weights_are_those_of_scikit_learn():
    from sklearn.utils.class_weight import compute_class_weight

    labels = [0] * 30 + [1] * 5 + [2]
    assert balanced_weights([30, 5, 1]) == pytest.approx(
        compute_class_weight("balanced", classes=np.array([0, 1, 2]), y=labels).tolist()
    )


def test_label_smoothing_is_for_training_only():
    logits, labels = torch.randn(5, 3), torch.tensor([0, 1, 2, 2, 1])
    weights = torch.tensor([1.0, 2.0, 3.0])
    loss = ClassificationLoss("multiclass", weights.tolist(), label_smoothing=0.1)
    torch.testing.assert_close(
        loss.train()(logits, labels), F.cross_entropy(logits, labels, weights, label_smoothing=0.1)
    )
    torch.testing.assert_close(loss.eval()(logits, labels), F.cross_entropy(logits, labels, weights))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.head = nn.Linear(4, 2)


def test_every_parameter_is_in_one_group_from_the_start_frozen_or_not():
    network = Network()
    network.backbone.requires_grad_(False)
    config = Optimizer(name="adamw", lr=0.01, backbone_lr_scale=0.1, weight_decay=0.05)
    groups = build_optimizer(network, config).param_groups
    found = {group["name"]: (group["lr"], group["weight_decay"], len(group["params"])) for group in groups}
    assert found == {
        "backbone": (0.001, 0.05, 1),
        "backbone/no_decay": (0.001, 0.0, 3),
        "head": (0.01, 0.05, 1),
        "head/no_decay": (0.01, 0.0, 1),
    }


@pytest.mark.parametrize("name", ["cosine", "onecycle", "constant"])
def test_schedules(name):
    config = Optimizer(name="adamw", lr=1.0, backbone_lr_scale=0.1, schedule=name, warmup_fraction=0.2)
    optimizer = build_optimizer(Network(), config)
    schedule = build_schedule(optimizer, config, total_steps=50)
    rates = []
    for _ in range(50):
        rates.append(optimizer.param_groups[-1]["lr"])
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * rates[-1])
        optimizer.step()
        schedule.step()
    assert rates.index(max(rates)) == 10
    assert rates[:11] == sorted(rates[:11])
    assert rates[0] > 0
    assert rates[-1] == pytest.approx({"cosine": 0.0, "onecycle": 0.0, "constant": 1.0}[name], abs=0.01)
    if name == "cosine":
        assert rates[30] == pytest.approx((1 + math.cos(math.pi * 20 / 40)) / 2)
