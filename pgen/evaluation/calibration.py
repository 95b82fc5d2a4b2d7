r"""How good predicted probabilities of classes are: accuracy, log loss, calibration.

A classifier is calibrated if among data to which it gives confidence c a share c is classified rightly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..contracts import Kind, check_positive
from ..data.arrays import as_batch

__all__ = ["Calibration", "assess", "check_labels"]


@dataclass(frozen=True, repr=False)
class Calibration:
    r"""What ``assess`` found.

    Attributes:
        accuracy: Share of the data classified rightly, and ``accuracy_error``, its standard error.
        accuracy_error: :math:`\sqrt{a (1 - a) / N}`.
        log_loss: Mean of minus the log of the probability of the true class, nats, and ``log_loss_error``.
        log_loss_error: Its standard error over the data.
        brier: Mean squared distance between the probabilities and the true class as a one-hot vector, between 0 and 2.
        ece: Expected calibration error, see ``assess``.
        confidence: Mean confidence in each bin, NaN where it is empty.
        right: Share classified rightly in each bin.
        counts: Data in each bin.
        kind: ``exact``, or ``estimate`` where the probabilities come from bounds.
    """

    accuracy: float
    accuracy_error: float
    log_loss: float
    log_loss_error: float
    brier: float
    ece: float
    confidence: Tensor
    right: Tensor
    counts: Tensor
    kind: Kind = "exact"

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        estimate = "" if self.kind == "exact" else " (probabilities are estimates, from bounds)"
        loss = f"log loss {self.log_loss:.4f} ± {self.log_loss_error:.4f} nats"
        return (
            f"accuracy {self.accuracy:.4f} ± {self.accuracy_error:.4f}, {loss}, "
            f"ECE {self.ece:.4f}, Brier {self.brier:.4f}, {int(self.counts.sum())} data{estimate}"
        )


def assess(probs: Any, labels: Any, *, bins: int = 15, kind: Kind = "exact", log_probs: Tensor | None = None) -> Calibration:
    r"""Accuracy, log loss and calibration of predicted probabilities.

    .. math:: \mathrm{ECE} = \sum_{b=1}^{B} \frac{n_b}{N} \, |\operatorname{right}_b - \operatorname{confidence}_b|

    over B bins of equal width of the highest probability. It depends on B and is biased upwards where bins hold few data.

    Args:
        probs: Probabilities of the K classes, ``(N, K)``.
        labels: True classes 0, ..., K - 1, ``(N,)``.
        bins: B.
        kind: What the probabilities are.
        log_probs: Their logarithms, where they are at hand: a probability that rounds to zero has an infinite log loss.

    References:
        Naeini, Cooper, Hauskrecht (2015), AAAI 29:2901; Guo et al. (2017), On calibration of modern neural networks,
        arXiv:1706.04599, eq. 5.

    Example:
        >>> found = assess([[0.8, 0.2], [0.6, 0.4]], [0, 1])  # |1 - 0.8| / 2 + |0 - 0.6| / 2
        >>> found.accuracy, round(found.ece, 4)
        (0.5, 0.4)
    """
    check_positive("bins", bins)
    given = torch.as_tensor(probs).detach().double().cpu()
    if given.dim() != 2 or bool((given < 0).any()) or not torch.allclose(given.sum(1), given.new_ones(()), atol=1e-4):
        raise ValueError(f"`probs` should be rows of probabilities that add up to one, (N, K), got shape {tuple(given.shape)}")
    y = check_labels("labels", labels, len(given), given.shape[1]).cpu()
    confidence, predicted = given.max(1)
    right = (predicted == y).double()
    place = ((confidence * bins).ceil().long() - 1).clamp(0, bins - 1)
    parts = (torch.ones_like(right), right, confidence)
    counts, hits, sums = (torch.zeros(bins, dtype=torch.float64).scatter_add_(0, place, part) for part in parts)
    logs = given.log() if log_probs is None else log_probs.detach().double().cpu()
    loss = -logs.gather(1, y[:, None])[:, 0]
    accuracy = float(right.mean())
    error = float(loss.std() / math.sqrt(len(loss))) if len(loss) > 1 else math.nan
    return Calibration(
        accuracy=accuracy,
        accuracy_error=math.sqrt(accuracy * (1 - accuracy) / len(y)),
        log_loss=float(loss.mean()),
        log_loss_error=error,
        brier=float((given - torch.nn.functional.one_hot(y, given.shape[1])).square().sum(1).mean()),
        ece=float((hits - sums).abs().sum() / len(y)),
        confidence=sums / counts,
        right=hits / counts,
        counts=counts,
        kind=kind,
    )


def check_labels(argument: str, labels: Any, length: int, classes: int) -> Tensor:
    """Labels as integers 0, ..., ``classes`` - 1, one a datum; refused in one line otherwise."""
    try:
        y = as_batch(labels, name=argument)
    except TypeError as error:
        raise TypeError(f"{error}; number the classes 0 to {classes - 1}") from None
    if not isinstance(y, Tensor) or y.dim() != 1 or len(y) != length:
        shape = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(f"`{argument}` should be one class for each of {length} data, shape ({length},), got {shape}")
    wrong = (y < 0) | (y >= classes) | (y != y.round())
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0, 0])
        raise ValueError(f"`{argument}` has {y[row].item():g} in row {row}; classes are 0 to {classes - 1}")
    return y.long()
