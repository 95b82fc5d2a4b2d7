r"""K distributions of one kind over the same numbers, scored all at once: what mixtures and hidden Markov models are made of.

A family of components says which arrays it needs (``shapes``), where they start (``start``: the weighted maximum of the
likelihood, smoothed), and what they mean (``log_prob`` of every component, by matrix products; ``distribution``). The arrays
themselves belong to ``Arrays``: learned, or given by a network of the context.

Two regularisers keep likelihoods bounded. They act on *gradients alone*, so values are those of the density: ``floor`` moves
each maximum where EM with :math:`\Sigma_k = S_k + \epsilon \operatorname{diag}(s^2)` would be (scikit-learn's
``reg_covar``), and ``smoothing`` adds that many counts to each category (Laplace).

Where the numbers are independent given the component, some may be missing: ``observed`` says which are there, and a factor that
is left out is one that is integrated (or summed) to one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol, cast

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.distributions.constraints import Constraint
from torch.nn.functional import logsigmoid, softplus

from ..contracts import check_choice, check_positive
from ..data.arrays import check_varies
from ..nn import MLP
from .columns import Kind, as_columns

__all__ = [
    "COVARIANCES",
    "Arrays",
    "BernoulliComponents",
    "CategoricalComponents",
    "ColumnSupports",
    "Columns",
    "Components",
    "GaussianComponents",
    "InComponent",
    "OfComponents",
    "Table",
    "gradient_alone",
    "standardised",
    "vector_components",
]

COVARIANCES = ("full", "diagonal", "spherical", "tied", "low_rank")

Values = dict[str, Tensor]
"""Arrays by name, each ``(*batch, *shape)``."""


class Arrays(nn.Module):
    r"""Named arrays: learned, or :math:`a + f(c)` with a network f of the context c.

    Args:
        shapes: Of each array.
        context_dim: Size of the context; 0 for none.
        hidden: Sizes of the network's hidden layers.
    """

    def __init__(self, shapes: dict[str, tuple[int, ...]], context_dim: int = 0, hidden: Sequence[int] = ()) -> None:
        super().__init__()
        self.shapes = shapes
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))
        self.network: MLP | None = None
        if context_dim:
            self.network = MLP(context_dim, hidden, sum(math.prod(s) for s in shapes.values())).glorot()
            with torch.no_grad():
                self.network[-1].weight.mul_(0.5)  # type: ignore[operator,union-attr]

    def forward(self, context: Tensor | None) -> Values:
        """The arrays, with the context's rows in front where there is a network."""
        base = {name: getattr(self, name) for name in self.shapes}
        if self.network is None or context is None:
            return base
        parts = self.network(context).split([math.prod(s) for s in self.shapes.values()], -1)
        return {name: base[name] + part.unflatten(-1, self.shapes[name]) for name, part in zip(self.shapes, parts)}

    @torch.no_grad()
    def set(self, values: Values) -> None:
        """Copy values into the learned arrays."""
        for name, value in values.items():
            getattr(self, name).copy_(value)


class Components(nn.Module):
    """K distributions over vectors of D numbers.

    Attributes:
        count: K.
        size: D.
        shapes: Of each array that the components need; axis 0 is K, or 1 where all components share it.
        support: Of one number.
    """

    shapes: dict[str, tuple[int, ...]]
    support: Any

    def __init__(self, count: int, size: int) -> None:
        super().__init__()
        self.count, self.size = count, size

    def start(self, x: Tensor, weight: Tensor, observed: Tensor | None = None) -> Values:
        """Arrays at the smoothed maximum of the likelihood.

        Args:
            x: Data ``(N, D)``, float64.
            weight: How much of each datum belongs to each component, ``(N, K)``, float64.
            observed: False where an entry is missing, ``(N, D)``; none is by default.
        """
        raise NotImplementedError

    def share_smoothing(self, num_data: int) -> None:
        """Say over how many data a fit adds the counts of its smoothing, where ``start`` has seen but some of them."""
        if isinstance(known := getattr(self, "num_data", None), Tensor):
            known.fill_(num_data)

    def features(self, x: Tensor, observed: Tensor | None = None) -> Tensor:
        """What k-means clusters ``(N, D)`` by, ``(N, features)``: numbers of comparable size, a mean where one is missing."""
        raise NotImplementedError

    def log_prob(self, x: Tensor, arrays: Values, observed: Tensor | None = None) -> Tensor:
        """Log-density of what is observed of each datum ``(*batch, D)`` in each component, ``(*batch, K)``, in nats."""
        raise NotImplementedError

    def centre_of(self, arrays: Values, weights: Tensor) -> Tensor:
        """Of the components mixed by ``weights`` (N, K): means, and most probable values of bits and categories, ``(N, D)``."""
        raise NotImplementedError

    def parameters_of(self, arrays: Values) -> tuple[Tensor, ...]:
        """What ``make`` takes, each ``(*batch, K, ...)``."""
        raise NotImplementedError

    def make(self, *parameters: Tensor) -> dist.TorchDistribution:
        """A distribution of D numbers."""
        raise NotImplementedError

    def distribution(self, arrays: Values) -> dist.TorchDistribution:
        """The components as one distribution, batch shape ``(*batch, K)``, event shape ``(D,)``."""
        return self.make(*self.parameters_of(arrays))

    def sample(self, arrays: Values, z: Tensor) -> Tensor:
        """One draw from the component numbered ``z`` of each row, ``(*z.shape, D)``."""
        name = next(iter(self.shapes))
        axis = arrays[name].dim() - len(self.shapes[name])
        return self.make(*[pick(parameter, z, axis) for parameter in self.parameters_of(arrays)]).sample()


