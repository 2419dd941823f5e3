"""model.loss=focal and logit_adjusted against references computed in another way."""

from __future__ import annotations

import pytest
import torch
from torchvision.ops import sigmoid_focal_loss

from src.config import Config, Model
from src.engine.runs.errors import UserError
from src.models.losses import ClassificationLoss, MultilabelLoss
from src.tasks.binary import Binary
from src.tasks.multiclass import Multiclass
from src.tasks.multilabel import Multilabel


def loss_of(kind, names, labels, loss, **options):
    return kind.loss(Config(model=Model(backbone="resnet18", loss=loss, loss_options=options)), names, labels).train()


def test_focal_loss_of_one_logit_and_of_labels_is_torchvisions():
    torch.manual_seed(0)
    logits, labels = 3 * torch.randn(9, 1), torch.randint(0, 2, (9,))
    found = loss_of(Binary(), "ab", labels, "focal", gamma=1.5)(logits, labels)
    expected = sigmoid_focal_loss(logits[:, 0], labels.float(), alpha=-1, gamma=1.5, reduction="mean")
    torch.testing.assert_close(found, expected)
    logits, labels = 3 * torch.randn(9, 4), torch.randint(0, 2, (9, 4)).float()
    found = loss_of(Multilabel(), "abcd", labels, "focal")(logits, labels)
    torch.testing.assert_close(found, sigmoid_focal_loss(logits, labels, alpha=-1, gamma=2, reduction="mean"))


def test_gamma_0_is_the_plain_loss_and_a_root_has_a_finite_slope():
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 3), torch.tensor([0, 1, 2, 2, 1, 0])
    plain = ClassificationLoss()(logits, labels)
    torch.testing.assert_close(loss_of(Multiclass(), "abc", labels, "focal", gamma=0)(logits, labels), plain)
    sure = torch.tensor([[200.0, 0.0, 0.0]], requires_grad=True)
    loss_of(Multiclass(), "abc", labels, "focal", gamma=0.5)(sure, torch.tensor([0])).backward()
    assert sure.grad.isfinite().all()
    many = torch.randint(0, 2, (6, 3)).float()
    multilabel = loss_of(Multilabel(), "abc", many, "focal", gamma=0)
    torch.testing.assert_close(multilabel(logits, many), MultilabelLoss()(logits, many))


def test_logit_adjustment_learns_what_the_image_says_without_the_classes_shares():
    """Images that say nothing: the adjusted loss is least where all logits are equal, however uneven the classes are."""
    labels = torch.tensor([0] * 90 + [1] * 9 + [2])
    loss = loss_of(Multiclass(), "abc", labels, "logit_adjusted")
    logits = torch.zeros(100, 3, requires_grad=True)
    loss(logits, labels).backward()
    assert logits.grad.sum(0).abs().max() < 1e-6
    torch.testing.assert_close(loss.eval()(logits, labels), ClassificationLoss()(logits, labels))
    half = loss_of(Multiclass(), "abc", labels, "logit_adjusted", tau=0.5)
    shares = torch.tensor([0.9, 0.09, 0.01])
    expected = torch.nn.functional.cross_entropy((0.5 * shares.log()).expand(100, 3), labels)
    torch.testing.assert_close(half(logits, labels), expected)
    assert not loss.state_dict(), "the counts would be in every checkpoint"


@pytest.mark.parametrize(("loss", "options"), [("focal", {"gamma": -1}), ("logit_adjusted", {"tau": "much"})])
def test_an_option_out_of_range_is_refused(loss, options):
    with pytest.raises(UserError, match="out of range"):
        loss_of(Multiclass(), "ab", torch.tensor([0, 1]), loss, **options)
