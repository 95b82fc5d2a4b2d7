r"""Linear models with a Gaussian latent: probabilistic principal components and factor analysis.

.. math:: z \sim \mathcal{N}(0, I_q), \qquad x \mid z, c \sim \mathcal{N}(\mu + A c + W z, \Psi), \qquad
    \Psi = \sigma^2 I \text{ (PPCA)} \quad\text{or}\quad \operatorname{diag}(\psi) \text{ (factor analysis)}

The posterior of z and the marginal of x are Gaussian and known, so the guide is exact, the bound is log p(x) without variance,
and its gradient that of the likelihood. Without missing entries there is no need of steps: PPCA is an eigenvalue problem, and
factor analysis a smooth function of the noise alone. Neither likelihood tells W from W R with R orthogonal.

Tipping and Bishop (1999), Probabilistic principal component analysis, doi:10.1111/1467-9868.00196;
Joreskog (1967), Some contributions to maximum likelihood factor analysis, doi:10.1007/BF02289658.
"""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ..base import GenerativeModel
from ..contracts import Batch, Seed, check_positive
from ..data.transforms import Transform
from ..distributions.events import with_event_shape
from ..distributions.linear_gaussian import LinearGaussian, Normal, check_spread, regress
from ..training import Adam, Training

__all__ = ["FactorAnalysis", "ProbabilisticPCA"]

FLOOR = 1e-6
"""Least variance of the noise, as a share of the variance of the data."""