def pick(values: Tensor, z: Tensor, axis: int) -> Tensor:
    """``values`` at the number ``z`` of each row along ``axis``, which is 0 where all rows share the values.

    Axes of ``values`` before it are those of ``z`` from the right; ``z`` may have more of them in front.
    """
    if axis == 0:
        return values[z]
    index = z.reshape(*z.shape, *(1,) * (values.dim() - axis)).expand(*z.shape, 1, *values.shape[axis + 1 :])
    return values.expand(*z.shape, *values.shape[axis:]).gather(z.dim(), index).squeeze(z.dim())


class GaussianComponents(Components):
    r"""Gaussians, in coordinates in which the start is standard.

    .. math:: \log \mathcal{N}(x; \mu_k, \Sigma_k) = \sum_d \log u_{k,dd} - \tfrac{1}{2} \lVert U_k (x - \mu_k) \rVert^2
        - \tfrac{D}{2} \log 2\pi, \qquad \Sigma_k^{-1} = U_k^\top U_k, \quad U_k = V_k U_k^0, \quad
        \mu_k = \mu_k^0 + (U_k^0)^{-1} m_k

    The buffers :math:`\mu^0, U^0` hold the start; :math:`m` and the lower triangular :math:`V` are learned and of order one,
    so that neither the units of x nor its correlations slow the fit down. :math:`V, U` are matrices (``full``; one for all
    components: ``tied``), vectors (``diagonal``) or numbers (``spherical``); ``low_rank`` has
    :math:`\Sigma_k = W_k W_k^\top + \Psi_k`, a mixture of factor analysers (Ghahramani and Hinton 1996, CRG-TR-96-1).

    Args:
        count: K.
        size: D.
        covariance: ``"full"``, ``"diagonal"``, ``"spherical"``, ``"tied"`` or ``"low_rank"``.
        rank: Columns of each W.
        floor: Variance that the fit adds to each component's in every number, as a share of that number's variance in the data.
    """

    support = constraints.real
    unit: Tensor
    centre: Tensor
    whiten: Tensor
    colour: Tensor

    def __init__(self, count: int, size: int, covariance: str = "full", rank: int | None = None, floor: float = 1e-6) -> None:
        super().__init__(count, size)
        check_choice("covariance", covariance, COVARIANCES)
        if (covariance == "low_rank") != (rank is not None):
            raise ValueError(f"`rank` goes with covariance='low_rank', and is needed there; got {rank}")
        check_positive("rank", rank, allow_none=True)
        if not 0 <= floor < 1:
            raise ValueError(f"`floor` is a share of the data's variances, in [0, 1), got {floor}")
        self.covariance, self.rank, self.floor = covariance, rank, floor
        self.matrix = covariance in ("full", "tied")
        kinds = 1 if covariance == "tied" else count
        scales = 1 if covariance == "spherical" else size
        self.shapes = {"shift": (count, size), "log_precision": (kinds, scales)}
        if self.matrix:
            self.shapes["lower"] = (kinds, size, size)
        if rank is not None:
            self.shapes["factor"] = (count, size, rank)
        self.register_buffer("unit", torch.ones(size))  # variances of the data
        self.register_buffer("centre", torch.zeros(count, size))  # mu^0
        whiten = torch.eye(size).expand(kinds, size, size) if self.matrix else torch.ones(kinds, scales)
        self.register_buffer("whiten", whiten.clone())  # U^0
        colour = whiten.clone() if self.matrix else torch.zeros(0)
        self.register_buffer("colour", colour)  # its inverse

    # -- where it starts ----------------------------------------------------------------------------------------------

    def features(self, x: Tensor, observed: Tensor | None = None) -> Tensor:
        """Standardised numbers."""
        if observed is None:
            return standardised(x)
        mean, variance = _moments(x, observed)
        return torch.where(observed, (x - mean) / variance.sqrt().clamp(min=1e-12), 0.0)

    def start(self, x: Tensor, weight: Tensor, observed: Tensor | None = None) -> Values:
        """Means and covariances of each component's data, to which one datum of the covariance of all data is added."""
        if observed is not None:
            return self._start_of(x, weight, observed)
        unit = x.var(0, correction=0)
        check_varies(x, _still(x, unit))
        self.unit.copy_(unit)
        total = weight.sum(0)[:, None] + 1e-9
        means = weight.T @ x / total
        if self.matrix:
            scatter = torch.stack([(w[:, None] * (x - m)).T @ (x - m) for w, m in zip(weight.T, means)])
            if self.covariance == "tied":
                scatter, total = scatter.sum(0, keepdim=True), total.sum(0, keepdim=True)
            whole = (x - x.mean(0)).T @ (x - x.mean(0)) / len(x) + 1e-6 * unit.diag()
            covariances = (scatter + whole) / (total[..., None] + 1)
        else:
            scatter = weight.T @ x.square() - total * means.square()
            covariances = (scatter.clamp(min=0) + unit) / (total + 1)
            if self.covariance == "spherical":
                covariances = covariances.mean(-1, keepdim=True)
        return self.place(means, covariances)

    def _start_of(self, x: Tensor, weight: Tensor, observed: Tensor) -> Values:
        """The same of what is observed, number by number."""
        self._check_independent()
        mean, unit = _moments(x, observed)
        filled = torch.where(observed, x, mean)
        check_varies(filled, _still(filled, unit))
        self.unit.copy_(unit)
        total = weight.T @ observed.to(weight) + 1e-9
        y = torch.where(observed, x - mean, 0.0)
        shift = weight.T @ y / total  # 0 where a component has seen nothing of a number
        scatter = (weight.T @ y.square() - total * shift.square()).clamp(min=0)
        return self.place(mean + shift, (scatter + unit) / (total + 1))

    def _check_independent(self) -> None:
        if self.covariance != "diagonal":
            raise ValueError(f"entries may be missing where covariance='diagonal', got {self.covariance!r}")

    @torch.no_grad()
    def place(self, means: Tensor, covariances: Tensor) -> Values:
        """Arrays that give these means and covariances; they become the coordinates of what is learned.

        Args:
            means: ``(K, D)``.
            covariances: Full ``(K, D, D)``, tied ``(1, D, D)``, diagonal ``(K, D)``, spherical ``(K, 1)``; of a low rank the
                diagonal, to which the factors start as a small random part.
        """
        self.centre.copy_(means)
        if self.matrix:
            lower, failed = torch.linalg.cholesky_ex(covariances.double())
            if bool(failed.any()):
                raise ValueError(f"covariance {int(failed.nonzero()[0, 0])} is not positive definite; add to its diagonal")
            eye = torch.eye(self.size, dtype=lower.dtype, device=lower.device)
            self.colour.copy_(lower)
            self.whiten.copy_(torch.linalg.solve_triangular(lower, eye.expand_as(lower), upper=False))
        else:
            self.whiten.copy_(covariances.rsqrt())
        values = {name: self.centre.new_zeros(shape) for name, shape in self.shapes.items()}
        if self.rank is not None:
            values["factor"] = 0.1 * torch.randn(self.shapes["factor"], device=self.centre.device).to(self.centre)
        return values

    # -- parameters ---------------------------------------------------------------------------------------------------

    def roots(self, arrays: Values) -> Tensor:
        """U of each component: lower triangular matrices, or the reciprocals of standard deviations."""
        precision = arrays["log_precision"].exp()
        if not self.matrix:
            return precision * self.whiten
        return (arrays["lower"].tril(-1) + torch.diag_embed(precision)) @ self.whiten

    def means(self, arrays: Values) -> Tensor:
        r"""Means :math:`\mu`, ``(*batch, K, D)``."""
        shift = arrays["shift"]
        if self.matrix:
            return self.centre + (self.colour @ shift[..., None])[..., 0]
        return self.centre + shift / self.whiten

    def covariances(self, arrays: Values) -> Tensor:
        r"""Covariances :math:`\Sigma`, ``(*batch, K, D, D)``."""
        if self.rank is not None:
            factor, variance = self._factors(arrays)
            return factor @ factor.mT + torch.diag_embed(variance)
        scale = self.scales(arrays)
        return scale @ scale.mT if self.matrix else torch.diag_embed(scale.square())

    def scales(self, arrays: Values) -> Tensor:
        r""":math:`U^{-1}`, ``(*batch, K, D, D)``, which times its transpose is :math:`\Sigma`; or standard deviations."""
        roots, shape = self.roots(arrays), arrays["shift"].shape
        if not self.matrix:
            return roots.reciprocal().expand(shape)
        eye = torch.eye(self.size).to(roots)
        return torch.linalg.solve_triangular(roots, eye.expand_as(roots), upper=False).expand(*shape, self.size)

    def _factors(self, arrays: Values) -> tuple[Tensor, Tensor]:
        """W and the diagonal of Psi."""
        return arrays["factor"] / self.whiten[..., None], (-2 * arrays["log_precision"]).exp() / self.whiten.square()

    # -- densities ----------------------------------------------------------------------------------------------------

    def log_prob(self, x: Tensor, arrays: Values, observed: Tensor | None = None) -> Tensor:
        """Log-densities, ``(*batch, K)``."""
        if observed is not None:
            return self._log_prob_of(x, arrays, observed)
        if self.rank is not None:
            fn = self.distribution(arrays)
            precision = fn.precision_matrix.diagonal(dim1=-2, dim2=-1)  # type: ignore[attr-defined]
            return fn.log_prob(x[..., None, :]) - self._penalty(precision)
        roots, means = self.roots(arrays), self.means(arrays)
        if self.matrix:
            square, log_det = _squares(x, means, roots), roots.diagonal(dim1=-2, dim2=-1).log().sum(-1)
            precision = roots.square().sum(-2)
        else:
            precision = roots.expand(means.shape).square()
            square, log_det = _weighted_squares(x, means, precision), 0.5 * precision.log().sum(-1)
        return log_det - 0.5 * (square + self.size * math.log(2 * math.pi)) - self._penalty(precision)

    def _log_prob_of(self, x: Tensor, arrays: Values, observed: Tensor) -> Tensor:
        """Log-densities of what is observed."""
        self._check_independent()
        means, precision = self.means(arrays), self.roots(arrays).square()
        each = 0.5 * precision.log() - 0.5 * math.log(2 * math.pi) - gradient_alone(0.5 * self.floor * precision * self.unit)
        return _over(observed, each) - 0.5 * _weighted_squares(x, means, precision, observed)

    def centre_of(self, arrays: Values, weights: Tensor) -> Tensor:
        """Means of the mixtures, ``(N, D)``."""
        return (weights[..., None] * self.means(arrays)).sum(-2)

    def _penalty(self, precision: Tensor) -> Tensor:
        r""":math:`\tfrac{1}{2} \epsilon \sum_d s_d^2 (\Sigma_k^{-1})_{dd}` in gradients, zero as a value."""
        return gradient_alone(0.5 * self.floor * (precision * self.unit).sum(-1))

    def parameters_of(self, arrays: Values) -> tuple[Tensor, ...]:
        """Means, and factors of covariances."""
        means = self.means(arrays)
        return (means, *self._factors(arrays)) if self.rank is not None else (means, self.scales(arrays))

    def make(self, *parameters: Tensor) -> dist.TorchDistribution:
        """Normal."""
        if self.rank is not None:
            return dist.LowRankMultivariateNormal(*parameters)
        if self.matrix:
            return dist.MultivariateNormal(parameters[0], scale_tril=parameters[1])
        return dist.Normal(*parameters).to_event(1)


