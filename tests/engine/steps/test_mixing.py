"""data.mix: what an image of two looks like, and that loss and gradient are those of the whole batch however it is divided."""

from __future__ import annotations

from dataclasses import replace

import lightning as L
import pytest
import torch

from src.engine.steps.mixing import Mix, MixedLabels
from src.engine.steps.out_of_memory import OutOfMemory
from src.models.losses import ClassificationLoss, MultilabelLoss
from tests.engine.runs.small_training import classifier, fit, freezing
from tests.engine.steps.little_memory import FailInBackward
from tests.tolerance import DOUBLE

IMAGES = torch.arange(6, dtype=torch.uint8).mul(40)[:, None, None, None].expand(6, 3, 20, 20).contiguous()
LABELS = torch.arange(6)


def shares(mixed: MixedLabels, images: torch.Tensor) -> torch.Tensor:
    """How much of each image is the first one, by its brightness; nan where it was mixed with itself."""
    first, second = 40.0 * mixed.first, 40.0 * mixed.second
    return (images.float().mean((1, 2, 3)) - second) / (first - second)


@pytest.mark.parametrize("form", ["mixup", "cutmix"])
def test_an_image_shows_two_as_its_labels_say(form):
    mix = Mix.of(form, 1.0)
    for step in range(20):
        images, labels = mix(IMAGES, LABELS, 0, step, 0)
        assert (images.dtype, images.shape) == (torch.uint8, IMAGES.shape)
        assert labels.first.equal(LABELS)
        assert sorted(labels.second.tolist()) == LABELS.tolist()
        assert 0.5 <= labels.share <= 1
        found = shares(labels, images)
        torch.testing.assert_close(found[found.isfinite()].mean().item(), labels.share, atol=0.01, rtol=0)
        if form == "cutmix":
            assert set(images.unique().tolist()) <= set(IMAGES.unique().tolist())
    assert IMAGES.flatten(1)[:, 0].tolist() == [0, 40, 80, 120, 160, 200], "the batch itself was changed"


def test_the_same_step_mixes_alike_and_draws_from_no_global_generator():
    mix, state = Mix.of("cutmix", None), torch.get_rng_state()
    one, again, other = (mix(IMAGES, LABELS, 0, step, 0) for step in (3, 3, 4))
    assert one[0].equal(again[0])
    assert one[1].second.equal(again[1].second)
    assert not one[1].second.equal(other[1].second)
    assert torch.get_rng_state().equal(state)
    assert Mix.of("none", 0.4) is None


@pytest.mark.parametrize("weights", [None, [0.2, 1.0, 5.0]])
def test_the_loss_of_a_batch_follows_from_its_parts(weights):
    """With class weights too, which weigh both labels of an image."""
    torch.manual_seed(0)
    loss, logits = ClassificationLoss(weights).double(), torch.randn(7, 3, dtype=torch.float64)
    loss_of = lambda logits, labels: loss.train()(logits, labels).double()  # noqa: E731
    whole = MixedLabels(torch.tensor([0, 1, 2, 0, 0, 1, 2]), torch.tensor([2, 0, 0, 1, 0, 2, 1]), 0.7)
    parts = whole.split([4, 3])
    divisors = [part.weight(loss.weight) for part in parts]
    means = [part.mean_loss(some, loss_of, loss.weight) for some, part in zip(logits.split([4, 3]), parts, strict=True)]
    expected = whole.mean_loss(logits, loss_of, loss.weight)
    found = sum(mean * divisor for mean, divisor in zip(means, divisors, strict=True)) / sum(divisors)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    if weights is None:
        soft = 0.7 * torch.eye(3)[whole.first] + 0.3 * torch.eye(3)[whole.second]
        reference = torch.nn.functional.cross_entropy(logits, soft.double())
        torch.testing.assert_close(expected, reference, rtol=1e-6, atol=0)


def test_labels_of_several_names_are_mixed_as_targets():
    torch.manual_seed(0)
    logits, first, second = torch.randn(5, 4), torch.rand(5, 4).round(), torch.rand(5, 4).round()
    loss = MultilabelLoss(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    found = MixedLabels(first, second, 0.6).mean_loss(logits, loss, loss.weight)
    torch.testing.assert_close(found, loss(logits, 0.6 * first + 0.4 * second))


class SaveAt(L.Callback):
    """Saves the position in the middle of an epoch."""

    def __init__(self, path, step: int) -> None:
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer: L.Trainer, *args) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def trained(*callbacks, mix="cutmix", limit=None, **settings):
    model = classifier(2, name="sgd", momentum=0.9)
    model.training_settings = replace(model.training_settings, mix=Mix.of(mix, 1.0))
    if limit:
        model.network.backbone.register_forward_hook(
            lambda module, inputs, features: (
                FailInBackward.apply(features) if len(features) > limit and torch.is_grad_enabled() else features
            )
        )
    trainer = fit(model, 2, freezing(2, preset="full", batchnorm="keep"), *callbacks, **settings)
    return trainer, torch.cat([tensor.flatten() for tensor in model.network.state_dict().values()])


def test_a_run_that_goes_on_in_mid_epoch_ends_with_the_same_bits(tmp_path):
    trainer, whole = trained(SaveAt(tmp_path / "6.ckpt", 6))
    assert trained(resume=tmp_path / "6.ckpt")[1].equal(whole)
    assert not trained(mix="none")[1].equal(whole)
    assert 0 <= trainer.callback_metrics["train/acc"] <= 1


@pytest.mark.numbers
def test_a_batch_that_is_repeated_in_parts_is_mixed_as_before(float64):
    parts = OutOfMemory("split", 10**9)
    expected, found = trained(mix="mixup")[1], trained(parts, mix="mixup", limit=3)[1]
    assert parts.parts.size == 3
    torch.testing.assert_close(found, expected, atol=DOUBLE, rtol=0)
