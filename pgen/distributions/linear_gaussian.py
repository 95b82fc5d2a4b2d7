r"""The Gaussian with a Gaussian latent of few dimensions, and all that has a closed form there.

.. math:: z \sim \mathcal{N}(0, I_q), \quad x \mid z \sim \mathcal{N}(\mu + W z, \Psi), \; \Psi \text{ diagonal}
    \quad\Longrightarrow\quad x \sim \mathcal{N}(\mu, W W^\top + \Psi)

Bishop (2006), Pattern Recognition and Machine Learning, section 12.2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

__all__ = ["LinearGaussian", "Normal", "check_spread", "regress"]


class Normal(dist.Normal):
    """The normal distribution, its log-density by way of (x - loc) / scale: squares of large numbers would overflow.

    Example:
        >>> Normal(torch.zeros(()), torch.tensor(1e30)).log_prob(torch.zeros(()))  # - 30 log 10 - 0.5 log 2 pi
        tensor(-69.9965)
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density in nats."""
        away = (value - self.loc) / self.scale
        return -0.5 * away.square() - self.scale.log() - 0.5 * math.log(2 * math.pi)


class LinearGaussian(dist.TorchDistribution):
    r"""x with the latent integrated out; of a datum with missing entries, the density of those observed.

    With C the precision of z given x, m its mean, and sums over the observed entries alone,

    .. math:: C = I + W^\top \Psi^{-1} W, \quad m = C^{-1} W^\top \Psi^{-1} (x - \mu), \quad
        -2 \log p(x) = \sum_d \left( \log 2 \pi \psi_d + \frac{(x - \mu - W m)_d^2}{\psi_d} \right) + \log |C| + |m|^2

    in units of the noise, so that x may be of any size.

    Shapes: loc and observed ``(*batch, D)``, factor ``(D, q)``, scale ``(D,)`` -> log_prob ``(*batch,)``, in nats.

    Args:
        loc: The mean.
        factor: W.
        scale: The root of the diagonal of Psi: standard deviations of the noise, in units of x.
        observed: False where x is missing; all is observed by default.

    Example:
        >>> fn = LinearGaussian(torch.zeros(2), torch.tensor([[1.0], [1.0]]), torch.ones(2))
        >>> fn.log_prob(torch.zeros(2))  # covariance [[2, 1], [1, 2]]: - log 2 pi - 0.5 log 3
        tensor(-2.3872)
    """

    support = constraints.real_vector
    has_rsample = True

    def __init__(self, loc: Tensor, factor: Tensor, scale: Tensor, observed: Tensor | None = None) -> None:
        self.loc, self.factor, self.scale, self.observed = loc, factor, scale, observed
        super().__init__(loc.shape[:-1], loc.shape[-1:], validate_args=False)

    @property
    def mean(self) -> Tensor:
        """``(*batch, D)``."""
        return self.loc

    def expand(self, batch_shape: torch.Size, _instance: LinearGaussian | None = None) -> LinearGaussian:
        """The same for more data."""
        shape = (*batch_shape, *self.event_shape)
        observed = None if self.observed is None else self.observed.expand(shape)
        return LinearGaussian(self.loc.expand(shape), self.factor, self.scale, observed)

    @property
    def variance(self) -> Tensor:
        """``(*batch, D)``."""
        return (self.scale.square() + self.factor.square().sum(-1)).expand_as(self.loc)

    @property
    def covariance_matrix(self) -> Tensor:
        """``(*batch, D, D)``."""
        covariance = self.factor @ self.factor.T + self.scale.square().diag()
        return covariance.expand(*self.loc.shape, -1)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draws of all entries, the missing ones too."""
        shape = self._extended_shape(torch.Size(sample_shape))
        z = torch.randn(*shape[:-1], self.factor.shape[-1], dtype=self.loc.dtype, device=self.loc.device)
        noise = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        return self.loc + z @ self.factor.T + self.scale * noise

    def latent(self, x: Tensor) -> dist.MultivariateNormal:
        """The posterior of z, given what is observed of x."""
        precision, mean = self._posterior(x)
        return dist.MultivariateNormal(mean, scale_tril=_inverse_tril(precision).expand(*mean.shape, -1), validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density of the observed entries, in nats."""
        precision, mean = self._posterior(value)
        away = (value - self.loc - mean @ self.factor.T) / self.scale
        terms = self._seen(away.square() + (2 * self.scale.log() + math.log(2 * math.pi)))
        log_det = 2 * torch.linalg.cholesky_ex(precision)[0].diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return -0.5 * (terms.sum(-1) + log_det + mean.square().sum(-1))

    def _seen(self, values: Tensor) -> Tensor:
        return values if self.observed is None else torch.where(self.observed, values, torch.zeros_like(values))

    def _posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """C ``(*batch, q, q)`` (one for all where nothing is missing) and m ``(*batch, q)``."""
        factor = self.factor / self.scale[:, None]
        seen = factor.T if self.observed is None else factor.T * self.observed[..., None, :]
        precision = _identity(factor) + seen @ factor
        right = self._seen((x - self.loc) / self.scale) @ factor
        lower = torch.linalg.cholesky_ex(precision)[0]
        return precision, torch.cholesky_solve(right[..., None], lower).squeeze(-1)


def check_spread(x: Tensor, sd: Tensor) -> None:
    """Refuse data ``(N, D)`` with a column that is constant up to rounding, given the standard deviations ``sd`` ``(D,)``."""
    if len(x) == 1:
        raise ValueError("`data` has 1 datum, which has no spread; give two or more")
    constant = sd <= 1e-10 * x.abs().amax(0)
    if bool(constant.any()):
        number = int(constant.nonzero()[0, 0])
        raise ValueError(
            f"the covariance of `data` is singular: number {number} of each datum is constant ({len(x)} data of {x.shape[1]} "
            "numbers); drop it"
        )


def _inverse_tril(precision: Tensor) -> Tensor:
    """The lower Cholesky factor of the inverse."""
    flipped = torch.linalg.cholesky_ex(precision.flip(-2, -1))[0].flip(-2, -1).mT
    return torch.linalg.solve_triangular(flipped, _identity(precision), upper=False)


def _identity(like: Tensor) -> Tensor:
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)


def regress(x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    r"""Least squares of x on the context: maximum likelihood of :math:`x \sim \mathcal{N}(b + A c, \Sigma)` for any Sigma.

    Args:
        x: ``(N, D)``.
        context: ``(N, C)``; None for the mean alone.

    Returns:
        b ``(D,)``, A ``(D, C)`` (of no columns without a context), and the residuals ``(N, D)``, in float64.

    Indicators (columns of zeros and ones) may depend on each other, as those of one class among K do, which sum to one: of all
    slopes that fit best the shortest is taken, and the mean given any of the classes is what it is without one of them.

    Raises:
        ValueError: If other columns of the context depend on each other.

    References:
        Zellner (1962), doi:10.2307/2281644, section 2: the same regressors for every output.
    """
    x = x.double()
    c = x.new_zeros(len(x), 0) if context is None else context.double()
    centre = c.mean(0)
    spread = c - centre
    if c.shape[1] and int(torch.linalg.matrix_rank(spread)) < c.shape[1]:
        inverse = torch.linalg.pinv(spread)
        dependent = (inverse @ spread).diagonal() < 1 - 1e-6  # less than one where a sum of columns that vanishes has it
        if bool((dependent & ~((c == 0) | (c == 1)).all(0)).any()):
            raise ValueError(
                f"columns of `context` are constant or depend on each other ({len(c)} data, {c.shape[1]} columns); drop one"
            )
        weight = (inverse @ (x - x.mean(0))).T
    else:
        weight = torch.linalg.lstsq(spread, x - x.mean(0)).solution.T if c.shape[1] else x.new_zeros(x.shape[1], 0)
    return x.mean(0) - weight @ centre, weight, x - x.mean(0) - spread @ weight.T
