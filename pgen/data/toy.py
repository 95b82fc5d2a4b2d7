r"""Toy targets that know their own density: they sample, score and know their entropy.

The mean log-density of a model on a target's draws can at most be minus the target's entropy: the ceiling for every fit.

.. math:: \mathbb{E}_p[\log q(x)] = -H(p) - \mathrm{KL}(p \,\|\, q)

Targets in the plane follow the shapes of Grathwohl et al. (2019), FFJORD, arXiv:1810.01367, unless said otherwise. Densities
are normalised; where there is no closed form (a curve blurred by noise) they are one-dimensional Gauss-Legendre sums along the
curve, right to about 1e-9 nats within ten standard deviations of it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ..contracts import Seed, as_seed, check_event_shape, check_positive

__all__ = [
    "TOYS",
    "Toy",
    "banana",
    "checkerboard",
    "circles",
    "eight_gaussians",
    "funnel",
    "gaussian_grid",
    "gaussian_ring",
    "rings",
    "swiss_roll",
    "two_moons",
    "two_spirals",
]

CHUNK = 4096
"""Most points whose density is evaluated at a time."""


class Toy(ABC):
    r"""A density over vectors that one can sample, evaluate and hold a model against.

    Attributes:
        dim: Length D of a vector.
        entropy: :math:`-\mathbb{E}[\log p(x)]`, in nats.

    Example:
        >>> target = eight_gaussians()
        >>> x = target.sample(1000, seed=0)
        >>> x.shape, round(target.entropy, 3)
        (torch.Size([1000, 2]), 2.832)
        >>> bool((target.log_prob(x).mean() + target.entropy).abs() < 0.1)
        True
    """

    dim: int = 2

    @property
    @abstractmethod
    def entropy(self) -> float:
        """In nats."""

    @abstractmethod
    def _draw(self, n: int, generator: torch.Generator) -> Tensor:
        """Draws in float64, ``(n, dim)``."""

    @abstractmethod
    def _log_prob(self, x: Tensor) -> Tensor:
        """Log-densities of x ``(n, dim)`` in float64, ``(n,)``."""

    def sample(self, n: int, seed: Seed = 0) -> Tensor:
        """Draws, ``(n, dim)``, in torch's default dtype; the global random state is left alone."""
        check_positive("n", n)
        generator = torch.Generator().manual_seed(as_seed(seed))
        return self._draw(int(n), generator).to(torch.get_default_dtype())

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density of each row of x ``(n, dim)``, in nats and float64, ``(n,)``; minus infinity outside the support."""
        check_event_shape("x", x, (self.dim,))
        return torch.cat([self._log_prob(part) for part in x.double().split(CHUNK)])


def _uniform(n: int, generator: torch.Generator) -> Tensor:
    return torch.rand(n, generator=generator, dtype=torch.float64)


def _normal(n: int, dim: int, generator: torch.Generator) -> Tensor:
    return torch.randn(n, dim, generator=generator, dtype=torch.float64)


def _choice(n: int, count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(count, (n,), generator=generator)


def _log_normal(square: Tensor, sd: float, dim: int) -> Tensor:
    """log N(x; m, sd^2 I) from |x - m|^2."""
    return -0.5 * square / sd**2 - dim * (math.log(sd) + 0.5 * math.log(2 * math.pi))


# --- smooth in the plane -------------------------------------------------------------------------------------------------


class _Blurred(Toy):
    """Something in the plane plus Gaussian noise: so smooth that a grid finer than the noise integrates it exactly."""

    noise: float
    reach: float
    """No coordinate of what is blurred is larger."""

    @cached_property
    def entropy(self) -> float:
        """The sum of -p log p over a grid finer than the noise, in nats."""
        step, half = 0.75 * self.noise, self.reach + 7 * self.noise
        axis = torch.arange(-half, half, step, dtype=torch.float64)
        log_p = torch.cat([self.log_prob(torch.cartesian_prod(row, axis)) for row in axis.split(64)])
        return float(-(log_p.exp() * log_p).sum() * step**2)


class _Gaussians(_Blurred):
    r""":math:`p(x) = \frac{1}{K} \sum_k \mathcal{N}(x; m_k, \sigma^2 I)`."""

    def __init__(self, means: Tensor, sd: float) -> None:
        self.means, self.noise, self.reach = means, sd, float(means.abs().max())

    def _draw(self, n: int, generator: torch.Generator) -> Tensor:
        return self.means[_choice(n, len(self.means), generator)] + self.noise * _normal(n, 2, generator)

    def _log_prob(self, x: Tensor) -> Tensor:
        square = (x[:, None] - self.means.to(x)).square().sum(-1)
        return _log_normal(square, self.noise, 2).logsumexp(1) - math.log(len(self.means))


class _Rings(_Blurred):
    r"""Circles around the origin, equally likely, plus noise.

    .. math:: p(x \mid r) = \frac{1}{2 \pi \sigma^2} \exp\left(-\frac{|x|^2 + r^2}{2 \sigma^2}\right) I_0(|x| r / \sigma^2)
    """

    def __init__(self, radii: list[float], noise: float) -> None:
        self.radii, self.noise, self.reach = torch.tensor(radii, dtype=torch.float64), noise, max(radii)

    def _draw(self, n: int, generator: torch.Generator) -> Tensor:
        radius = self.radii[_choice(n, len(self.radii), generator)]
        angle = 2 * math.pi * _uniform(n, generator)
        return _polar(radius, angle) + self.noise * _normal(n, 2, generator)

    def _log_prob(self, x: Tensor) -> Tensor:
        distance, radius = x.norm(dim=1, keepdim=True), self.radii.to(x)
        bessel = torch.special.i0e(distance * radius / self.noise**2).log()  # of exp(-t) I_0(t)
        each = _log_normal((distance - radius).square(), self.noise, 2) + bessel
        return each.logsumexp(1) - math.log(len(self.radii))


class _Curves(_Blurred):
    r"""Curves :math:`c_j(t)`, equally likely, t of density w on an interval, plus Gaussian noise (and a uniform offset).

    .. math:: p(x) = \frac{1}{J} \sum_j \int w(t) \, \mathcal{N}(x; c_j(t), \sigma^2 I) \, dt

    Args:
        curve: From t ``(n,)`` to the points of all curves ``(J, n, 2)``.
        quantile: From a uniform number to t.
        span: The interval of t.
        weight: The density of t on it.
        noise: Standard deviation of the noise.
        length: A bound of the curve's length.
        offsets: For each curve (left, right), what is added uniformly to both coordinates; none by default.
    """

    def __init__(
        self,
        curve: Callable[[Tensor], Tensor],
        quantile: Callable[[Tensor], Tensor],
        span: tuple[float, float],
        weight: Callable[[Tensor], Tensor],
        noise: float,
        length: float,
        offsets: Tensor | None = None,
    ) -> None:
        self.curve, self.quantile, self.noise, self.offsets = curve, quantile, noise, offsets
        nodes, weights = np.polynomial.legendre.leggauss(64 + math.ceil(4 * length / noise))
        t = span[0] + (span[1] - span[0]) * (torch.from_numpy(nodes) + 1) / 2
        self.points, self.weights = curve(t), torch.from_numpy(weights) * (span[1] - span[0]) / 2 * weight(t)
        self.reach = float(self.points.abs().max()) + (0.0 if offsets is None else float(offsets.abs().max()))

    def _draw(self, n: int, generator: torch.Generator) -> Tensor:
        which = _choice(n, len(self.points), generator)
        x = self.curve(self.quantile(_uniform(n, generator)))[which, torch.arange(n)]
        x = x + self.noise * _normal(n, 2, generator)
        if self.offsets is None:
            return x
        left, right = self.offsets[which, :, None].unbind(1)
        return x + left + (right - left) * _uniform(2 * n, generator).reshape(n, 2)

    def _log_prob(self, x: Tensor) -> Tensor:
        log_weight = self.weights.to(x).log() - math.log(len(self.points))
        each = [self._given(x, number) + log_weight for number in range(len(self.points))]
        return torch.cat(each, 1).logsumexp(1)

    def _given(self, x: Tensor, number: int) -> Tensor:
        """log p(x | t) at the nodes of one curve, ``(n, nodes)``."""
        away = x[:, None] - self.points[number].to(x)
        if self.offsets is None:
            return _log_normal(away.square().sum(-1), self.noise, 2)
        left, right = self.offsets[number].tolist()
        mass = _log_interval((away - right) / self.noise, (away - left) / self.noise)
        return (mass - math.log(right - left)).sum(-1)


def _log_interval(lower: Tensor, upper: Tensor) -> Tensor:
    """log(Phi(upper) - Phi(lower)) of a standard normal variable, stable in both tails."""
    flip = lower > 0
    lower, upper = torch.where(flip, -upper, lower), torch.where(flip, -lower, upper)
    top = torch.special.log_ndtr(upper)
    return top + torch.log(-torch.expm1(torch.special.log_ndtr(lower) - top))


def _polar(radius: Tensor | float, angle: Tensor) -> Tensor:
    return torch.stack([radius * angle.cos(), radius * angle.sin()], -1)


def _on_circle(count: int, radius: float) -> Tensor:
    return _polar(radius, 2 * math.pi * torch.arange(count, dtype=torch.float64) / count)


def eight_gaussians() -> Toy:
    """Eight Gaussians of standard deviation 0.5 / 1.414 on a circle of radius 4 / 1.414; entropy 2.832 nats."""
    return _Gaussians(_on_circle(8, 4 / 1.414), 0.5 / 1.414)


def gaussian_ring(count: int = 8, radius: float = 1.0, sd: float = 0.01) -> Toy:
    """Narrow Gaussians on a circle, the ring of the mode-collapse literature; entropy -4.293 nats.

    References:
        Lin et al. (2018), PacGAN, arXiv:1712.04086.
    """
    check_positive("count", count)
    check_positive("radius", radius, integer=False)
    check_positive("sd", sd, integer=False)
    return _Gaussians(_on_circle(count, radius), sd)


def gaussian_grid(side: int = 5, spacing: float = 2.0, sd: float = 0.05) -> Toy:
    """Narrow Gaussians on a square grid around the origin, 25 by default; entropy 0.0653 nats.

    References:
        Lin et al. (2018), PacGAN, arXiv:1712.04086.
    """
    check_positive("side", side)
    check_positive("spacing", spacing, integer=False)
    check_positive("sd", sd, integer=False)
    axis = spacing * (torch.arange(side, dtype=torch.float64) - (side - 1) / 2)
    return _Gaussians(torch.cartesian_prod(axis, axis), sd)


def rings(noise: float = 0.08) -> Toy:
    """Four circles of radius 0.75, 1.5, 2.25 and 3 around the origin, plus noise; entropy 2.623 nats."""
    check_positive("noise", noise, integer=False)
    return _Rings([0.75, 1.5, 2.25, 3.0], noise)


def circles(noise: float = 0.24) -> Toy:
    """Two circles of radius 1.5 and 3 around the origin, plus noise; entropy 3.268 nats."""
    check_positive("noise", noise, integer=False)
    return _Rings([1.5, 3.0], noise)


def two_moons(noise: float = 0.1) -> Toy:
    """Two interleaving half circles of radius 1 (those of scikit-learn's make_moons), plus noise; entropy 1.008 nats."""
    check_positive("noise", noise, integer=False)

    def moons(t: Tensor) -> Tensor:
        upper = _polar(1.0, t)
        return torch.stack([upper, upper.new_tensor([1.0, 0.5]) - upper])

    return _Curves(moons, lambda u: math.pi * u, (0.0, math.pi), lambda t: torch.full_like(t, 1 / math.pi), noise, math.pi)


def two_spirals(noise: float = 0.1) -> Toy:
    r"""Two spirals of one and a half turns, blurred uniformly over 1/6 outward and by noise; entropy 2.645 nats.

    .. math:: \pm \left(-t \cos t + u_1, \; t \sin t + u_2\right) / 3 + \text{noise}, \quad t = 3 \pi \sqrt{u_0}, \;
        u_1, u_2 \in [0, 1/2]
    """
    check_positive("noise", noise, integer=False)
    end = 3 * math.pi

    def spirals(t: Tensor) -> Tensor:
        arm = torch.stack([-t * t.cos(), t * t.sin()], -1) / 3
        return torch.stack([arm, -arm])

    offsets = torch.tensor([[0.0, 1 / 6], [-1 / 6, 0.0]], dtype=torch.float64)
    return _Curves(spirals, lambda u: end * u.sqrt(), (0.0, end), lambda t: 2 * t / end**2, noise, end**2 / 6, offsets)


def swiss_roll(noise: float = 0.2) -> Toy:
    """A spiral from radius 0.94 to 2.83 (that of scikit-learn divided by 5), plus noise; entropy 2.670 nats."""
    check_positive("noise", noise, integer=False)
    start, width = 1.5 * math.pi, 3 * math.pi
    return _Curves(
        lambda t: torch.stack([t * t.cos(), t * t.sin()], -1)[None] / 5, lambda u: start + width * u, (start, start + width),
        lambda t: torch.full_like(t, 1 / width), noise, 20.0,
    )  # fmt: skip


# --- with edges ----------------------------------------------------------------------------------------------------------


class _Checkerboard(Toy):
    """Uniform on the eight dark squares of side 2 in [-4, 4] x [-4, 4]."""

    entropy = math.log(32)

    def _draw(self, n: int, generator: torch.Generator) -> Tensor:
        column, pair = _choice(n, 4, generator), _choice(n, 2, generator)
        corner = torch.stack([2 * column - 4, 4 * pair - 4 + 2 * (column % 2)], -1)
        return corner + 2 * _uniform(2 * n, generator).reshape(n, 2)

    def _log_prob(self, x: Tensor) -> Tensor:
        inside = (x.abs() <= 4).all(1) & ((x / 2).floor().sum(1) % 2 == 0)
        return x.new_full((len(x),), -self.entropy).masked_fill(~inside, -math.inf)


def checkerboard() -> Toy:
    """Uniform on the dark squares, side 2, of a 4 x 4 board; entropy ln 32 = 3.4657 nats."""
    return _Checkerboard()


# --- any dimension -------------------------------------------------------------------------------------------------------


class _Funnel(Toy):
    def __init__(self, dim: int, sd: float) -> None:
        self.dim, self.sd = dim, sd

    @property
    def entropy(self) -> float:
        return self.dim * 0.5 * math.log(2 * math.pi * math.e) + math.log(self.sd)

    def _draw(self, n: int, generator: torch.Generator) -> Tensor:
        z = _normal(n, self.dim, generator)
        neck = self.sd * z[:, :1]
        return torch.cat([neck, (neck / 2).exp() * z[:, 1:]], 1)

    def _log_prob(self, x: Tensor) -> Tensor:
        neck, rest = x[:, 0], x[:, 1:] * (-x[:, :1] / 2).exp()
        return _log_normal(neck.square(), self.sd, 1) + _log_normal(rest.square().sum(1), 1.0, self.dim - 1) - (
            self.dim - 1
        ) * neck / 2  # fmt: skip


def funnel(dim: int = 10, sd: float = 3.0) -> Toy:
    r"""Neal's funnel: :math:`x_1 \sim \mathcal{N}(0, \sigma^2)`, the others of variance :math:`e^{x_1}`; entropy 15.288 nats.

    References:
        Neal (2003), Slice sampling, doi:10.1214/aos/1056562461, section 8.
    """
    check_positive("dim", dim)
    check_positive("sd", sd, integer=False)
    if dim < 2:
        raise ValueError(f"`dim` should be at least 2 for a funnel, got {dim}")
    return _Funnel(int(dim), sd)


class _Banana(Toy):
    sd = 0.5

    def __init__(self, dim: int) -> None:
        self.dim = dim

    @property
    def entropy(self) -> float:
        return self.dim * 0.5 * math.log(2 * math.pi * math.e) + self.dim / 2 * math.log(self.sd)

    def _draw(self, n: int, generator: torch.Generator) -> Tensor:
        z = _normal(n, self.dim, generator)
        z[:, 1::2] = z[:, ::2].square() + self.sd * z[:, 1::2]
        return z

    def _log_prob(self, x: Tensor) -> Tensor:
        first, second = x[:, ::2], x[:, 1::2] - x[:, ::2].square()
        pairs = self.dim // 2
        return _log_normal(first.square().sum(1), 1.0, pairs) + _log_normal(second.square().sum(1), self.sd, pairs)


def banana(dim: int = 2) -> Toy:
    r"""Pairs :math:`x_1 \sim \mathcal{N}(0, 1)`, :math:`x_2 \sim \mathcal{N}(x_1^2, 1/4)`; entropy 2.1447 nats a pair."""
    check_positive("dim", dim)
    if dim % 2:
        raise ValueError(f"`dim` should be even, as a banana is made of pairs, got {dim}")
    return _Banana(int(dim))


TOYS: dict[str, Callable[[], Toy]] = {
    make.__name__: make
    for make in (
        two_moons, eight_gaussians, gaussian_ring, gaussian_grid, rings, circles, two_spirals, swiss_roll, checkerboard, funnel,
        banana,
    )
}  # fmt: skip
"""Every target by name."""
