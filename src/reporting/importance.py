"""Which parameters of a sweep its metric depends on. Used by sweep_report.py.

A random forest learns the trials' places in the ranking from their parameters; then each parameter is shuffled among the
trials, and what the forest's R2 loses is that parameter's importance (Breiman, Random Forests, 2001, section 10). Places
instead of values, since one trial that diverged would outweigh all others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

FEWEST = 6  # trials; below that a forest learns them by heart
TREES = 200
SHUFFLES = 20


def importance(parameters: Mapping[str, Sequence[float]], values: Sequence[float]) -> tuple[dict[str, float], str]:
    """The shares of the parameters, which add up to 1, the largest first; and what must be said about them.

    parameters: name -> one number per trial, nan where a trial lacks it. values: the metric of the trials.
    Where nothing can be told the shares are {} and the sentence says why.
    """
    if len(values) < FEWEST:
        return (
            {},
            f"To tell what the value depends on takes {FEWEST} trials that have one; of these there are {len(values)}.",
        )
    if len(parameters) < 2:
        return {}, "Only one parameter differs between the trials: all that changes is due to it or to chance."
    if min(values) == max(values):
        return {}, "All trials have the same value: it depends on none of the parameters."

    from sklearn.ensemble import RandomForestRegressor
    from sklearn.inspection import permutation_importance

    from src.seeding import key  # imports torch

    seed = key("importance") % 2**32
    inputs = np.array(list(parameters.values()), dtype=float).T
    places = np.unique(values, return_inverse=True)[1]
    forest = RandomForestRegressor(TREES, oob_score=True, random_state=seed).fit(inputs, places)
    lost = permutation_importance(forest, inputs, places, n_repeats=SHUFFLES, random_state=seed)["importances_mean"]
    weights = np.clip(lost, 0, None)
    if not weights.any():
        return {}, "The forest does as well without any of the parameters: what differs looks like chance."
    shares = dict(zip(parameters, (weights / weights.sum()).tolist(), strict=True))
    return dict(sorted(shares.items(), key=lambda item: -item[1])), _trust(forest.oob_score_)


def _trust(explained: float) -> str:
    """explained: R2 on the trials that a tree was not grown with."""
    if explained <= 0:
        return "The forest cannot predict trials that it has not seen (R2 at most 0), so these shares say little."
    return f"Of trials that it has not seen the forest explains {explained:.0%} of the differences (R2)."
