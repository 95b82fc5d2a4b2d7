r"""Normalizing flows: distributions made from an invertible map and a simple base.

.. math:: \log p(x \mid c) = \log p_Z(f(x; c)) + \log \left| \det \frac{\partial f(x; c)}{\partial x} \right|

A map f goes from data to noise in one pass, which is what the density needs; drawing takes the inverse. Masked networks,
splines and affine maps are zuko's; what it inverts within a fixed interval only, or by steps whose number depends on the
data, is written out here, so that every map can be captured into a graph and inverted anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any, cast

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Transform, constraints
from torch.nn.functional import logsigmoid

__all__ = [
    "TRANSFORMS",
    "ActNorm",
    "Bijection",
    "Chain",
    "Continuous",
    "FlowDistribution",
    "FromZuko",
    "bijection",
    "validation_flag_kept",
]

TRANSFORMS = (
    "affine_autoregressive",
    "spline_autoregressive",
    "neural_autoregressive",
    "affine_coupling",
    "spline_coupling",
    "neural_coupling",
    "continuous",
)
"""Maps by name, as ``bijection`` makes them."""

PERMUTATIONS = ("reverse", "random", "lu")

UNITS = 8
"""Sigmoids of a neural transform."""

ODE_STEPS = 8
"""Runge-Kutta steps of a continuous flow."""

ROOT_STEPS, HALVINGS = 56, 40
"""Steps of the search that inverts a neural transform, and those of which every other halves the interval."""


class Bijection(nn.Module):
    r"""An invertible map z = f(x; c) over the last axes of x.

    ``forward(x, context)`` gives z and :math:`\log |\det \partial z / \partial x|`, shape ``(*batch,)`` in nats, and
    ``inverse(z, context)`` gives x back.
    """

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """z and its log-determinant."""
        raise NotImplementedError(f"{type(self).__name__} should define forward")

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """The x that maps to z."""
        raise NotImplementedError(f"{type(self).__name__} should define inverse")


class Chain(Bijection):
    """Maps one after another, from data to noise."""

    def __init__(self, parts: Iterable[Bijection]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """All maps; log-determinants add."""
        total: Tensor | float = 0.0
        for part in self.parts:
            x, log_det = part(x, context)
            total = total + log_det
        return x, cast(Tensor, total)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """The inverses, last map first."""
        for part in reversed(self.parts):
            z = cast(Bijection, part).inverse(z, context)
        return z


class ActNorm(Bijection):
    r"""An affine map of each number that starts at zero mean and unit variance.

    .. math:: z = (x - \mu) / \sigma, \qquad \log |\det| = - \sum_d \log \sigma_d

    Args:
        shape: Of the parameters: those of an event, with 1 where an axis shares them, such as ``(channels, 1, 1)``.
        repeats: How many numbers of an event share each parameter.

    References:
        Kingma and Dhariwal (2018), Glow, arXiv:1807.03039, section 3.1.
    """

    def __init__(self, shape: Sequence[int], repeats: int = 1) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(tuple(shape)))
        self.log_scale = nn.Parameter(torch.zeros(tuple(shape)))
        self.repeats = repeats

    def start(self, x: Tensor) -> Tensor:
        """Take mean and standard deviation from data, ``(N, *event)``; gives the data as this map leaves them."""
        axes = (0, *(i + 1 for i, size in enumerate(self.loc.shape) if size == 1 and x.shape[i + 1] > 1))
        wide = x.double()
        self.loc.data.copy_(wide.mean(axes, keepdim=True)[0])
        self.log_scale.data.copy_(wide.std(axes, correction=0, keepdim=True)[0].clamp(min=1e-6).log())
        return cast(Tensor, self(x)[0])

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Centre and scale."""
        z = (x - self.loc) * (-self.log_scale).exp()
        return z, (-self.repeats * self.log_scale.sum()).expand(x.shape[: x.dim() - self.loc.dim()])

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Give scale and centre back."""
        return z * self.log_scale.exp() + self.loc


class FromZuko(Bijection):
    """One of zuko's lazy transforms over vectors."""

    def __init__(self, lazy: nn.Module) -> None:
        super().__init__()
        self.lazy = lazy

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One pass of its network."""
        return cast(tuple[Tensor, Tensor], self.lazy(context).call_and_ladj(x))

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """As many passes as the transform needs: 2 of a coupling, D of an autoregressive one."""
        return cast(Tensor, self.lazy(context).inv(z))


class DeepSigmoid(Transform):
    r"""A monotone neural network of one number: the logit of a mixture of sigmoids.

    .. math:: y = \operatorname{logit} \sum_k w_k\, \sigma(a_k x + b_k), \quad a_k > 0, \quad w \in \Delta

    Tails are linear, so every real number has a finite density. The inverse lies between the smallest and the largest
    :math:`(y - b_k) / a_k`, where it is searched: by Newton's
    steps and halvings in turn, then by Newton's steps.

    Args:
        weights: Logits of w, ``(*, K)``, drawn in to (-8, 8) by :math:`t / (1 + |t| / 8)`: the map is nowhere flat.
        slopes: log a, ``(*, K)``, drawn in to (-5, 5).
        shifts: b, ``(*, K)``, drawn in to (-8, 8); a fixed spread over [-2, 2] is added.

    References:
        Huang et al. (2018), Neural autoregressive flows, arXiv:1804.00779, eq. 8.
    """

    domain = codomain = constraints.real
    bijective = True
    sign = +1

    def __init__(self, weights: Tensor, slopes: Tensor, shifts: Tensor) -> None:
        super().__init__()
        weights, self.log_slopes, shifts = (_within(t, bound) for t, bound in ((weights, 8), (slopes, 5), (shifts, 8)))
        self.log_weights, self.slopes = weights.log_softmax(-1), self.log_slopes.exp()
        self.shifts = shifts + torch.linspace(-2, 2, shifts.shape[-1], dtype=shifts.dtype, device=shifts.device)

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """y and log dy/dx."""
        u = x.unsqueeze(-1) * self.slopes + self.shifts
        up, down = self.log_weights + logsigmoid(u), self.log_weights + logsigmoid(-u)
        log_s, log_rest = up.logsumexp(-1), down.logsumexp(-1)
        log_slope = (up + logsigmoid(-u) + self.log_slopes).logsumexp(-1)
        return log_s - log_rest, log_slope - log_s - log_rest

    def _call(self, x: Tensor) -> Tensor:
        return self.call_and_ladj(x)[0]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """log dy/dx."""
        return self.call_and_ladj(x)[1]

    def _inverse(self, y: Tensor) -> Tensor:
        ends = (y.unsqueeze(-1) - self.shifts) / self.slopes
        low, high = ends.amin(-1), ends.amax(-1)
        x = (low + high) / 2
        for step in range(ROOT_STEPS):
            found, log_slope = self.call_and_ladj(x)
            low, high = torch.where(found < y, x, low), torch.where(found < y, high, x)
            newton = x - (found - y) * (-log_slope).exp()
            inside = (newton >= low) & (newton <= high)
            x = (low + high) / 2 if step % 2 and step < HALVINGS else torch.where(inside, newton, (low + high) / 2)
        return x


def _within(t: Tensor, bound: float) -> Tensor:
    return t / (1 + t.abs() / bound)


class Continuous(Bijection):
    r"""Continuous flow: the solution of an ordinary differential equation from data (t = 0) to noise (t = 1).

    .. math:: \dot x = v(x, t, c), \qquad \log |\det| = \int_0^1 \nabla \cdot v(x(t), t, c)\, dt

    The divergence is exact: the identity is pushed through the layers, at D times the cost of v. Both integrals take
    classical Runge-Kutta steps of one length, so inverse and log-determinant are right up to the fourth power of it.

    Args:
        size: D.
        hidden: Hidden layers of v, with hyperbolic tangents.
        context: Size of c.
        steps: How many steps.

    References:
        Chen et al. (2018), Neural ordinary differential equations, arXiv:1806.07366, eq. 8; Grathwohl et al. (2019), FFJORD,
        arXiv:1810.01367.
    """

    def __init__(self, size: int, hidden: Sequence[int] = (64, 64), context: int = 0, steps: int = ODE_STEPS) -> None:
        super().__init__()
        sizes = (size + 1 + context, *hidden, size)
        self.layers = nn.ModuleList(nn.Linear(n, m) for n, m in pairwise(sizes))
        self.size, self.steps = size, steps

    def velocity(self, x: Tensor, t: float, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """v and its divergence."""
        first, *rest = self.layers
        h = first(_joined(x, x.new_full((*x.shape[:-1], 1), t), context))
        tangent = cast(Tensor, first.weight)[:, : self.size]  # (H, D): how h moves with x
        for layer in rest:
            a = h.tanh()
            tangent = (1 - a.square()).unsqueeze(-1) * tangent
            h = layer(a)
            last = layer is rest[-1]
            tangent = torch.einsum("dh,...hd->...", layer.weight, tangent) if last else cast(Tensor, layer.weight) @ tangent
        return h, tangent

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Forward in time, with the divergence."""
        log_det, h = torch.zeros_like(x[..., 0]), 1 / self.steps
        for i in range(self.steps):
            t = i * h
            k1, d1 = self.velocity(x, t, context)
            k2, d2 = self.velocity(x + 0.5 * h * k1, t + 0.5 * h, context)
            k3, d3 = self.velocity(x + 0.5 * h * k2, t + 0.5 * h, context)
            k4, d4 = self.velocity(x + h * k3, t + h, context)
            x, log_det = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4), log_det + h / 6 * (d1 + 2 * d2 + 2 * d3 + d4)
        return x, log_det

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Back in time."""
        h = -1 / self.steps
        for i in range(self.steps):
            t = 1 + i * h
            k1, _ = self.velocity(z, t, context)
            k2, _ = self.velocity(z + 0.5 * h * k1, t + 0.5 * h, context)
            k3, _ = self.velocity(z + 0.5 * h * k2, t + 0.5 * h, context)
            k4, _ = self.velocity(z + h * k3, t + h, context)
            z = z + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return z


def _joined(x: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
    return torch.cat([x, t] if context is None else [x, t, context.expand(*x.shape[:-1], -1)], -1)


class FlowDistribution(dist.TorchDistribution):
    r"""The distribution of :math:`x = f^{-1}(z; c)`, z from a base.

    Shapes: context ``(*batch, C)``; x ``(*batch, *event)``.

    Args:
        bijection: f, from x to z.
        base: The distribution of z, without batch axes.
        context: c; None where f takes none.
    """

    arg_constraints: dict[str, Any] = {}

    def __init__(
        self,
        bijection: Bijection,
        base: dist.TorchDistribution,
        context: Tensor | None = None,
        *,
        batch_shape: Sequence[int] | None = None,
        validate_args: bool | None = None,
    ) -> None:
        self.bijection, self.base, self.context = bijection, base, context
        found = () if context is None else context.shape[:-1]
        super().__init__(
            torch.Size(found if batch_shape is None else batch_shape), base.event_shape, validate_args=validate_args
        )

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        """Whether draws carry gradients."""
        return cast(bool, self.base.has_rsample)

    @constraints.dependent_property(is_discrete=False)
    def support(self) -> constraints.Constraint:
        """All real arrays."""
        return constraints.independent(constraints.real, len(self.event_shape))

    def expand(self, batch_shape: Any, _instance: Any = None) -> FlowDistribution:
        """The same, for more batch axes."""
        if torch.Size(batch_shape) == self.batch_shape:
            return self
        return FlowDistribution(self.bijection, self.base, self.context, batch_shape=batch_shape, validate_args=False)

    def _draw(self, sample_shape: Any, draw: Callable[[Any], Tensor]) -> Tensor:
        noise = draw(torch.Size(sample_shape) + self.batch_shape)
        return self.bijection.inverse(noise, self.context)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """A draw through the inverse."""
        return self._draw(sample_shape, self.base.rsample)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """A draw without gradients."""
        with torch.no_grad():
            return self._draw(sample_shape, self.base.sample)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density in nats, ``(*batch,)``: one pass."""
        noise, log_det = self.bijection(value, self.context)
        return self.base.log_prob(noise) + log_det

    @property
    def mean(self) -> Tensor:
        """There is no closed form."""
        raise NotImplementedError("the mean of a flow has no closed form; average draws: flow.sample(1000).mean(0)")


