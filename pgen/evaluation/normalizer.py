r"""The normaliser of a density that is known up to it, estimated by annealing, with bounds from both sides.

Forward chains begin at a law that is known and end at the model, backward ones begin at draws of the model:

.. math:: \mathbb{E}[\log w_{forward}] \le \log \mathbb{E}[w_{forward}] = \log Z \le \mathbb{E}[\log w_{backward}]

so the mean of the forward log-weights less two standard errors, and of the backward ones plus two, hold log Z between them,
and the logarithm of the mean forward weight estimates it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from .annealing import log_mean

__all__ = ["LogNormalizer"]


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


def _std_error(values: Tensor) -> float:
    return float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.inf
