r"""Has the optimiser finished? What the logged bound can say about it.

A plateau is not an optimum: a vanishing learning rate and a poor local optimum look the same. So no run is called finished
whose learning rate changed inside the window that is judged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from pgen.contracts import Run

__all__ = ["Plateau", "plateau"]

_MIN_ENTRIES = 40  # logged steps in the window: fewer make no error estimate
_LR_CHANGE = 1.05


@dataclass(frozen=True)
class Plateau:
    """How fast the bound still improves, over the last half of a run.

    Attributes:
        rate: Improvement of the bound, nats a datum for 1000 steps (negative: it gets worse).
        ci_low: Lower end of its 95 % interval.
        ci_high: Upper end.
        first_step: Where the window begins.
        entries: Logged steps in the window.
        non_finite: Of these, how many have no finite loss.
        lr: Smallest and largest learning rate in the window; NaN where none was logged.
    """

    rate: float
    ci_low: float
    ci_high: float
    first_step: int
    entries: int
    non_finite: int
    lr: tuple[float, float]

    @property
    def lr_constant(self) -> bool:
        """Whether the learning rate stayed within 5 % (true where none was logged)."""
        low, high = self.lr
        return not high > _LR_CHANGE * low


def plateau(run: Run) -> Plateau:
    r"""Compare the two halves of the last half of a run's bound.

    The halves, W/2 steps apart, are cut into blocks of :math:`\lceil\sqrt W\rceil` logged steps. The variance of the block
    means gives the standard error, inflated by :math:`(1 + \rho)/(1 - \rho)` where neighbouring blocks still correlate by
    :math:`\rho > 0`; the interval is Student's, with the blocks less two as degrees of freedom.

    Args:
        run: Its ``history`` needs ``step`` and ``loss`` (nats a datum); ``lr`` is used where it is there.

    Raises:
        ValueError: If fewer than 80 steps were logged.

    References:
        Batch means: Flegal and Jones (2010), Annals of Statistics 38(2), section 3.
    """
    loss = np.asarray(run.history.get("loss", ()), dtype=np.float64)
    steps = np.asarray(run.history.get("step", np.arange(len(loss))), dtype=np.float64)
    window = slice(len(loss) // 2, None)
    kept = np.isfinite(loss[window])
    if kept.sum() < _MIN_ENTRIES:
        raise ValueError(
            f"`run.history` should have 40 finite losses in its last half, got {int(kept.sum())} of {len(loss)} steps logged"
        )
    rate, error, blocks = _rate(loss[window][kept], steps[window][kept])
    half = _student(blocks - 2) * error
    lr = np.asarray(run.history.get("lr", ()), dtype=np.float64)[window]
    return Plateau(
        rate=1000 * rate,
        ci_low=1000 * (rate - half),
        ci_high=1000 * (rate + half),
        first_step=int(steps[window][0]),
        entries=len(kept),
        non_finite=int((~kept).sum()),
        lr=(float(lr.min()), float(lr.max())) if len(lr) else (math.nan, math.nan),
    )


def _rate(loss: np.ndarray, steps: np.ndarray) -> tuple[float, float, int]:
    """Fall of the loss a step between the two halves, its standard error, and the number of blocks."""
    half = len(loss) // 2
    length = math.ceil(math.sqrt(len(loss)))
    early, late = _block_means(loss[:half], length), _block_means(loss[half:], length)
    distance = steps[half:].mean() - steps[:half].mean()
    variance = (_mean_variance(early) + _mean_variance(late)) * _inflation(early, late)
    return float(early.mean() - late.mean()) / distance, math.sqrt(variance) / distance, len(early) + len(late)


def _block_means(x: np.ndarray, length: int) -> np.ndarray:
    count = len(x) // length
    return x[len(x) - count * length :].reshape(count, length).mean(axis=1)


def _mean_variance(blocks: np.ndarray) -> float:
    return float(blocks.var(ddof=1)) / len(blocks)


def _inflation(early: np.ndarray, late: np.ndarray) -> float:
    """What correlation between neighbouring blocks does to the variance of their mean."""
    centred = [early - early.mean(), late - late.mean()]
    square = sum(float(c @ c) for c in centred)
    rho = sum(float(c[1:] @ c[:-1]) for c in centred) / square if square > 0 else 0.0
    rho = min(max(rho, 0.0), 0.9)
    return (1 + rho) / (1 - rho)


def _student(freedom: int) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(freedom, 0.975))
