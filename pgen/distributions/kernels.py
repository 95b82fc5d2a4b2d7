r"""Kernels of density estimates: densities K(u) of a standardised offset u, with their samplers.

A *radial* kernel depends on the Euclidean length of u and is normalised over all its dimensions (scikit-learn's convention); a
*product* kernel, ``Product(Epanechnikov())``, is the product of the one-dimensional kernel over the features. The Gaussian is
both. With :math:`S_D = 2 \pi^{D/2} / \Gamma(D/2)`, the area of the unit sphere, and :math:`V_D = S_D / D`, its volume:

=============  =================================  =========================================================================
name           :math:`K(u)` up to its constant    integral, D dimensions
=============  =================================  =========================================================================
gaussian       :math:`e^{-|u|^2/2}`               :math:`(2\pi)^{D/2}`
exponential    :math:`e^{-|u|}`                   :math:`S_D \Gamma(D)`
tophat         :math:`1` where :math:`|u| < 1`    :math:`V_D`
epanechnikov   :math:`1 - |u|^2`, same            :math:`2 V_D / (D + 2)`
student        :math:`(1 + |u|^2/\nu)^{-(\nu+D)/2}`  :math:`\Gamma(\nu/2) (\nu\pi)^{D/2} / \Gamma((\nu+D)/2)`
=============  =================================  =========================================================================

Silverman (1986), Density Estimation for Statistics and Data Analysis, section 4.2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..contracts import NotAvailable, check_choice, check_positive

__all__ = [
    "KERNELS",
    "Epanechnikov",
    "Exponential",
    "Gaussian",
    "Kernel",
    "Product",
    "Radial",
    "Student",
    "Tophat",
    "as_kernel",
]


class Kernel:
    r"""A density of standardised offsets. **A kernel of your own** defines ``log_density`` and ``sample``.

    Example:
        >>> class Logistic(Kernel):
        ...     def log_density(self, u):
        ...         return -(u + 2 * torch.nn.functional.softplus(-u)).sum(-1)
        ...     def sample(self, like):
        ...         return torch.logit(torch.rand_like(like))
        >>> Logistic().log_density(torch.zeros(1))  # log 1/4
        tensor(-1.3863)
    """

    name: ClassVar[str] = ""
    compact: ClassVar[bool] = False
    """Whether K is zero outside a ball or a box, so that a leave-one-out likelihood may be zero."""

    def log_density(self, u: Tensor) -> Tensor:
        """log K(u) in nats, ``(..., D)`` to ``(...)``, with integral one over R^D; -inf where K is zero."""
        raise NotImplementedError(f"{type(self).__name__} should define log_density")

    def sample(self, like: Tensor) -> Tensor:
        """Independent draws of u in the shape ``(..., D)``, dtype and device of ``like``, from torch's default generator."""
        raise NotImplementedError(f"{type(self).__name__} should define sample")

    def variance(self, dim: int) -> float:
        """Variance of each coordinate of u, by which the rules of thumb for Gaussian kernels are carried over."""
        return 1.0

    def marginal(self, dim: int, kept: int) -> Kernel:
        """The kernel of ``kept`` of the ``dim`` coordinates, the others integrated out."""
        raise NotAvailable(
            f"the kernel {self.name or type(self).__name__} has no marginals in closed form, so no conditional density; "
            "take a product kernel, or gaussian, student, epanechnikov or tophat"
        )

    def sample_rest(self, given: Tensor, like: Tensor) -> Tensor:
        """Draws of the other coordinates, in the shape of ``like``, given the first ``(..., m)``."""
        return self.marginal(given.shape[-1] + like.shape[-1], like.shape[-1]).sample(like)

    def settings(self) -> dict[str, Any]:
        """What ``as_kernel`` builds the same kernel from: plain JSON."""
        return {"name": self.name}