class _Linear(GenerativeModel):
    """What both have in common; they differ in the noise and in how it is solved for."""

    also = ("observed",)
    default_epochs = 400

    centre: Tensor
    """Mean of the data when training began, ``(D,)``: parameters are in units of ``centre`` and ``unit``."""
    unit: Tensor
    """Standard deviations of the data when training began; one for all numbers, or one for each."""

    def __init__(
        self,
        event_shape: Sequence[int],
        latent_dim: int,
        *,
        context_dim: int = 0,
        preprocess: Transform | None = None,
        seed: Seed = 0,
    ) -> None:
        super().__init__(event_shape, preprocess=preprocess, context_dim=context_dim)
        size = math.prod(self.event_shape)
        check_positive("latent_dim", latent_dim)
        if latent_dim >= size:
            raise ValueError(f"`latent_dim` should be less than the {size} numbers of a datum, got {latent_dim}")
        self.latent_dim = int(latent_dim)
        self.register_buffer("centre", torch.zeros(size))
        self.register_buffer("unit", torch.ones(self._noises(size)))
        self.shift = nn.Parameter(torch.zeros(size))
        self.log_noise = nn.Parameter(torch.zeros(self._noises(size)))
        with self.initial_weights(seed):
            self.loading = nn.Parameter(0.1 * torch.randn(size, self.latent_dim))
        if context_dim:
            self.slope = nn.Parameter(torch.zeros(size, context_dim))

    @staticmethod
    @abstractmethod
    def _noises(size: int) -> int:
        """How many variances the noise has."""

    @abstractmethod
    def _solve(self, covariance: Tensor) -> tuple[Tensor, Tensor]:
        """W ``(D, q)`` and the variances of the noise that maximise the likelihood of a covariance (divided by N)."""

    @classmethod
    def suggest(cls, x: Tensor, given: Mapping[str, Any]) -> dict[str, Any]:
        """As for every family, and a latent for every second number of a datum, at most ten."""
        return {"latent_dim": max(1, min(10, math.prod(x.shape[1:]) // 2)), **super().suggest(x, given)}

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments as plain JSON values."""
        return {"event_shape": list(self.event_shape), "latent_dim": self.latent_dim, "context_dim": self.context_dim}

    # -- the programs -------------------------------------------------------------------------------------------------

    def model(self, x: Tensor | None = None, context: Tensor | None = None, observed: Tensor | None = None) -> Tensor:
        """p(x, z | c); entries that are not observed have no likelihood."""
        with self.plate(x, context):
            z = pyro.sample("z", dist.Normal(self.shift.new_zeros(self.latent_dim), 1.0).to_event(1))
            mean = (self._loc(context) + z @ self.weight.T).unflatten(-1, self.event_shape)
            fn = Normal(mean, self.scale.reshape(self.event_shape))
            fn = fn if observed is None else fn.mask(observed)
            return pyro.sample("x", fn.to_event(len(self.event_shape)), obs=x)

    def guide(self, x: Tensor | None = None, context: Tensor | None = None, observed: Tensor | None = None) -> None:
        """p(z | x, c), which is Gaussian."""
        with self.plate(x, context):
            pyro.sample("z", self._joint(context, observed).latent(cast(Tensor, x).flatten(1)))

    def marginal(self, x: Tensor | None = None, context: Tensor | None = None, observed: Tensor | None = None) -> Tensor:
        """p(x | c) of the entries observed, which is Gaussian."""
        with self.plate(x, context):
            return pyro.sample("x", with_event_shape(self._joint(context, observed), self.event_shape), obs=x)

    def _joint(self, context: Tensor | None, observed: Tensor | None) -> LinearGaussian:
        seen = None if observed is None else observed.flatten(1)
        loc = self._loc(context) if seen is None else self._loc(context).expand(seen.shape)
        return LinearGaussian(loc, self.weight, self.scale, seen)

    def _loc(self, context: Tensor | None) -> Tensor:
        """The mean of x, ``(D,)`` or ``(N, D)``."""
        shift = self.shift if context is None else self.shift + context @ self.slope.T
        return self.centre + self.unit * shift

    @property
    def weight(self) -> Tensor:
        """W in the units of (preprocessed) x, ``(D, q)``: that of ``encode``'s z, and known up to a rotation of z."""
        return self.unit[:, None] * self.loading

    @property
    def variance(self) -> Tensor:
        """Variance of the noise of each number of x, ``(D,)``, in squared units of (preprocessed) x."""
        return self.scale.square()

    @property
    def scale(self) -> Tensor:
        """Standard deviation of the noise of each number of x, ``(D,)``, in units of (preprocessed) x."""
        return (self.unit * (0.5 * self.log_noise).exp()).expand(len(self.centre))

    def principal_axes(self) -> Tensor:
        r"""W in the rotation that makes :math:`W^\top \Psi^{-1} W` diagonal and decreasing, ``(D, q)``.

        The entry of largest size in each column is positive. W itself is known only up to a rotation; these axes are the same
        in two fits that reached the same optimum.
        """
        with torch.no_grad():
            sd = self.scale[:, None]
            left, scale, _ = torch.linalg.svd(self.weight / sd, full_matrices=False)
            axes = sd * left * scale
            return axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()

    # -- fitting ------------------------------------------------------------------------------------------------------

    def solve(self, batch: dict[str, Tensor]) -> str:
        """The maximum of the likelihood where no entry is missing."""
        if not bool(batch["observed"].all()):
            return ""
        x = batch["x"].flatten(1)
        loc, slope, residual = regress(x, batch.get("context"))
        covariance = residual.T @ residual / len(residual)
        if len(self.unit) > 1:
            check_spread(x, covariance.diagonal().sqrt())
        weight, variance = self._solve(covariance)
        self._warn_of_few(len(x))
        self._take(loc, self._units(covariance.diagonal()), weight, variance)
        if self.context_dim:
            self.slope.copy_(slope / self.unit[:, None])
        return f"closed form: {self._how}"

    _how = ""

    def prime(self, data: Batch) -> None:
        """Start at the solution for the data with missing entries replaced by their column's mean."""
        batch = self._prepared(data)[0]
        x, observed = batch["x"].flatten(1).double(), batch["observed"].flatten(1)
        count = observed.sum(0)
        if bool((count == 0).any()):
            raise ValueError(f"number {int((count == 0).nonzero()[0])} of each datum is missing in all {len(x)} data; drop it")
        mean = x.sum(0) / count
        residual = torch.where(observed, x - mean, torch.zeros_like(x))
        variances = residual.square().sum(0) / count
        if len(self.unit) > 1:
            check_spread(x, variances.sqrt())
        covariance = residual.T @ residual / len(x)
        self._warn_of_few(self.num_rows or len(x))
        with torch.no_grad():
            self._take(mean, self._units(variances), *_principal(covariance, self.latent_dim))

    def _warn_of_few(self, rows: int) -> None:
        """Say that so few rows lie in as many dimensions as there are factors, and leave nothing for the noise."""
        used = 1 + self.context_dim  # what the mean takes
        if rows > self.latent_dim + used:
            return
        fewer = f"lower `latent_dim` to {rows - used - 1} or less, or " if rows > used + 1 else ""
        warnings.warn(
            f"`data` has {rows} rows for latent_dim={self.latent_dim}: the factors fit so few without noise, and the density "
            f"rests on the floor of the noise alone; {fewer}give {self.latent_dim + used + 1} rows or more",
            stacklevel=2,
        )

    def _take(self, loc: Tensor, unit: Tensor, weight: Tensor, variance: Tensor) -> None:
        """Set the parameters to those of a solution."""
        self.centre.copy_(loc)
        self.unit.copy_(unit)
        self.shift.zero_()
        self.loading.copy_(weight / unit[:, None])
        least = FLOOR * unit.square()
        self.log_noise.copy_((torch.maximum(variance.expand_as(unit), least) / unit.square()).log())

    def _units(self, variances: Tensor) -> Tensor:
        """Standard deviations, as many as the noise has."""
        return (variances if len(self.unit) > 1 else variances.mean()[None]).sqrt()

    def _default_optimizer(self, settings: Training) -> tuple[Adam, Training]:
        schedule = settings.schedule or (None if settings.stop == "converged" else "cosine")
        return Adam(0.03), replace(settings, schedule=schedule)

    # -- missing entries ----------------------------------------------------------------------------------------------

    def impute(
        self, x: Any, num_samples: int | None = None, *, context: Any = None, seed: Seed = 0, progress: bool = True
    ) -> Tensor:
        """x with its missing entries (NaN) filled in; what is observed stays as it is.

        Args:
            x: Data, ``(N, *event_shape)``.
            num_samples: Fill in that many joint draws of the missing entries given the others; None for their mean.
            context: Context of each datum.
            seed: Keys the draws.
            progress: Whether to show a bar on what takes more than two seconds.

        Returns:
            ``(N, *event_shape)``, or ``(num_samples, N, *event_shape)``.

        Example:
            >>> import torch, math
            >>> data = torch.tensor([[0.0, 0.0, 1.0], [1.0, 1.0, 0.0], [2.0, 2.0, 1.0], [3.0, 3.0, 0.0]])
            >>> model = FactorAnalysis((3,), 1)
            >>> run = model.fit(data)
            >>> model.impute(torch.tensor([[2.5, math.nan, 0.5]])).round(decimals=1)
            tensor([[2.5000, 2.5000, 0.5000]])
        """
        batch = self._batch("x", x, context)
        if num_samples is None:
            filled = self.reconstruct(batch, seed=seed, progress=progress)
        else:
            filled = self.predict(batch, num_samples, seed, progress=progress)["x"]
        return torch.where(batch["observed"], batch["x"], filled)


class ProbabilisticPCA(_Linear):
    r"""Probabilistic principal component analysis: equal noise in every direction.

    With :math:`\lambda_1 \ge \dots \ge \lambda_D` and U the eigenvalues and eigenvectors of the data's covariance (over N),

    .. math:: \sigma^2 = \frac{1}{D - q} \sum_{i > q} \lambda_i, \qquad W = U_q (\Lambda_q - \sigma^2 I)^{1/2}

    Shapes: x ``(N, *event_shape)``, z ``(N, latent_dim)``, context ``(N, context_dim)``. NaN in x is a missing entry: densities
    are then those of the entries observed, and ``fit`` takes steps of SVI instead.

    Args:
        event_shape: Shape of one datum, of D numbers.
        latent_dim: q, less than D.
        context_dim: Size of the vector that the mean depends on linearly; 0 for none.
        preprocess: Invertible preprocessing of x; the noise is equal in its units.
        seed: Keys the initial weights.

    Raises:
        ValueError: From ``fit``, if the data lie in fewer than q + 1 dimensions, or a number is never observed.

    References:
        Tipping and Bishop (1999), doi:10.1111/1467-9868.00196, eqs. 7 and 8.

    Example:
        >>> pca = ProbabilisticPCA((2,), 1)
        >>> run = pca.fit(torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 1.0], [0.0, -1.0]]))
        >>> pca.variance.detach(), pca.principal_axes().square()  # eigenvalues 2 and 1/2: W^2 is 2 - 1/2
        (tensor([0.5000, 0.5000]), tensor([[1.5000],
                [0.0000]]))
    """

    family = "probabilistic_pca"
    _how = "eigenvectors of the sample covariance"

    @staticmethod
    def _noises(size: int) -> int:
        return 1

    def _solve(self, covariance: Tensor) -> tuple[Tensor, Tensor]:
        weight, variance = _principal(covariance, self.latent_dim)
        if float(variance) <= FLOOR * float(covariance.diagonal().mean()):
            raise ValueError(
                f"`data` lie in {self.latent_dim} dimensions or fewer, so nothing is left for the noise: lower `latent_dim`, "
                "drop numbers that are constant or repeat others, or give more data"
            )
        return weight, variance


class FactorAnalysis(_Linear):
    r"""Factor analysis: noise of its own in every number of x.

    For given noise the best W is known: with :math:`\lambda_i, u_i` the eigenvalues and eigenvectors of
    :math:`\Psi^{-1/2} S \Psi^{-1/2}`,

    .. math:: W = \Psi^{1/2} U_q (\Lambda_q - I)_+^{1/2}, \qquad -2 \langle \log p \rangle = \sum_d \log 2 \pi \psi_d
        + \sum_{i \le q} (\log \max(\lambda_i, 1) + \min(\lambda_i, 1)) + \sum_{i > q} \lambda_i

    and what remains, a smooth function of :math:`\log \psi`, is minimised by L-BFGS from three starts: no
    expectation-maximisation. The result does not depend on the units of x. Noise stays above a millionth of each number's
    variance.

    Shapes: x ``(N, *event_shape)``, z ``(N, latent_dim)``, context ``(N, context_dim)``. NaN in x is a missing entry: densities
    are then those of the entries observed, and ``fit`` takes steps of SVI instead.

    Args:
        event_shape: Shape of one datum, of D numbers.
        latent_dim: q, less than D.
        context_dim: Size of the vector that the mean depends on linearly; 0 for none.
        preprocess: Invertible preprocessing of x.
        seed: Keys the initial weights.

    Raises:
        ValueError: From ``fit``, if a number of the data is constant or never observed.

    References:
        Joreskog (1967), doi:10.1007/BF02289658, section 4; Rubin and Thayer (1982), doi:10.1007/BF02293851, for the comparison.

    Example:
        >>> factors = FactorAnalysis((3,), 1)
        >>> x = torch.tensor([[1.0, 1.0, 0.0], [-1.0, -1.0, 0.0], [1.0, 0.0, 1.0], [-1.0, 0.0, -1.0]])
        >>> run = factors.fit(x)
        >>> (factors.weight @ factors.weight.T + factors.variance.diag()).diag().detach()  # the variances of the data
        tensor([1.0000, 0.5000, 0.5000])
    """

    family = "factor_analysis"
    _how = "L-BFGS over the noise, with the loadings concentrated out"

    @staticmethod
    def _noises(size: int) -> int:
        return size

    def _solve(self, covariance: Tensor) -> tuple[Tensor, Tensor]:
        from scipy.optimize import minimize

        sd = covariance.diagonal().sqrt()
        correlation = (covariance / sd / sd[:, None]).cpu()

        def objective(log_noise: Any) -> tuple[float, Any]:
            free = torch.from_numpy(log_noise).requires_grad_()
            with torch.enable_grad():
                value = _concentrated(free, correlation, self.latent_dim)
                (slope,) = torch.autograd.grad(value, free)
            return float(value.detach()), slope.numpy()

        bounds = [(math.log(FLOOR), 0.0)] * len(sd)
        options = {"maxiter": 1000, "maxfun": 2000, "ftol": 1e-11, "gtol": 1e-6}
        starts = [start.clamp(10 * FLOOR, 1.0).log().numpy() for start in _starts(correlation, self.latent_dim)]
        tried = [minimize(objective, s, jac=True, method="L-BFGS-B", bounds=bounds, options=options) for s in starts]
        found = min(tried, key=lambda one: float(one.fun))
        noise = torch.from_numpy(found.x).exp()
        left, values = _whitened(noise, correlation)
        kept = (values[-self.latent_dim :] - 1).clamp(min=0).sqrt()
        weight = noise.sqrt()[:, None] * left[:, -self.latent_dim :] * kept
        return sd[:, None] * weight.flip(1).to(sd), sd.square() * noise.to(sd)


def _starts(correlation: Tensor, latent_dim: int) -> list[Tensor]:
    """Noise to start from, as there may be several optima: Joreskog's, what principal components leave, and one half."""
    alone = 1 / torch.linalg.pinv(correlation, hermitian=True).diagonal()
    weight, _ = _principal(correlation, latent_dim)
    return [
        (1 - 0.5 * latent_dim / len(correlation)) * alone,
        correlation.diagonal() - weight.square().sum(1),
        torch.full_like(alone, 0.5),
    ]


def _whitened(noise: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvectors and increasing eigenvalues of the covariance in units of the noise."""
    sd = noise.sqrt()
    values, left = torch.linalg.eigh(covariance / sd / sd[:, None])
    return left, values


def _concentrated(log_noise: Tensor, covariance: Tensor, latent_dim: int) -> Tensor:
    """-2 mean log p at the best W, up to a constant."""
    sd = (0.5 * log_noise).exp()
    values = torch.linalg.eigvalsh(covariance / sd / sd[:, None])
    rest, kept = values[:-latent_dim], values[-latent_dim:]
    return log_noise.sum() + rest.sum() + (kept.clamp(min=1).log() + kept.clamp(max=1)).sum()


def _principal(covariance: Tensor, latent_dim: int) -> tuple[Tensor, Tensor]:
    """W ``(D, q)`` and the variance of the noise ``(1,)`` of PPCA."""
    values, vectors = torch.linalg.eigh(covariance)
    variance = values[:-latent_dim].mean().clamp(min=0)[None]
    scale = (values[-latent_dim:] - variance).clamp(min=0).sqrt()
    return (vectors[:, -latent_dim:] * scale).flip(1), variance