def gradient_alone(value: Tensor) -> Tensor:
    """Zero, with the gradient of ``value``."""
    return value - value.detach()


def _squares(x: Tensor, means: Tensor, roots: Tensor) -> Tensor:
    r""":math:`\lVert U_k (x - \mu_k) \rVert^2`, ``(*batch, K)``."""
    if means.dim() > 2:  # the arrays have rows of their own
        return (roots @ (x[..., None, :] - means)[..., None]).square().sum((-2, -1))
    middle = means.mean(0)
    x, means = x - middle, means - middle
    if len(roots) == 1:
        y, centres = x @ roots[0].mT, means @ roots[0].mT
        return _weighted_squares(y, centres, torch.ones_like(centres))
    y = (x @ roots.flatten(0, 1).mT).unflatten(-1, roots.shape[:2])
    return (y - (roots @ means[..., None])[..., 0]).square().sum(-1)


def _weighted_squares(x: Tensor, means: Tensor, weights: Tensor, observed: Tensor | None = None) -> Tensor:
    r""":math:`\sum_d w_{kd} (x_d - \mu_{kd})^2`, ``(*batch, K)``; by matrix products in float64, as squares cancel."""
    if means.dim() > 2:
        squares = weights * (x[..., None, :] - means).square()
        return (squares if observed is None else torch.where(observed[..., None, :], squares, 0.0)).sum(-1)
    middle = means.mean(0)
    y, m, w = (x - middle).double(), (means - middle).double(), weights.double()
    y = y if observed is None else torch.where(observed, y, 0.0)
    own = w * m.square()
    found = y.square() @ w.mT - 2 * (y @ (w * m).mT) + (own.sum(-1) if observed is None else observed.double() @ own.mT)
    return found.clamp(min=0).to(x.dtype)