class Radial(Kernel):
    """A kernel that depends on u through its squared Euclidean length."""

    def log_profile(self, squared: Tensor, dim: int) -> Tensor:
        """log K at squared length ``squared``, normalised in ``dim`` dimensions."""
        raise NotImplementedError

    def squared_radius(self, like: Tensor, dim: int) -> Tensor:
        """Draws of the squared length of u, in the shape of ``like``."""
        raise NotImplementedError

    def log_density(self, u: Tensor) -> Tensor:
        """log K(u)."""
        return self.log_profile(u.square().sum(-1), u.shape[-1])

    def sample(self, like: Tensor) -> Tensor:
        """A uniform direction, scaled by a radius."""
        direction = torch.randn_like(like)
        length = direction.square().sum(-1, keepdim=True)
        return direction * (self.squared_radius(like[..., :1], like.shape[-1]) / length).sqrt()


class Gaussian(Radial):
    r""":math:`\mathcal{N}(u; 0, I)`."""

    name = "gaussian"

    def log_profile(self, squared: Tensor, dim: int) -> Tensor:
        """-|u|^2 / 2 less the constant."""
        return -0.5 * squared - 0.5 * dim * math.log(2 * math.pi)

    def sample(self, like: Tensor) -> Tensor:
        """Standard normal."""
        return torch.randn_like(like)

    def marginal(self, dim: int, kept: int) -> Kernel:
        """The same."""
        return self


class Student(Radial):
    r"""Student's t, :math:`\nu` degrees of freedom; its marginals are the same.

    Args:
        df: :math:`\nu`.
    """

    name = "student"

    def __init__(self, df: float = 4.0) -> None:
        check_positive("df", df, integer=False)
        self.df = float(df)

    def log_profile(self, squared: Tensor, dim: int) -> Tensor:
        """Multivariate t."""
        nu = self.df
        constant = math.lgamma((nu + dim) / 2) - math.lgamma(nu / 2) - 0.5 * dim * math.log(nu * math.pi)
        return constant - 0.5 * (nu + dim) * torch.log1p(squared / nu)

    def sample(self, like: Tensor) -> Tensor:
        """Normal over the root of a chi-squared."""
        return torch.randn_like(like) / (_gamma(like[..., :1], self.df / 2) * 2 / self.df).sqrt()

    def variance(self, dim: int) -> float:
        r""":math:`\nu / (\nu - 2)`; 3 where that does not exist."""
        return self.df / (self.df - 2) if self.df > 2.5 else 3.0

    def marginal(self, dim: int, kept: int) -> Kernel:
        """The same."""
        return self

    def sample_rest(self, given: Tensor, like: Tensor) -> Tensor:
        r"""Student with :math:`\nu + m` degrees of freedom, scaled by :math:`\sqrt{(\nu + |u_g|^2) / (\nu + m)}`."""
        df = self.df + given.shape[-1]
        spread = (self.df + given.square().sum(-1, keepdim=True)) / df
        return Student(df).sample(like) * spread.sqrt()

    def settings(self) -> dict[str, Any]:
        """Name and degrees of freedom."""
        return {"name": self.name, "df": self.df}


class Exponential(Radial):
    r""":math:`e^{-|u|}`; in one dimension the Laplace density."""

    name = "exponential"

    def log_profile(self, squared: Tensor, dim: int) -> Tensor:
        """-|u| less the constant."""
        return -squared.clamp(min=1e-30).sqrt() - _log_sphere(dim) - math.lgamma(dim)

    def squared_radius(self, like: Tensor, dim: int) -> Tensor:
        """The square of a Gamma(D) variable."""
        return _gamma(like, float(dim)).square()

    def variance(self, dim: int) -> float:
        """D + 1."""
        return dim + 1.0


