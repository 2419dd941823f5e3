"""The loss with class weights: what it trains for, and that it is the loss of the whole split however that is divided."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import lightning as L
import pytest
import torch
import torch.nn.functional as F

from src.config import Config, Data, Optimizer
from src.data.module import ImageData
from src.engine.images.sampler import EpochSampler, Share
from src.engine.runs.measuring import measure_split
from src.engine.runs.trained_model import TrainedModel
from src.engine.steps.engine_module import Training
from src.engine.steps.metrics import SplitMetrics, WeightedMean
from src.models.classifier import Classifier
from src.models.losses import ClassificationLoss, class_weights
from src.tasks import multiclass
from src.tasks.multiclass import Multiclass
from tests.engine.runs.small_training import QUIET, SQUARE, freezing, images, metrics_of, network
from tests.engine.runs.test_model_folder import CARD

WEIGHTS = [0.2, 1.0, 34.6]  # as 171 images and one have them


def test_with_label_smoothing_an_image_is_trained_for_its_own_class():
    """980 images of a class and 20 of another: the best logits are those of the smoothed target, for both."""
    weights = class_weights([980, 20], "inverse")
    loss = ClassificationLoss(weights, label_smoothing=0.1).train()
    for label in (0, 1):
        target = torch.full((1, 2), 0.05)
        target[0, label] = 0.95
        logits = target.log().requires_grad_()
        loss(logits, torch.tensor([label])).backward()
        assert logits.grad.abs().max() < 1e-6, "these logits are not the ones it trains for"


def test_the_forms_of_class_weights():
    from sklearn.utils.class_weight import compute_class_weight

    counts = [171, 30, 5, 1]
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    classes = torch.arange(4).numpy()
    assert class_weights(counts, "none") is None
    inverse = class_weights(counts, "inverse")
    assert inverse == pytest.approx(compute_class_weight("balanced", classes=classes, y=labels).tolist())
    balanced = class_weights(counts, "balanced")
    for weights in (inverse, balanced):
        assert sum(weight * count for weight, count in zip(weights, counts, strict=True)) == pytest.approx(207)
        assert weights == sorted(weights)
    assert balanced[3] / balanced[0] == pytest.approx(10), (
        "a class of one image weighs ten times the largest one at most"
    )
    assert balanced[1] / balanced[0] == pytest.approx(171 / 30)
    assert class_weights([10, 0], "balanced")[1] == class_weights([10, 0], "inverse")[1] == 10.0


@pytest.fixture
def split() -> tuple[torch.Tensor, torch.Tensor, ClassificationLoss, float]:
    """Logits (501, 3) and labels of uneven classes, and the weighted loss of the whole in float64."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.multinomial(torch.tensor([0.9, 0.09, 0.01]), 501, replacement=True, generator=generator)
    logits = 3 * torch.randn(501, 3, generator=generator)
    weights = torch.tensor(WEIGHTS, dtype=torch.float64)
    whole = F.cross_entropy(logits.double(), labels, weights).item()
    return logits, labels, ClassificationLoss(WEIGHTS).eval(), whole


def measured(logits: torch.Tensor, labels: torch.Tensor, loss: ClassificationLoss, size: int) -> SplitMetrics:
    metrics = SplitMetrics(Multiclass(), "abc")
    for some, theirs in zip(logits.split(size), labels.split(size), strict=True):
        metrics.update(loss(some, theirs), some, theirs, loss.weight(theirs))
    return metrics


@pytest.mark.parametrize("size", [1, 7, 32, 501])
@pytest.mark.parametrize("shuffled", [False, True])
def test_the_loss_of_a_split_does_not_depend_on_batches_and_order(split, size, shuffled):
    logits, labels, loss, whole = split
    order = torch.randperm(501) if shuffled else torch.arange(501)
    metrics = measured(logits[order], labels[order], loss, size)
    assert metrics.compute()["loss"] == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("processes", [2, 3])
def test_the_loss_of_a_split_does_not_depend_on_the_number_of_processes(split, processes):
    logits, labels, loss, whole = split
    first, *others = (measured(logits[rank::processes], labels[rank::processes], loss, 7) for rank in range(processes))
    for other in others:
        first.loss.merge_state(other.loss)
    assert first.compute()["loss"] == pytest.approx(whole, rel=1e-6)


def test_many_small_numbers_beside_a_large_one():
    """float32 would drop every one of them: 2**25 + 1 is 2**25."""
    mean = WeightedMean()
    mean.update(torch.tensor(1.0), 2.0**25)
    for _ in range(1000):
        mean.update(torch.tensor(3.0), 1)
    assert float(mean.compute()) == pytest.approx((2**25 + 3000) / (2**25 + 1000), rel=1e-9)
    assert float(mean.compute()) - 1 == pytest.approx(2000 / 2**25, rel=1e-3)


def test_a_loss_that_is_not_a_number_shows():
    metrics = SplitMetrics(Multiclass(), "ab")
    for value in (1.0, torch.nan):
        metrics.update(torch.tensor(value), torch.zeros(1, 2), torch.tensor([0]), 1)
    assert metrics.compute()["loss"] != metrics.compute()["loss"]


