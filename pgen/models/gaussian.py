r"""The Gaussian: full, diagonal or low-rank covariance.

.. math:: x \mid c \sim \mathcal{N}(\mu + A c, \Sigma), \qquad
    \Sigma = L L^\top, \quad \operatorname{diag}(\sigma^2), \quad \text{or} \quad W W^\top + \operatorname{diag}(\sigma^2)

The maximum of the likelihood is the sample mean (with a context c the line of least squares) and the covariance of what is
left (divided by N): ``fit(x)`` takes it in one step where there is a closed form (full and diagonal), and SVI,
``fit(x, steps=...)``, climbs to the same place.

Bishop (2006), Pattern Recognition and Machine Learning, section 2.3.4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ..base import GenerativeModel
from ..contracts import Batch, Seed, check_choice, check_positive
from ..data.transforms import Transform
from ..distributions.events import with_event_shape
from ..distributions.linear_gaussian import LinearGaussian, Normal, check_spread, regress

__all__ = ["Gaussian"]

COVARIANCES = ("full", "diagonal", "low_rank")


class Gaussian(GenerativeModel):
    r"""Multivariate Gaussian.

    Shapes: x ``(N, *event_shape)``, context ``(N, context_dim)``; the covariance is that of the D numbers of x in row-major
    order.

    Args:
        event_shape: Shape of one datum.
        covariance: ``"full"``, ``"diagonal"``, or ``"low_rank"``.
        rank: Columns of W for ``"low_rank"``.
        context_dim: Size of the vector that the mean depends on linearly; 0 for none.
        preprocess: Invertible preprocessing of x.
        seed: Keys the initial weights of a low rank.

    Raises:
        ValueError: From ``fit``, if the sample covariance is singular: a column is constant or a sum of others, or there are
            too few data.

    Example:
        >>> gaussian = Gaussian((2,))
        >>> run = gaussian.fit(torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0], [2.0, 2.0]]))
        >>> gaussian.log_prob(torch.ones(1, 2)).value  # the mean, unit covariance: - log 2 pi
        tensor([-1.8379], dtype=torch.float64)
    """

    family = "gaussian"

    def __init__(
        self,
        event_shape: Sequence[int],
        covariance: str = "full",
        *,
        rank: int | None = None,
        context_dim: int = 0,
        preprocess: Transform | None = None,
        seed: Seed = 0,
    ) -> None:
        super().__init__(event_shape, preprocess=preprocess, context_dim=context_dim)
        check_choice("covariance", covariance, COVARIANCES)
        size = math.prod(self.event_shape)
        if (covariance == "low_rank") != (rank is not None):
            raise ValueError("`rank` goes with covariance='low_rank', and is needed there" + f"; got {rank}")
        check_positive("rank", rank, allow_none=True)
        self.covariance, self.rank = covariance, rank
        self.loc = nn.Parameter(torch.zeros(size))
        self.log_scale = nn.Parameter(torch.zeros(size))
        if context_dim:
            self.slope = nn.Parameter(torch.zeros(size, context_dim))
        with self.initial_weights(seed):
            if covariance == "full":
                self.lower = nn.Parameter(torch.zeros(size, size))
            if covariance == "low_rank":
                self.factor = nn.Parameter(0.1 * torch.randn(size, rank or 1))

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments as plain JSON values."""
        plain = {name: getattr(self, name) for name in ("covariance", "rank", "context_dim")}
        return {"event_shape": list(self.event_shape), **plain}

    def prime(self, data: Batch) -> None:
        """Start at the mean and the standard deviations of the data, none of which may be zero."""
        x = self._prepared(data)[0]["x"].flatten(1).double()
        scale = x.std(0, correction=0)
        check_spread(x, scale)
        with torch.no_grad():
            self.loc.copy_(x.mean(0))
            self.log_scale.copy_(scale.log())

    def solve(self, batch: dict[str, Tensor]) -> str:
        """The sample mean and covariance; nothing for a low rank."""
        if self.covariance == "low_rank":
            return ""
        x = batch["x"].flatten(1)
        loc, slope, centred = regress(x, batch.get("context"))
        scale = centred.square().mean(0).sqrt()
        check_spread(x, scale)
        if self.covariance == "full":
            lower = scale[:, None] * _correlation(centred / scale)
            scale = lower.diagonal()
        self.loc.copy_(loc)
        self.log_scale.copy_(scale.log())
        if self.context_dim:
            self.slope.copy_(slope)
        if self.covariance == "full":
            self.lower.copy_(lower.tril(-1))
        return "closed form: the sample mean and covariance"

    def model(self, x: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        """p(x | c)."""
        with self.plate(x, context):
            return pyro.sample("x", with_event_shape(self.distribution(context), self.event_shape), obs=x)

    def distribution(self, context: Tensor | None = None) -> dist.TorchDistribution:
        """The distribution of the D numbers of x."""
        loc = self.loc if context is None else self.loc + context @ self.slope.T
        scale = self.log_scale.exp()
        if self.covariance == "full":
            return dist.MultivariateNormal(loc, scale_tril=self.lower.tril(-1) + scale.diag())
        if self.covariance == "low_rank":
            return LinearGaussian(loc, self.factor, scale)
        return Normal(loc, scale).to_event(1)


def _correlation(standard: Tensor) -> Tensor:
    """Lower Cholesky factor of the correlation of standardised data, which must not be singular."""
    lower, _ = torch.linalg.cholesky_ex(standard.T @ standard / len(standard))
    singular = ~(lower.diagonal() > 1e-6)
    if bool(singular.any()):
        number = int(singular.nonzero()[0, 0])
        raise ValueError(
            f"the covariance of `data` is singular: number {number} of each datum is a linear combination of others, or there "
            f"are too few data ({len(standard)} data of {len(lower)} numbers); drop it, or use "
            "covariance='low_rank' or 'diagonal'"
        )
    return lower