def bijection(
    transform: str,
    size: int,
    transforms: int = 3,
    hidden: Sequence[int] = (64, 64),
    *,
    context: int = 0,
    bins: int = 8,
    tail_bound: float = 5.0,
    permutation: str = "reverse",
    dropout: float = 0.0,
) -> Chain:
    """Maps of one kind over vectors of ``size``, nearly the identity at the start.

    Args:
        transform: One of ``TRANSFORMS``.
        size: D.
        transforms: How many.
        hidden: Hidden layers of each map's network.
        context: Size of the vector that the maps are conditioned on; 0 for none.
        bins: Of a spline.
        tail_bound: A spline acts within [-tail_bound, tail_bound] and is the identity outside.
        permutation: Order of the numbers, from map to map: ``"reverse"``, ``"random"``, or ``"lu"`` (random, with a trained
            linear map before each, kept as triangular factors; Kingma and Dhariwal 2018, arXiv:1807.03039, section 3.2).
        dropout: Share of hidden units left out at random while training.
    """
    parts: list[Bijection] = []
    with torch.device("cpu"):  # zuko's masks are computed from values, which a meta tensor has not
        for i in range(transforms):
            if permutation == "lu" and size > 1:
                parts.append(_lu(size))
            if transform == "continuous":
                part: Bijection = Continuous(size, hidden, context)
            else:
                order = torch.arange(size) if permutation == "reverse" else torch.randperm(size)
                order = order.flip(0) if permutation == "reverse" and i % 2 else order
                part = _masked(transform, size, order, tuple(hidden), context, bins, tail_bound, dropout)
            parts.append(_nearly_identity(part))
    return Chain(parts)


