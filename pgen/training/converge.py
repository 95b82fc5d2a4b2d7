r"""Has the optimiser converged? Iterates of a fit, what they say, and their mean.

At a constant learning rate the iterates of stochastic optimisation are a Markov chain around an optimum. When they have
reached their stationary distribution (split :math:`\hat R` near one) their mean is a better estimate of the optimum than the
last of them. That distribution, and the bias of its mean, shrink with the rate. So the rate is halved each time the chain is
stationary, and training ends when a halving no longer raises the bound. Two points are compared on the same draws, and each
rate gets the steps to go as far as the one before, so that a small gain is not merely a short way. Where parameters are not
identified (networks, low-rank factors) the chain never settles in them: there the bound is asked whether it still rises.

References:
    Dhaka et al. (2020), Robust, accurate stochastic optimization for variational inference, arXiv:2009.00666.
    Welandawe et al. (2022), A framework for improving the reliability of black-box variational inference, arXiv:2203.15945.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["Average", "Converge", "Iterates", "iterate_ess", "split_rhat"]

ROWS = 256
"""Most iterates kept."""
ELEMENTS = 32_000_000
"""Most numbers kept in all iterates together."""
LOOKED_AT = 20_000
"""Parameters beyond which iterates are not judged one by one: of a network, the bound is."""
STRIDE = 8
"""Steps between two iterates, at first."""
FIRST_LOOK = 200
"""Steps at one learning rate before the first look."""
GROWTH = 1.25
"""Each look comes after this many times the steps of the one before."""
SHRINK = 0.5
"""The learning rate falls by this factor."""
RHAT = 1.1
WINDOWS = (0.95, 0.75, 0.5, 0.35, 0.25)
"""Parts of the iterates, counted from the end, among which the most stationary is taken."""
MIN_ROWS = 24
BLOCKS = 8
EVALUATIONS = 32
"""Fixed draws (and batches) on which two parameter vectors are compared."""


def split_rhat(x: Tensor) -> Tensor:
    r"""Split :math:`\hat R` of each column of one chain: its two halves are compared.

    .. math:: \hat R^2 = \frac{n - 1}{n} + \frac{\operatorname{var}(\text{means of the halves})}{\text{mean variance within}}

    Shapes: ``(rows, P)`` -> ``(P,)``. A linear trend has :math:`\sqrt 7`; a column that never moves has 1.

    References:
        Gelman et al. (2013), Bayesian data analysis, section 11.4; Dhaka et al. (2020), arXiv:2009.00666, section 3.
    """
    half = len(x) // 2
    halves = torch.stack([x[:half], x[len(x) - half :]]).double()
    within = halves.var(1).mean(0)
    between = halves.mean(1).var(0)
    ratio = torch.where(within > 0, between / within, torch.where(between > 0, torch.inf, 1 / half))
    return ((half - 1) / half + ratio).sqrt()


def iterate_ess(x: Tensor) -> Tensor:
    r"""Effective number of independent iterates in each column of one chain, by Geyer's initial monotone sequence.

    The Monte Carlo standard error of a column's mean is its standard deviation over the root of this.

    Shapes: ``(rows, P)`` -> ``(P,)``. A column that never moves has as many as rows. For an autoregression with coefficient
    :math:`\phi` it is :math:`n (1 - \phi) / (1 + \phi)`.

    References:
        Geyer (1992), Practical Markov chain Monte Carlo, Statistical Science 7(4), section 3.3.
    """
    n = len(x)
    centred = (x - x.mean(0)).double()
    spectrum = torch.fft.rfft(centred, n=2 * n, dim=0)
    covariance = torch.fft.irfft(spectrum.abs().square(), n=2 * n, dim=0)[:n]
    moving = covariance[0] > 0
    rho = covariance / torch.where(moving, covariance[0], 1.0)
    pairs = rho[: n // 2 * 2].reshape(n // 2, 2, -1).sum(1)
    positive = (pairs > 0).cumprod(0)
    time = 2 * (pairs.cummin(0).values * positive).sum(0) - 1
    return torch.where(moving, n / time.clamp(min=1 / math.log10(max(n, 10))), float(n))


class Iterates:
    """Every so many steps the parameters, on their device; when there is no more room, every second one is dropped.

    Args:
        values: The parameters' own storage.
    """

    def __init__(self, values: Sequence[Tensor]) -> None:
        self.values = list(values)
        self.sizes = [v.numel() for v in values]
        rows = min(ROWS, max(16, ELEMENTS // max(sum(self.sizes), 1)) // 2 * 2)
        self.buffer = torch.zeros(rows, sum(self.sizes), dtype=values[0].dtype, device=values[0].device)
        self.views = [[part.view_as(v) for part, v in zip(row.split(self.sizes), values)] for row in self.buffer]
        self.restart(0)

    def restart(self, done: int) -> None:
        """Forget all; the next iterate is taken ``STRIDE`` steps after step ``done``."""
        self.count, self.stride, self.start, self.seen = 0, STRIDE, done, 0

    def observe(self, done: int) -> None:
        """Told after each call of the step; takes the first iterate at or past each multiple of the stride."""
        if (done - self.start) // self.stride <= self.seen:
            return
        if self.count == len(self.views):
            self.count //= 2
            self.buffer[: self.count] = self.buffer[1::2].clone()
            self.stride, self.seen = 2 * self.stride, self.seen // 2
            if (done - self.start) // self.stride <= self.seen:
                return
        torch._foreach_copy_(self.views[self.count], self.values)
        self.count, self.seen = self.count + 1, (done - self.start) // self.stride

    def until_next(self, done: int) -> int:
        """Steps until the next iterate."""
        return self.stride - (done - self.start) % self.stride

    @property
    def rows(self) -> Tensor:
        """The iterates so far, ``(rows, P)``."""
        return self.buffer[: self.count]

    def mean(self, rows: int) -> list[Tensor]:
        """Mean of the last ``rows`` iterates, as tensors like the parameters."""
        mean = self.rows[self.count - rows :].double().mean(0).to(self.buffer.dtype)
        return [part.reshape(v.shape) for part, v in zip(mean.split(self.sizes), self.values)]

    def steps(self, rows: int) -> int:
        """Steps that the last ``rows`` iterates span."""
        return rows * self.stride


def difference(before: Tensor, after: Tensor) -> tuple[float, float]:
    """Mean fall from ``before`` to ``after``, losses on the same draws ``(M,)``, and its standard error."""
    fall = (before - after).double()
    return float(fall.mean()), float(fall.std() / math.sqrt(len(fall)))


class Average:
    """Keeps the mean of the last ``window`` steps' iterates in the end, unless it makes the bound worse.

    Args:
        values: The parameters' own storage.
        evaluate: Losses on fixed draws at the parameters as they are, ``(M,)``, nats a datum.
        total: Steps of the whole fit.
        window: Of the last steps, how many.
    """

    rate = 1.0

    def __init__(self, values: Sequence[Tensor], evaluate: Callable[[], Tensor], total: int, window: int) -> None:
        self.iterates, self.evaluate = Iterates(values), evaluate
        self.first = max(0, total - window)
        self.iterates.restart(self.first)

    def until_look(self, done: int) -> int:
        """Steps until a block should end."""
        return self.first - done if done < self.first else 2**62

    def until_iterate(self, done: int) -> int:
        """Steps until a call should end, so that the next iterate is taken at its step."""
        return self.first - done if done < self.first else self.iterates.until_next(done)

    def observe(self, done: int) -> None:
        """Told after each call of the step."""
        if done > self.first:
            self.iterates.observe(done)

    def look(self, done: int, losses: np.ndarray) -> str:
        """Told after each block; why to stop, or nothing."""
        return ""

    def finish(self) -> str:
        """Put the mean into the parameters unless that is worse; what was done, in words."""
        return keep_mean(self.iterates, self.iterates.count, self.evaluate)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a checkpoint needs."""
        it = self.iterates
        return {"rows": it.rows.clone()}, {"iterates": [it.count, it.stride, it.start, it.seen]}

    def restore(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        """Go on from ``state``."""
        it = self.iterates
        it.count, it.stride, it.start, it.seen = numbers["iterates"]
        it.buffer[: it.count] = tensors["rows"].to(it.buffer)


def keep_mean(iterates: Iterates, rows: int, evaluate: Callable[[], Tensor]) -> str:
    """Put the mean of the last iterates into the parameters unless the bound gets worse by it (two standard errors)."""
    if rows < 2:
        return ""
    last, mean = [v.clone() for v in iterates.values], iterates.mean(rows)
    before = evaluate()
    torch._foreach_copy_(iterates.values, mean)
    gain, error = difference(before, evaluate())
    what = f"mean of the last {iterates.steps(rows)} steps"
    figures = f"bound {gain:+.2g} ± {error:.1g} nats a datum"
    if gain >= -2 * error and math.isfinite(gain):
        return f"; {what} kept ({figures})"
    torch._foreach_copy_(iterates.values, last)
    return f"; last iterate kept, as the {what} is worse ({figures})"


class Converge(Average):
    """Halves the learning rate whenever the iterates are stationary, and stops when that no longer raises the bound.

    Args:
        values: The parameters' own storage.
        evaluate: Losses on fixed draws at the parameters as they are, ``(M,)``, nats a datum.
        tolerance: What a halving must still gain, nats a datum.
    """

    def __init__(self, values: Sequence[Tensor], evaluate: Callable[[], Tensor], tolerance: float) -> None:
        self.iterates, self.evaluate, self.tolerance = Iterates(values), evaluate, tolerance
        self.rate, self.rates, self.next_look = 1.0, 1, FIRST_LOOK
        self.reference: Tensor | None = None
        self.window, self.evidence, self.kept = 0, "", ""

    def until_look(self, done: int) -> int:
        """Steps until a block should end."""
        return self.next_look - done

    def until_iterate(self, done: int) -> int:
        """Steps until a call should end, so that the next iterate is taken at its step."""
        return self.iterates.until_next(done)

    def observe(self, done: int) -> None:
        """Told after each call of the step."""
        self.iterates.observe(done)

    def look(self, done: int, losses: np.ndarray) -> str:
        """Told after each block, with all losses so far; why to stop, or nothing."""
        if done < self.next_look:
            return ""
        start = self.iterates.start
        if not self._stationary(losses[start:]):
            self.next_look = start + math.ceil(GROWTH * (done - start))
            return ""
        now = self._take_better()
        if self.reference is not None:
            gain, error = difference(self.reference, now)
            if gain + 2 * error < self.tolerance:
                self.iterates.restart(done)
                return (
                    f"converged: halving the learning rate gained {gain:.2g} ± {error:.1g} nats a datum (tolerance "
                    f"{self.tolerance:.2g}), {self.evidence}, {self.rates} rates; {self.kept}"
                )
        self.reference, self.rate, self.rates = now, SHRINK * self.rate, self.rates + 1
        self.iterates.restart(done)
        self.next_look = done + math.ceil(FIRST_LOOK / self.rate)  # as far as before: else it would gain less in any case
        return ""

    def _take_better(self) -> Tensor:
        """Hold the mean of the window or the last iterate, whichever has the better bound; its losses on the fixed draws."""
        values, span = self.iterates.values, self.iterates.steps(self.window)
        last, at_last = [v.clone() for v in values], self.evaluate()
        torch._foreach_copy_(values, self.iterates.mean(self.window))
        at_mean = self.evaluate()
        gain, error = difference(at_last, at_mean)
        if gain >= -2 * error:
            self.kept = f"mean of {span} steps kept"
            return at_mean
        torch._foreach_copy_(values, last)
        self.kept = f"last iterate kept, better than the mean of {span} steps"
        return at_last

    def _stationary(self, losses: np.ndarray) -> bool:
        """Whether some window of the iterates is, or (where parameters are not identified) the bound; says why."""
        rows = self.iterates.rows
        self.window = max(2, len(rows) // 2)
        if rows.shape[1] <= LOOKED_AT:
            lengths = [n for n in (int(part * len(rows)) for part in WINDOWS) if n >= MIN_ROWS]
            rhat, window = min(((float(_worst(split_rhat(rows[-n:]))), n) for n in lengths), default=(math.inf, 0))
            if rhat < RHAT:
                self.window, self.evidence = window, f"R-hat {rhat:.2f}"
                return True
        rise, error = _rise(losses[len(losses) // 2 :])
        self.evidence = f"bound flat to {abs(rise) + 2 * error:.1g}"
        return abs(rise) < 2 * error

    def finish(self) -> str:
        """Where the steps ended first, take the better of mean and last iterate too; in words."""
        if self.kept and not self.iterates.count:
            return ""
        if self.iterates.count < 2:
            return "; not converged"
        rate = f"at {self.rate:.3g} of the learning rate" if self.rate < 1 else "at the first learning rate"
        self.window = max(2, self.iterates.count // 2)
        self._take_better()
        return f"; not converged: still moving {rate} ({self.evidence or 'not looked at'}); {self.kept}"

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a checkpoint needs."""
        tensors, numbers = super().state()
        reference = {} if self.reference is None else {"reference": self.reference}
        own = {"rate": self.rate, "rates": self.rates, "next": self.next_look, "kept": self.kept, "evidence": self.evidence}
        return tensors | reference, numbers | own

    def restore(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        """Go on from ``state``."""
        super().restore(tensors, numbers)
        self.rate, self.rates, self.next_look = (numbers[name] for name in ("rate", "rates", "next"))
        self.kept, self.evidence = numbers["kept"], numbers["evidence"]
        self.reference = tensors.get("reference")


def _worst(x: Tensor) -> Tensor:
    """The largest of up to a hundred values; of more, the 99th percentile."""
    return torch.quantile(x, 0.99, interpolation="higher")


def _rise(losses: np.ndarray) -> tuple[float, float]:
    """Rise of the bound from the first half of some losses to the second, and its standard error (of block means)."""
    blocks = [half[: len(half) // BLOCKS * BLOCKS].reshape(BLOCKS, -1).mean(1) for half in np.array_split(losses, 2)]
    error = math.sqrt(sum(float(b.var(ddof=1)) / BLOCKS for b in blocks))
    return float(blocks[0].mean() - blocks[1].mean()), error