def _over(observed: Tensor, each: Tensor) -> Tensor:
    """The sum of ``each`` (K, D), or (N, K, D), over the numbers of each datum that are observed (N, D): ``(N, K)``."""
    seen = observed.to(each.dtype)
    return seen @ each.mT if each.dim() == 2 else (each * seen[..., None, :]).sum(-1)


def _moments(x: Tensor, observed: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of what is observed of each number, ``(D,)``."""
    count = observed.sum(0).clamp(min=1)
    mean = torch.where(observed, x, 0.0).sum(0) / count
    return mean, torch.where(observed, x - mean, 0.0).square().sum(0) / count


def standardised(x: Tensor) -> Tensor:
    """Each number of ``(N, D)`` with mean 0 and variance 1."""
    return (x - x.mean(0)) / x.std(0, correction=0).clamp(min=1e-12)


def _still(x: Tensor, variance: Tensor) -> Tensor:
    """Which numbers are constant up to the rounding of their squares."""
    return variance <= 1e-12 * x.square().mean(0)


class BernoulliComponents(Components):
    r"""Independent bits: :math:`\log p(x \mid k) = \sum_d x_d \ell_{kd} - \log(1 + e^{\ell_{kd}})`.

    Args:
        count: K.
        size: D.
        smoothing: Counts added to each of the two values, in each component.
    """

    support = constraints.boolean
    num_data: Tensor

    def __init__(self, count: int, size: int, smoothing: float = 1.0) -> None:
        super().__init__(count, size)
        self.smoothing, self.shapes = smoothing, {"logits": (count, size)}
        self.register_buffer("num_data", torch.ones(()))

    def features(self, x: Tensor, observed: Tensor | None = None) -> Tensor:
        """The bits."""
        return x if observed is None else torch.where(observed, x, _moments(x, observed)[0])

    def start(self, x: Tensor, weight: Tensor, observed: Tensor | None = None) -> Values:
        """Log odds of the smoothed frequencies."""
        self.num_data.fill_(len(x))
        if observed is None:
            ones, total = weight.T @ x, weight.sum(0)[:, None]
        else:
            ones, total = weight.T @ torch.where(observed, x, 0.0), weight.T @ observed.to(weight)
        counts = max(self.smoothing, 1e-2)
        return {"logits": torch.logit((ones + counts) / (total + 2 * counts))}

    def log_prob(self, x: Tensor, arrays: Values, observed: Tensor | None = None) -> Tensor:
        """Log-masses, ``(*batch, K)``."""
        logits = arrays["logits"]
        x = x if observed is None else torch.where(observed, x, 0.0)
        inside = (logits * x[..., None, :]).sum(-1) if logits.dim() > 2 else x @ logits.mT
        prior = self.smoothing / self.num_data * (logsigmoid(logits) + logsigmoid(-logits)).sum((-2, -1))
        total = softplus(logits).sum(-1) if observed is None else _over(observed, softplus(logits))
        return inside - total + gradient_alone(prior)[..., None]

    def centre_of(self, arrays: Values, weights: Tensor) -> Tensor:
        """The most probable bits, ``(N, D)``."""
        return ((weights[..., None] * arrays["logits"].sigmoid()).sum(-2) > 0.5).to(weights)

    def parameters_of(self, arrays: Values) -> tuple[Tensor, ...]:
        """Log odds."""
        return (arrays["logits"],)

    def make(self, *parameters: Tensor) -> dist.TorchDistribution:
        """Bernoulli."""
        return dist.Bernoulli(logits=parameters[0]).to_event(1)


class CategoricalComponents(Components):
    r"""Independent categories: :math:`\log p(x \mid k) = \sum_d \log \operatorname{softmax}(\ell_{kd})_{x_d}`.

    Args:
        count: K.
        size: D.
        num_classes: Values 0, ..., ``num_classes`` - 1 that each number takes.
        smoothing: Counts added to each of the values, in each component.
    """

    num_data: Tensor

    def __init__(self, count: int, size: int, num_classes: int, smoothing: float = 1.0) -> None:
        super().__init__(count, size)
        check_positive("num_classes", num_classes)
        self.support = constraints.integer_interval(0, num_classes - 1)
        self.num_classes, self.smoothing, self.shapes = num_classes, smoothing, {"logits": (count, size, num_classes)}
        self.register_buffer("num_data", torch.ones(()))

    def _one_hot(self, x: Tensor, like: Tensor) -> Tensor:
        return (x[..., None] == torch.arange(self.num_classes, device=x.device)).to(like.dtype)

    def _seen(self, x: Tensor, like: Tensor, observed: Tensor | None) -> Tensor:
        """One-hot categories side by side, ``(*batch, D C)``; zero where missing."""
        hot = self._one_hot(x, like)
        return (hot if observed is None else torch.where(observed[..., None], hot, 0.0)).flatten(-2)

    def features(self, x: Tensor, observed: Tensor | None = None) -> Tensor:
        """One-hot categories."""
        if observed is None:
            return self._seen(x, x, None)
        hot = self._one_hot(x, x)
        return torch.where(observed[..., None], hot, _moments(hot, observed[..., None])[0]).flatten(1)

    def start(self, x: Tensor, weight: Tensor, observed: Tensor | None = None) -> Values:
        """Logarithms of the smoothed frequencies."""
        self.num_data.fill_(len(x))
        counts = (weight.T @ self._seen(x, weight, observed)).unflatten(-1, (self.size, -1)) + max(self.smoothing, 1e-2)
        return {"logits": (counts / counts.sum(-1, keepdim=True)).log()}

    def log_prob(self, x: Tensor, arrays: Values, observed: Tensor | None = None) -> Tensor:
        """Log-masses, ``(*batch, K)``."""
        table = arrays["logits"].log_softmax(-1).flatten(-2)  # (*, K, D C)
        seen = self._seen(x, table, observed)  # (*, D C)
        inside = (table * seen[..., None, :]).sum(-1) if table.dim() > 2 else seen @ table.mT
        return inside + gradient_alone(self.smoothing / self.num_data * table.sum((-2, -1)))[..., None]

    def centre_of(self, arrays: Values, weights: Tensor) -> Tensor:
        """The most probable categories, ``(N, D)``."""
        return (weights[..., None, None] * arrays["logits"].softmax(-1)).sum(-3).argmax(-1).to(weights)

    def parameters_of(self, arrays: Values) -> tuple[Tensor, ...]:
        """Logits."""
        return (arrays["logits"],)

    def make(self, *parameters: Tensor) -> dist.TorchDistribution:
        """Categorical."""
        return dist.Categorical(logits=parameters[0]).to_event(1)


class Columns(Components):
    """Numbers of several kinds side by side, independent within a component.

    Args:
        parts: Components of each kind.
        columns: Which of the D numbers each of them is about.
    """

    def __init__(self, parts: Sequence[Components], columns: Sequence[Sequence[int]]) -> None:
        super().__init__(parts[0].count, sum(len(c) for c in columns))
        self.parts = nn.ModuleList(parts)
        self.shapes = {f"{name}_{i}": shape for i, part in enumerate(parts) for name, shape in part.shapes.items()}
        order = [column for part in columns for column in part]
        for i, part in enumerate(columns):
            self.register_buffer(f"columns_{i}", torch.tensor(list(part)), persistent=False)
        self.back: Tensor
        self.register_buffer("back", torch.tensor(sorted(range(len(order)), key=order.__getitem__)), persistent=False)
        self.support = ColumnSupports([part.support for part in parts], columns)

    def _kinds(self) -> list[tuple[Any, Tensor]]:
        """Components of each kind and their columns."""
        return [(part, getattr(self, f"columns_{i}")) for i, part in enumerate(self.parts)]

    def _each(self, arrays: Values) -> list[tuple[Any, Tensor, Values]]:
        """Components, their columns, their arrays."""
        kinds = enumerate(self._kinds())
        return [(part, columns, {name: arrays[f"{name}_{i}"] for name in part.shapes}) for i, (part, columns) in kinds]

    def features(self, x: Tensor, observed: Tensor | None = None) -> Tensor:
        """Of each kind, side by side."""
        return torch.cat([part.features(x[:, columns], _at(observed, columns)) for part, columns in self._kinds()], 1)

    def start(self, x: Tensor, weight: Tensor, observed: Tensor | None = None) -> Values:
        """Each kind by itself."""
        started = [part.start(x[:, columns], weight, _at(observed, columns)) for part, columns in self._kinds()]
        return {f"{name}_{i}": value for i, values in enumerate(started) for name, value in values.items()}

    def share_smoothing(self, num_data: int) -> None:
        """Each kind by itself."""
        for part in self.parts:
            part.share_smoothing(num_data)  # type: ignore[operator]

    def log_prob(self, x: Tensor, arrays: Values, observed: Tensor | None = None) -> Tensor:
        """Log-densities, ``(*batch, K)``."""
        each = self._each(arrays)
        parts = [part.log_prob(x[..., columns], values, _at(observed, columns)) for part, columns, values in each]
        return sum(parts[1:], parts[0])

    def centre_of(self, arrays: Values, weights: Tensor) -> Tensor:
        """Each kind by itself."""
        return torch.cat([part.centre_of(values, weights) for part, _, values in self._each(arrays)], -1)[..., self.back]

    def sample(self, arrays: Values, z: Tensor) -> Tensor:
        """One draw from the component numbered ``z`` of each row."""
        drawn = [part.sample(values, z) for part, _, values in self._each(arrays)]
        dtype = next(iter(arrays.values())).dtype
        return torch.cat([d.to(dtype) for d in drawn], -1)[..., self.back]


def _at(observed: Tensor | None, columns: Tensor) -> Tensor | None:
    """What is observed of some of the numbers."""
    return None if observed is None else observed[..., columns]


class ColumnSupports(Constraint):
    """Columns of several kinds."""

    def __init__(self, kinds: Sequence[Constraint], columns: Sequence[Sequence[int]]) -> None:
        self.kinds, self.columns = kinds, columns

    def check(self, value: Tensor) -> Tensor:
        """For each number, whether it may be."""
        inside = torch.ones_like(value, dtype=torch.bool)
        for kind, columns in zip(self.kinds, self.columns):
            inside[..., list(columns)] = kind.check(value[..., list(columns)])
        return inside

    def of_column(self, column: int) -> Constraint:
        """The constraint of one column."""
        return next(kind for kind, columns in zip(self.kinds, self.columns) if column in columns)

    def __repr__(self) -> str:
        return ", ".join(f"{kind} in columns {list(columns)}" for kind, columns in zip(self.kinds, self.columns))


KINDS = ("gaussian", "bernoulli", "categorical")


def vector_components(
    count: int,
    size: int,
    likelihood: str | None,
    *,
    num_classes: int | None = None,
    columns: Sequence[Kind] | None = None,
    covariance: str = "diagonal",
    rank: int | None = None,
    floor: float = 1e-6,
    smoothing: float = 1.0,
) -> Components:
    """Components of one kind, or of a kind for each number.

    Args:
        count: K.
        size: D.
        likelihood: ``"gaussian"``, ``"bernoulli"`` or ``"categorical"``; None with ``columns``.
        num_classes: Values of categories.
        columns: What each of the D numbers holds: ``"continuous"`` (Gaussian), ``"binary"``, ``("categorical", K)``, or
            ``("ordinal", K)``, whose order is not made use of.
        covariance: Of Gaussians.
        rank: Of ``covariance="low_rank"``.
        floor: Of Gaussians, see ``GaussianComponents``.
        smoothing: Of bits and categories, see ``BernoulliComponents``.
    """
    groups: dict[tuple[str, int], list[int]] = {}
    for number, model in enumerate(_models(size, likelihood, num_classes, columns)):
        groups.setdefault(model, []).append(number)

    def made(kind: str, values: int, numbers: list[int]) -> Components:
        if kind == "gaussian":
            return GaussianComponents(count, len(numbers), covariance, rank, floor)
        if kind == "bernoulli":
            return BernoulliComponents(count, len(numbers), smoothing)
        return CategoricalComponents(count, len(numbers), values, smoothing)

    parts = [made(kind, values, numbers) for (kind, values), numbers in groups.items()]
    return parts[0] if len(parts) == 1 else Columns(parts, list(groups.values()))


def _models(
    size: int, likelihood: str | None, num_classes: int | None, columns: Sequence[Kind] | None
) -> list[tuple[str, int]]:
    """The distribution of each number, and how many values it has."""
    if columns is not None:
        for name, value in (("likelihood", likelihood), ("num_classes", num_classes)):
            if value is not None:
                raise ValueError(f"`{name}` is for numbers that are all alike, and `columns` says what each is; leave it out")
        models = {"continuous": "gaussian", "binary": "bernoulli"}
        return [(models.get(kind, "categorical"), values) for kind, values in as_columns(columns, size)]
    if not isinstance(likelihood, str):
        raise ValueError(f"`likelihood` is one name for all numbers, got {likelihood!r:.60}; `columns` says what each is")
    check_choice("likelihood", likelihood, KINDS)
    if (likelihood == "categorical") != (num_classes is not None):
        raise ValueError(
            "`num_classes` is missing: a category needs the number of its values"
            if num_classes is None
            else "`num_classes` goes with likelihood='categorical'; leave it out"
        )
    return [(likelihood, num_classes or 0)] * size


class Table(Protocol):
    """Densities of x in every component, and draws from one."""

    @property
    def support(self) -> Constraint:
        """Of each number."""

    def log_prob(self, x: Tensor) -> Tensor:
        """``(*batch, K)``."""

    def sample(self, z: Tensor) -> Tensor:
        """``(*z.shape, *event_shape)``."""


class OfComponents(dist.TorchDistribution):
    """A vector from a component that is drawn by weights.

    Args:
        weights: Probabilities of the components, ``(*batch, K)``.
        components: What they are.
        arrays: Their arrays; with the axes of the batch where each row has its own.
    """

    arg_constraints: ClassVar[dict[str, Constraint]] = {}

    def __init__(self, weights: Tensor, components: Components, arrays: Values) -> None:
        self.weights, self.components, self.arrays = weights, components, arrays
        super().__init__(weights.shape[:-1], torch.Size([components.size]), validate_args=False)

    @property
    def support(self) -> Constraint:
        """Of each number."""
        return cast(Constraint, self.components.support)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density in nats, ``(*batch,)``."""
        return torch.logsumexp(self.weights.log() + self.components.log_prob(x, self.arrays), -1)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """A component, then what it makes."""
        return self.components.sample(self.arrays, dist.Categorical(self.weights).sample(torch.Size(sample_shape)))


class InComponent(dist.TorchDistribution):
    """x in the component numbered z, for a z that is drawn or that takes all its values along an axis to the left of the rows.

    Args:
        table: Densities in every component; of all of them at once, whatever z.
        z: Numbers of components.
        event_shape: Shape of one x.
    """

    arg_constraints: ClassVar[dict[str, Constraint]] = {}

    def __init__(self, table: Table, z: Tensor, event_shape: Sequence[int], batch_shape: torch.Size | None = None) -> None:
        self.table, self.z = table, z
        super().__init__(z.shape if batch_shape is None else batch_shape, torch.Size(event_shape), validate_args=False)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> InComponent:
        """The same with more axes."""
        return InComponent(self.table, self.z, self.event_shape, torch.Size(batch_shape))

    @property
    def support(self) -> Constraint:
        """Of each number of x."""
        return self.table.support

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draws of x."""
        return self.table.sample(self.z.expand((*sample_shape, *self.batch_shape)))

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x | z), in nats."""
        table = self.table.log_prob(x)  # (*rows, K)
        rows = table.shape[:-1]
        if self.z.dim() > len(rows) and self.z.numel() == self.z.shape[0]:  # all values, to the left of the rows
            every = table.movedim(-1, 0)[self.z.reshape(-1)]
            return every.reshape(len(every), *(1,) * (self.z.dim() - 1 - len(rows)), *rows)
        z = self.z.expand(self.batch_shape)
        return table.expand(*z.shape, -1).gather(-1, z[..., None])[..., 0]