class _Pearson(Radial):
    r""":math:`(1 - |u|^2)^a` in the unit ball: closed under marginals, :math:`a \to a + (D - m) / 2`, and conditionals."""

    compact = True

    def __init__(self, power: float) -> None:
        self.power = power

    def log_profile(self, squared: Tensor, dim: int) -> Tensor:
        """a log(1 - |u|^2) less the constant."""
        a, half = self.power, dim / 2
        constant = math.lgamma(half + a + 1) - math.lgamma(a + 1) - half * math.log(math.pi)
        inside = squared < 1
        safe = torch.where(inside, squared, torch.zeros_like(squared))
        return torch.where(inside, a * torch.log1p(-safe) + constant, torch.full_like(squared, -math.inf))

    def squared_radius(self, like: Tensor, dim: int) -> Tensor:
        """Beta(D/2, a + 1)."""
        first, second = _gamma(like, dim / 2), _gamma(like, self.power + 1)
        return first / (first + second)

    def variance(self, dim: int) -> float:
        """1 / (D + 2 a + 2)."""
        return 1 / (dim + 2 * self.power + 2)

    def marginal(self, dim: int, kept: int) -> Kernel:
        """The same form with a higher power."""
        return _Pearson(self.power + (dim - kept) / 2)

    def sample_rest(self, given: Tensor, like: Tensor) -> Tensor:
        r"""The same form, shrunk by :math:`\sqrt{1 - |u_g|^2}`."""
        return _Pearson(self.power).sample(like) * (1 - given.square().sum(-1, keepdim=True)).clamp(min=0).sqrt()


class Tophat(_Pearson):
    """Uniform in the unit ball."""

    name = "tophat"

    def __init__(self) -> None:
        super().__init__(0.0)


class Epanechnikov(_Pearson):
    """1 - |u|^2 in the unit ball."""

    name = "epanechnikov"

    def __init__(self) -> None:
        super().__init__(1.0)


class Product(Kernel):
    r""":math:`\prod_d K_1(u_d)`, of any kernel's one-dimensional form.

    Args:
        base: The kernel.

    Example:
        >>> Product(Tophat()).log_density(torch.tensor([0.9, 0.9])).exp()  # in the square, not in the circle
        tensor(0.2500)
    """

    name = "product"

    def __init__(self, base: Kernel) -> None:
        if isinstance(base, Product) or not isinstance(base, Kernel):
            raise TypeError(f"`base` should be a kernel such as Epanechnikov(), got {type(base).__name__}")
        self.base = base

    @property
    def compact(self) -> bool:  # type: ignore[override]
        """As the kernel of each feature."""
        return self.base.compact

    def log_density(self, u: Tensor) -> Tensor:
        """A sum over features."""
        return self.base.log_density(u[..., None]).sum(-1)

    def sample(self, like: Tensor) -> Tensor:
        """Each feature by itself."""
        return self.base.sample(like[..., None])[..., 0]

    def variance(self, dim: int) -> float:
        """That of one feature."""
        return self.base.variance(1)

    def marginal(self, dim: int, kept: int) -> Kernel:
        """The same."""
        return self

    def settings(self) -> dict[str, Any]:
        """The kernel of each feature."""
        return {"name": self.name, "base": self.base.settings()}


KERNELS: dict[str, Callable[..., Kernel]] = {k.name: k for k in (Gaussian, Epanechnikov, Exponential, Tophat, Student)}
"""Kernels by name."""


def as_kernel(kernel: str | Kernel | Mapping[str, Any]) -> Kernel:
    """A kernel from its name or settings.

    Raises:
        ValueError: If there is none of this name.
        TypeError: If it is no kernel.
    """
    if isinstance(kernel, Kernel):
        return kernel
    given = {"name": kernel} if isinstance(kernel, str) else kernel
    if not isinstance(given, Mapping):
        raise TypeError(f"`kernel` should be a name ({', '.join(KERNELS)}) or a pgen Kernel, got {type(kernel).__name__}")
    if given.get("name") == Product.name:
        return Product(as_kernel(given["base"]))
    check_choice("kernel", given.get("name", ""), (*KERNELS, Product.name))
    return KERNELS[given["name"]](**{name: value for name, value in given.items() if name != "name"})


def _log_sphere(dim: int) -> float:
    """log of the area of the unit sphere."""
    return math.log(2) + 0.5 * dim * math.log(math.pi) - math.lgamma(dim / 2)


def _gamma(like: Tensor, shape: float) -> Tensor:
    return torch._standard_gamma(torch.full_like(like, shape))
