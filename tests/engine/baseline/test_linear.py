"""The linear model is the one that scikit-learn finds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression, Ridge
from torch.nn.functional import cross_entropy

from src.config import Config
from src.engine.baseline import linear
from src.engine.baseline.linear import fit_linear, scale_of
from src.models.losses import ClassificationLoss
from src.tasks.regression import Regression

DIGITS = load_digits()
FEATURES = torch.tensor(DIGITS.data, dtype=torch.float32)
LABELS = torch.tensor(DIGITS.target)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def scaled(features: torch.Tensor, like: torch.Tensor | None = None) -> np.ndarray:
    like = features if like is None else like
    return ((features - like.mean(0)) / scale_of(like)).numpy()


def order(number: int, seed: int = 0) -> list[int]:
    return torch.randperm(number, generator=torch.Generator().manual_seed(seed)).tolist()


def test_of_classes_it_is_logistic_regression():
    features, labels = FEATURES[:600], LABELS[:600]
    model = fit_linear(features, labels, ClassificationLoss().eval(), 10, order(600))
    expected = LogisticRegression(C=1 / (600 * model.strength), max_iter=2000, tol=1e-8).fit(scaled(features), labels)
    found = model.logits(FEATURES[600:]).softmax(1)
    wanted = expected.predict_proba(scaled(FEATURES[600:], like=features))
    assert np.abs(found.numpy() - wanted).max() < 0.05
    assert np.abs(found.numpy() - wanted).mean() < 0.001
    assert (found.argmax(1) == LABELS[600:]).float().mean() > 0.9


def test_of_numbers_it_is_ridge_regression(monkeypatch):
    monkeypatch.setattr(linear, "STRENGTHS", (0.3,))
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(80, 5, generator=generator) * torch.tensor([1.0, 10, 0.1, 3, 1]) + 4
    values = features @ torch.randn(5, 2, generator=generator) + torch.randn(80, 2, generator=generator)
    kind = Regression()
    kind.values = {"mean": tuple(values.mean(0).tolist()), "std": tuple(values.std(0, correction=0).tolist())}
    model = fit_linear(features, values, kind.loss(Config(), ("a", "b"), values), 2, order(80))
    # squared errors are a mean over 80 images and 2 names
    expected = Ridge(alpha=0.5 * 0.3 * 160).fit(scaled(features), kind.standardised(values).numpy())
    assert model.logits(features).numpy() == pytest.approx(expected.predict(scaled(features)), abs=1e-3)


def test_cross_validation_chooses_what_fits_unseen_images():
    """Many features of noise and few images ask for a strong regularisation, clear classes for a weak one."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    noise = torch.randn(60, 200, generator=generator)
    noise[:, 0] += labels
    clear = torch.randn(600, 4, generator=generator)
    clear[:, :3] += 4 * torch.eye(3)[torch.arange(600) % 3]
    loss = ClassificationLoss().eval()
    strong = fit_linear(noise, labels, loss, 3, order(60)).strength
    weak = fit_linear(clear, torch.arange(600) % 3, loss, 3, order(600)).strength
    assert strong >= 1
    assert weak <= 0.03


def test_folds_have_every_image_once_and_every_class():
    labels = torch.tensor([0] * 50 + [1] * 5)
    held_out = [held for _, held in linear._folds(labels, order(55))]
    assert sorted(torch.cat(held_out).tolist()) == list(range(55))
    assert [int(labels[held].sum()) for held in held_out] == [1] * 5
    assert all(len({*train.tolist()} & {*held.tolist()}) == 0 for train, held in linear._folds(labels, order(55)))


def test_a_feature_that_never_changes_and_few_images():
    features = torch.cat([torch.full((6, 1), 5.0), torch.arange(6.0)[:, None]], 1)
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    model = fit_linear(features, labels, ClassificationLoss().eval(), 2, order(6))
    assert model.logits(features).argmax(1).equal(labels)
    assert cross_entropy(model.logits(features), labels) < 0.6


def test_a_feature_that_hardly_any_training_image_has_decides_nothing():
    features = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    features[:, 3] = 0
    features[0, 3] = 1e-3
    labels = (features[:, 0] > 0).long()
    model = fit_linear(features, labels, ClassificationLoss().eval(), 2, order(50))
    odd = features.clone()
    odd[:, 3] = 1
    assert (model.logits(odd).argmax(1) == model.logits(features).argmax(1)).float().mean() > 0.9


def test_a_single_fold_has_to_do_for_many_images(monkeypatch):
    fits = []
    monkeypatch.setattr(linear, "MOST_PRODUCTS", 1000)
    monkeypatch.setattr(linear, "_fit", lambda *_, fit=linear._fit: fits.append(1) or fit(*_))
    fit_linear(FEATURES[:100], LABELS[:100], ClassificationLoss().eval(), 10, order(100))
    assert len(fits) <= len(linear.STRENGTHS) + 1
