"""Which parameters of a sweep its metric depends on. Used by sweep_report.py.

A random forest learns the ranks of the trials from their parameters; a parameter's importance is the loss of the forest's R2
when that parameter is shuffled among the trials (Breiman, Random Forests, 2001, section 10). Ranks instead of values, because
one trial that diverged would outweigh all others. Not optuna's importances, which say nothing about how far to trust them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

FEWEST = 6  # trials; a forest learns fewer by heart
TREES = 200
SHUFFLES = 20


def importance(parameters: Mapping[str, Sequence[float]], values: Sequence[float]) -> tuple[dict[str, float], str]:
    """The shares of the parameters, which add up to 1, the largest first; and how far to trust them, or why there are none.

    parameters: name -> one number per trial, nan where a trial lacks it. values: the metric of the trials.
    """
    if len(values) < FEWEST:
        need = f"To tell what the value depends on takes {FEWEST} trials that have one"
        return {}, f"{need}; of these there are {len(values)}."
    if len(parameters) < 2:
        return {}, "Only one parameter differs between the trials: all that changes is due to it or to chance."
    if min(values) == max(values):
        return {}, "All trials have the same value: it depends on none of the parameters."

    from sklearn.ensemble import RandomForestRegressor
    from sklearn.inspection import permutation_importance

    from src.engine.runs.seeding import key  # imports torch

    seed = key("importance") % 2**32
    inputs = np.array(list(parameters.values()), dtype=float).T
    ranks = np.unique(values, return_inverse=True)[1]
    forest = RandomForestRegressor(TREES, oob_score=True, random_state=seed).fit(inputs, ranks)
    losses = permutation_importance(forest, inputs, ranks, n_repeats=SHUFFLES, random_state=seed)["importances_mean"]
    weights = np.clip(losses, 0, None)
    if not weights.any():
        return {}, "The forest does as well without any of the parameters: what differs looks like chance."
    shares = dict(zip(parameters, (weights / weights.sum()).tolist(), strict=True))
    explained = forest.oob_score_  # R2 on the trials that a tree was not grown with
    trust = f"Of trials that it has not seen the forest explains {explained:.0%} of the differences (R2)."
    if explained <= 0:
        trust = "The forest cannot predict trials that it has not seen (R2 at most 0), so these shares say little."
    return dict(sorted(shares.items(), key=lambda item: -item[1])), trust
