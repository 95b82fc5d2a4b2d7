r"""Has the optimiser finished? What the logged bound can say about it.

A plateau is not an optimum: a vanishing learning rate and a poor local optimum look the same. So progress is measured against
the distance that the optimiser could have gone, the sum of its learning rates, and not against steps alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from pgen.contracts import Run
from pgen.training.converge import iterate_ess, split_rhat

__all__ = ["Plateau", "iterate_ess", "plateau", "split_rhat"]

_MIN_ENTRIES = 20  # finite losses in each half of the window: fewer make no error estimate
_LR_CHANGE = 1.05


@dataclass(frozen=True)
class Plateau:
    """How fast the bound still improves, over the last half of a run.

    Attributes:
        rate: Improvement of the bound, nats a datum for 1000 steps at the learning rate ``lr[1]`` (negative: it gets worse).
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

    Time is the sum of the learning rates so far (steps, where the rate is constant or was not logged), so that a schedule
    which ends at zero is judged by the steps that could still move. Each half is cut into blocks of
    :math:`\lceil\sqrt{2n}\rceil` of its n logged steps. The variance of the block means gives the standard error, inflated by
    :math:`(1 + \rho)/(1 - \rho)` where neighbouring blocks still correlate by :math:`\rho > 0`; the interval is Student's, with
    the blocks less two as degrees of freedom.

    Args:
        run: Its ``history`` needs ``step`` and ``loss`` (nats a datum); ``lr`` is used where it is there.

    Raises:
        ValueError: If a half of the window has fewer than 20 finite losses.

    References:
        Batch means: Flegal and Jones (2010), Annals of Statistics 38(2), section 3.
    """
    loss = np.asarray(run.history.get("loss", ()), dtype=np.float64)
    steps = np.asarray(run.history.get("step", np.arange(1, len(loss) + 1)), dtype=np.float64)
    lr = np.asarray(run.history.get("lr", ()), dtype=np.float64)
    time = _time(steps, lr)
    finite = np.isfinite(loss)
    window = time > time[-1] / 2 if len(time) else finite
    late = time > 0.75 * time[-1] if len(time) else finite
    halves = (window & ~late & finite, late & finite)
    if (fewest := min(int(half.sum()) for half in halves)) < _MIN_ENTRIES:
        raise ValueError(
            f"`run.history` should have 20 finite losses in each of its last quarters, got {fewest} of {len(loss)} logged"
        )
    low, high = (float(lr[window].min()), float(lr[window].max())) if len(lr) else (math.nan, math.nan)
    scale = 1000 * (high / lr.max() if high > 0 else 1.0)
    rate, error, freedom = _rate([loss[half] for half in halves], [time[half] for half in halves])
    reach = _student(freedom) * error
    return Plateau(
        rate=scale * rate,
        ci_low=scale * (rate - reach),
        ci_high=scale * (rate + reach),
        first_step=int(steps[window][0]),
        entries=int(window.sum()),
        non_finite=int((window & ~finite).sum()),
        lr=(low, high),
    )


def _time(steps: np.ndarray, lr: np.ndarray) -> np.ndarray:
    """Sum of the learning rates up to each logged step, in units of the largest; steps, where no rate was logged."""
    logged = len(lr) == len(steps) and np.isfinite(lr).all() and (lr > 0).any()
    return np.cumsum(np.diff(steps, prepend=0.0) * (lr / lr.max() if logged else 1.0))


def _rate(losses: list[np.ndarray], times: list[np.ndarray]) -> tuple[float, float, int]:
    """Fall of the loss a unit of time between the two halves, its standard error, and degrees of freedom."""
    blocks = [_block_means(half) for half in losses]
    distance = float(times[1].mean() - times[0].mean())
    variance = sum(float(b.var(ddof=1)) / len(b) for b in blocks) * _inflation(blocks)
    fall = float(losses[0].mean() - losses[1].mean())
    return fall / distance, math.sqrt(variance) / distance, sum(map(len, blocks)) - 2


def _block_means(x: np.ndarray) -> np.ndarray:
    length = math.ceil(math.sqrt(2 * len(x)))
    count = len(x) // length
    return x[len(x) - count * length :].reshape(count, length).mean(axis=1)


def _inflation(blocks: list[np.ndarray]) -> float:
    """What correlation between neighbouring blocks does to the variance of their mean."""
    centred = [b - b.mean() for b in blocks]
    square = sum(float(c @ c) for c in centred)
    rho = sum(float(c[1:] @ c[:-1]) for c in centred) / square if square > 0 else 0.0
    rho = min(max(rho, 0.0), 0.9)
    return (1 + rho) / (1 - rho)


def _student(freedom: int) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(freedom, 0.975))