def _lu(size: int) -> FromZuko:
    with validation_flag_kept():
        import zuko
    return FromZuko(zuko.lazy.UnconditionalTransform(zuko.transforms.LULinearTransform, torch.eye(size)))


def _masked(
    transform: str, size: int, order: Tensor, hidden: tuple[int, ...], context: int, bins: int, bound: float, dropout: float
) -> FromZuko:
    """An autoregressive transform, or a coupling: the same with two passes, in which the second half sees the first."""
    with validation_flag_kept():
        import zuko
    kind, scheme = transform.split("_")
    univariate: Any = DeepSigmoid
    shapes: list[tuple[int, ...]] = [(UNITS,)] * 3
    if kind == "affine":
        univariate, shapes = zuko.transforms.MonotonicAffineTransform, [(), ()]
    elif kind == "spline":
        univariate, shapes = partial(zuko.transforms.MonotonicRQSTransform, bound=bound), [(bins,), (bins,), (bins - 1,)]
    named = {} if size == 1 else {"order": order, "passes": 2 if scheme == "coupling" else size}
    return FromZuko(
        zuko.flows.MaskedAutoregressiveTransform(
            size, context, univariate=univariate, shapes=shapes, **named,
            **({"hidden_features": hidden, "activation": partial(_activation, dropout)} if size > 1 or context else {}),
        )
    )  # fmt: skip


def _activation(dropout: float) -> nn.Module:
    return nn.Sequential(nn.ReLU(), nn.Dropout(dropout)) if dropout else nn.ReLU()


def _nearly_identity(part: Bijection) -> Bijection:
    layers = [m for m in part.modules() if isinstance(m, nn.Linear) or (hasattr(m, "in_features") and hasattr(m, "weight"))]
    with torch.no_grad():
        for parameter in layers[-1].parameters() if layers else part.parameters():
            parameter.mul_(0.01)
    return part


@contextmanager
def validation_flag_kept() -> Iterator[None]:
    """Importing zuko turns torch's argument validation off for everyone; keep what the caller had."""
    before = torch.distributions.Distribution._validate_args  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.distributions.Distribution.set_default_validate_args(bool(before))
