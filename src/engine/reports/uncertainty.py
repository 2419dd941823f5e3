"""How sure a metric is that is no share of the images: by a bootstrap (Efron, 1979) over them."""

from __future__ import annotations

import numpy as np

from src.engine.reports.answers import Answers

RESAMPLES = (100, 1000)  # at least, at most
MOST_PRODUCTS = 2 * 10**9  # resamples * images * names


def bootstrap(metric: str, answers: Answers) -> tuple[float, float] | None:
    """The 95 % interval; None of a metric that it cannot compute, or for too many images."""
    if answers.true is None or answers.told is None:
        return None
    resamples = min(RESAMPLES[1], MOST_PRODUCTS // max(1, answers.true.size))
    if resamples < RESAMPLES[0] or not answers.true.size:
        return None
    true, told = answers.true.astype(float), answers.told.astype(float)
    # How often each image is drawn: a sum over a resample is a product with these numbers.
    draws = np.random.default_rng(0).multinomial(len(true), [1 / len(true)] * len(true), size=resamples).astype(float)
    with np.errstate(divide="ignore", invalid="ignore"):
        values = _values(metric, answers.kind, draws, true, told)
    if values is None or not np.isfinite(values).any():
        return None
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return float(low), float(high)


def _values(metric: str, kind: str, draws: np.ndarray, true: np.ndarray, told: np.ndarray) -> np.ndarray | None:
    """Of each resample; true and told: (N, names), draws: (resamples, N)."""
    number = draws.shape[1]
    if kind == "values":
        error = told - true
        square = draws @ error**2
        spread = draws @ true**2 - (draws @ true) ** 2 / number
        by_name = {"r2": 1 - square / spread, "mae": draws @ abs(error) / number, "rmse": np.sqrt(square / number)}
        return by_name[metric].mean(1) if metric in by_name else None
    hits, labelled, named = draws @ (true * told), draws @ true, draws @ told
    by_name = {"balanced_acc": hits / labelled, "macro_f1": 2 * hits / (labelled + named)}
    if metric not in by_name:
        return None
    occurs = labelled > 0
    return np.where(occurs, by_name[metric], 0).sum(1) / occurs.sum(1)
