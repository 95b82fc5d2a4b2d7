r"""The normaliser of a density that is known up to it, estimated by annealing, with bounds from both sides.

Forward chains begin at a law that is known and end at the model, backward ones begin at draws of the model:

.. math:: \mathbb{E}[\log w_{forward}] \le \log \mathbb{E}[w_{forward}] = \log Z \le \mathbb{E}[\log w_{backward}]

so the mean of the forward log-weights less two standard errors, and of the backward ones plus two, hold log Z between them,
and the logarithm of the mean forward weight estimates it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
from torch import Tensor

from ..data.batches import key
from ..programs import DATA_PLATE
from .annealing import AIS, anneal, log_mean

__all__ = ["LogNormalizer", "annealed_normalizer", "settled"]

LADDER = (60, 250, 1000)
"""Temperatures that are tried, one after another."""
SETTLED, NARROW = 0.02, 0.25
"""Standard error and gap between the bounds, nats, at which no more are tried."""


@dataclass(frozen=True)
class LogNormalizer:
    r"""log Z in nats: where :math:`\log p(x) = -E(x) - \log Z`.

    Attributes:
        value: The estimate, or the value itself where it was enumerated.
        error: Its standard error over chains; 0 where it was enumerated.
        lower: Mean forward log-weight less two standard errors.
        upper: Mean backward log-weight plus two standard errors. The bound supposes that backward chains begin at exact
            draws; NaN where none could be had.
        num_temps: Temperatures; 0 where it was enumerated.
        num_chains: Chains each way.

    References:
        Neal (2001), Statistics and Computing 11:125; Salakhutdinov and Murray (2008), doi:10.1145/1390156.1390266;
        Grosse, Ghahramani, Adams (2015), arXiv:1511.02543; Burda, Grosse, Salakhutdinov (2015), arXiv:1412.8566.
    """

    value: float
    error: float
    lower: float
    upper: float
    num_temps: int = 0
    num_chains: int = 0

    @classmethod
    def of(cls, forward: Tensor, backward: Tensor | None, num_temps: int) -> LogNormalizer:
        """From log-weights of independent chains ``(C,)`` each way; ``backward`` are minus those of the reversed path."""
        value, error = (float(t) for t in log_mean(forward))
        upper = math.nan if backward is None else float(backward.mean()) + 2 * _std_error(backward)
        return cls(value, error, float(forward.mean()) - 2 * _std_error(forward), upper, num_temps, len(forward))

    def check(self) -> None:
        """Refuse a value that is not finite.

        Raises:
            FloatingPointError: If it is not.
        """
        if not math.isfinite(self.value):
            raise FloatingPointError(
                f"log Z came out as {self.value}: the energy is not a number, or infinite, where its chains went; look for a "
                "parameter that is not a number"
            )

    @property
    def gap(self) -> float:
        """Upper less lower bound, nats."""
        return self.upper - self.lower

    def __str__(self) -> str:
        if not self.num_temps:
            return f"log Z = {self.value:.4f} nats, enumerated"
        return (
            f"log Z = {self.value:.3f} ± {self.error:.3f} nats, between {self.lower:.3f} and {self.upper:.3f} "
            f"({self.num_chains} chains each way, {self.num_temps} temperatures)"
        )


def settled(estimate: Callable[[int], LogNormalizer], num_temps: int | None) -> LogNormalizer:
    """The estimate with so many temperatures; for None with 60, and with 250 or 1000 only where its error or gap are large.

    Raises:
        FloatingPointError: If an estimate is not finite.
    """
    for count in LADDER if num_temps is None else (num_temps,):
        found = estimate(count)
        found.check()
        if found.error <= SETTLED and not found.gap > NARROW:  # a gap may be NaN, where there is no upper bound
            break
    return found


def _std_error(values: Tensor) -> float:
    return float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.inf


def annealed_normalizer(
    log_density: Callable[..., Tensor],
    loc: Tensor,
    scale: Tensor,
    draws: Tensor | None,
    given: Sequence[Tensor] = (),
    *,
    settings: AIS,
    seed: int,
    **options: Any,
) -> LogNormalizer:
    """log Z of a law over real x, from a Gaussian.

    The Gaussian is the prior of x in a program whose only likelihood is f over it, so that the evidence is Z, and each chain
    is a row of data.

    Args:
        log_density: From x ``(C, *event)`` and ``given`` to log f(x), ``(C,)``.
        loc: Mean of the Gaussian, ``(*event)``.
        scale: Its standard deviation.
        draws: Draws of the law itself, ``(C, *event)``, where backward chains begin; None for no bound from above.
        given: What f depends on beside x, ``(C, ...)`` each.
        settings: Temperatures and transitions; the chains are as many as ``num_chains``.
        seed: Keys the noise.
        **options: ``held``, ``compile``, ``progress`` of ``anneal``.
    """

    def program(rows: Tensor, *given: Tensor) -> None:
        known = dist.Normal(loc, scale).to_event(loc.dim())
        with pyro.plate(DATA_PLATE, len(rows)):
            x = pyro.sample("x", known)
            pyro.factor("tilt", log_density(x, *given) - known.log_prob(x))

    batch = (loc.new_zeros(settings.num_chains), *given)
    one = AIS(settings.num_temps, 1, settings.leapfrog, settings.step_size)
    forward = anneal(program, _nothing, batch, one, seed=key(seed, "forward"), **options).value
    backward = None
    if draws is not None:
        ends = {"x": draws}
        backward = anneal(program, _nothing, batch, one, seed=key(seed, "backward"), posterior=ends, **options).value
    return LogNormalizer.of(forward, backward, settings.num_temps)


def _nothing(*args: Any) -> None:
    """A guide without latents."""
