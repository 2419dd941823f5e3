"""model.calibrate=temperature: probabilities that are as often right as they say.

After the weights are chosen, the logits are divided by one number, the temperature, that makes the likelihood of val the best
(Guo et al., 2017, On calibration of modern neural networks, arXiv 1706.04599). The order of classes stays, and so the accuracy.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from torch import Tensor
from torchmetrics.functional.classification import binary_calibration_error, multiclass_calibration_error

from src.engine.runs.outputs import Outputs
from src.engine.steps.task_kind import TaskKind

BINS = 15  # of the expected calibration error, as Guo et al. have them
RANGE = (0.05, 20.0)  # of temperatures
Errors = dict[str, list[float]]  # ece and nll, each before and after


def fit_temperature(kind: TaskKind, outputs: Outputs) -> float:
    """The temperature for outputs that are not divided by one yet.

    It is the likeliest for a prior in which its logarithm is normal with standard deviation 1. That weighs as much as an image
    or so, but without it a few val images that are all right would ask for a temperature of 0.
    """

    def cost(log_temperature: float) -> float:
        probabilities = kind.probabilities(outputs.logits / math.exp(log_temperature))
        return _nll(probabilities, outputs.labels) * len(outputs.labels) + log_temperature**2 / 2

    low, high = map(math.log, RANGE)
    return math.exp(minimize_scalar(cost, bounds=(low, high), method="bounded").x)


def calibration_errors(kind: TaskKind, outputs: Outputs) -> Errors:
    """Of outputs that are divided by kind.temperature. ECE: the expected calibration error, of the likeliest class, or of all
    labels; NLL: the mean negative log-likelihood."""
    found: Errors = {"ece": [], "nll": []}
    for logits in (outputs.logits * kind.temperature, outputs.logits):
        probabilities = kind.probabilities(logits)
        found["ece"].append(_ece(probabilities, outputs.labels))
        found["nll"].append(_nll(probabilities, outputs.labels))
    return found


def _nll(probabilities: Tensor, labels: Tensor) -> float:
    if labels.ndim == 2:
        return float(F.binary_cross_entropy(probabilities.double(), labels.double()))
    tiny = torch.finfo(torch.float32).tiny
    return float(F.nll_loss(probabilities.double().clamp(min=tiny).log(), labels))


def _ece(probabilities: Tensor, labels: Tensor) -> float:
    if labels.ndim == 2:
        return float(binary_calibration_error(probabilities.flatten(), labels.long().flatten(), BINS))
    return float(multiclass_calibration_error(probabilities, labels, probabilities.shape[1], BINS))