def still(**data: object) -> dict[str, float]:
    """What an epoch reports of a network that does not change: lr 0, BatchNorm in eval mode."""
    loss = ClassificationLoss(WEIGHTS, label_smoothing=0.1)
    config = Optimizer(name="sgd", lr=0.0, momentum=0.0)
    model = Classifier(network(), loss, config, Training(total_steps=99), *metrics_of(3))
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=[freezing(1, preset="head_only")],
        enable_checkpointing=False,
        **QUIET,
    )
    module = ImageData(Data(augment="none", num_workers=0, **data), images(), SQUARE, seed=0)
    trainer.fit(model, module)
    return {name: float(trainer.callback_metrics[name]) for name in ("train/loss", "val/loss")}


@pytest.mark.numbers
@pytest.mark.parametrize("size", [2, 3, 7])
def test_training_reports_the_loss_of_the_whole_split(float64, size):
    assert still(batch_size=size) == pytest.approx(still(batch_size=20), rel=1e-6)


def test_an_image_that_a_process_computes_twice_counts_once():
    """7 images in batches of 3 for 2 processes: a share of one image is there twice, and counts as one."""
    labels = torch.tensor([0, 2, 1, 0, 0, 2, 1])
    logits = torch.randn(7, 3, generator=torch.Generator().manual_seed(1))
    loss, config = ClassificationLoss(WEIGHTS).eval(), Optimizer(name="sgd", lr=0.1, momentum=0.0)
    found = []
    for rank in range(2):
        model = Classifier(network(), loss, config, Training(total_steps=9), *metrics_of(3))
        sampler = EpochSampler(range(7), 3, seed=0, share=Share(rank, 2))
        for number, keys in enumerate(sampler):
            members = [index for _, index in keys]
            model._num_own = len(sampler.share.of(sampler.whole_batch(0, number)))
            value = model.mean_loss(logits[members], labels[members])
            model.count({"loss": value, "logits": logits[members]}, labels[members])
        found.append(model.train_metrics.loss)
    found[0].merge_state(found[1])
    whole = F.cross_entropy(logits.double(), labels, torch.tensor(WEIGHTS, dtype=torch.float64)).item()
    assert float(found[0].compute()) == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("world", [2, 3])
def test_the_gradients_of_processes_with_other_labels_are_those_of_the_whole_batch(float64, world):
    """7 images in batches of 2, 2 and 3: the processes have images of other classes, and the third of three often none."""
    labels = torch.tensor([0, 2, 1, 0, 0, 2, 1])
    images = torch.randint(0, 256, (7, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))

    def gradient(rank: int, world: int, number: int) -> torch.Tensor:
        loss, config = ClassificationLoss(WEIGHTS), Optimizer(name="sgd", lr=0.1, momentum=0.0)
        model = Classifier(network(), loss, config, Training(total_steps=9), *metrics_of(3)).double().eval()
        sampler = EpochSampler(range(7), 2, seed=0, share=Share(rank, world))
        whole = sampler.whole_batch(0, number)
        trainer = SimpleNamespace(
            strategy=None,
            global_rank=rank,
            world_size=world,
            global_step=number,
            current_epoch=0,
            datamodule=SimpleNamespace(labels_of_batch=lambda *_: (labels[sampler.share.of(whole)], labels[whole])),
        )
        model.trainer = trainer
        model.optimizers = lambda: SimpleNamespace(zero_grad=model.zero_grad, step=lambda: None)
        model.schedules, model.manual_backward = list, model.backward
        members = [index for _, index in list(sampler)[number]]
        model.training_step((images[members], labels[members]), number)
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    for number in range(3):
        averaged = sum(gradient(rank, world, number) for rank in range(world)) / world
        assert torch.allclose(averaged, gradient(0, 1, number), rtol=1e-5, atol=1e-7)


@pytest.mark.numbers
def test_evaluate_gives_the_same_for_every_batch_size(float64):
    everything = replace(images(), splits={"val": list(range(30))})
    model = TrainedModel(replace(CARD, preprocessing=SQUARE, classes=("a", "b", "c")), network(), Multiclass())
    loss = ClassificationLoss(WEIGHTS)
    configs = [Config(data=Data(batch_size=size, num_workers=0)) for size in (1, 7, 30)]
    found = [measure_split(model, everything, "val", config, loss)[0] for config in configs]
    assert found[0] == pytest.approx(found[2], rel=1e-6)
    assert found[1] == pytest.approx(found[2], rel=1e-6)


@pytest.mark.parametrize(("shared", "images"), [(True, 6), (False, 3)])
def test_metrics_are_summed_over_processes_only_where_each_has_a_share(monkeypatch, shared, images):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    metrics = SplitMetrics(Multiclass(), "ab")
    metrics.sync(shared)
    counts = metrics.asking[""].metric
    counts.dist_sync_fn = lambda value, group: [value, value]  # another process that has the same
    metrics.update(torch.tensor(1.0), torch.zeros(3, 2), torch.tensor([0, 1, 0]), 3)
    seen = []
    monkeypatch.setattr(multiclass, "rates", lambda classes: seen.append(int(classes[2].sum())) or {})
    counts.compute()
    assert seen == [images]
