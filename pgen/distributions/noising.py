r"""The chain of a diffusion model: how data become noise, and the way back, seen at one random time.

.. math:: q(z_t \mid x) = \mathcal{N}(\alpha_t x, \sigma_t^2 I), \qquad \alpha_t^2 = \operatorname{sigmoid}(\lambda_t),
    \quad \sigma_t^2 = \operatorname{sigmoid}(-\lambda_t)

for times t in [0, 1], with the log signal-to-noise ratio :math:`\lambda_t = \log \alpha_t^2 / \sigma_t^2` falling from
:math:`\lambda_\max` at t = 0 to :math:`\lambda_\min` at t = 1.

The two densities of the chain are taken relative to one measure, that of the forward chain itself: minus the logarithm is 0
for ``Noising``, and for ``Denoising`` the divergence of the two chains from z_1 down to z_0. That is a sum over times, and one
random time gives an unbiased estimate of it; so means of it are bounds, and logarithms of means of exponentials are not.

Kingma, Salimans, Poole, Ho (2021), Variational diffusion models, arXiv:2107.00630.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn.functional import softplus

from ..contracts import check_choice

__all__ = ["SCHEDULES", "Denoising", "NoiseSchedule", "Noising", "Transport", "alpha_sigma", "wide"]

SCHEDULES = ("linear_log_snr", "cosine", "linear", "learned")


def alpha_sigma(log_snr: Tensor) -> tuple[Tensor, Tensor]:
    r""":math:`\alpha` and :math:`\sigma` at a log signal-to-noise ratio.

    Example:
        >>> alpha_sigma(torch.tensor(0.0))
        (tensor(0.7071), tensor(0.7071))
    """
    return torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()


def wide(numbers: Tensor, like: Tensor) -> Tensor:
    """One number a datum, ``(B,)``, with as many axes as ``like``."""
    return numbers.reshape(*numbers.shape, *[1] * (like.dim() - numbers.dim()))


class NoiseSchedule(nn.Module):
    r"""The log signal-to-noise ratio as a function of time, between two ends.

    - ``linear_log_snr``: :math:`\lambda_t` is linear in t.
    - ``cosine``: :math:`\alpha = \cos(\pi t' / 2)` (Nichol and Dhariwal 2021, arXiv:2102.09672).
    - ``linear``: :math:`-\log \alpha^2 = 0.1 t' + 9.95 t'^2`, the continuous form of the linear variances of Ho et al. (2020).
    - ``learned``: a monotone network, and learned ends (Kingma et al. 2021, appendix H). In continuous time the bound depends
      on the ends alone, and the network is trained to lower its variance, by the gradient of the squared loss.

    In the second and third t' runs linearly between the times at which the ends are reached.

    Args:
        kind: One of ``SCHEDULES``.
        log_snr: :math:`(\lambda_\min, \lambda_\max)`.
        units: Hidden units of the monotone network.

    Example:
        >>> schedule = NoiseSchedule("cosine", (-8.0, 10.0))
        >>> [round(float(v), 4) for v in schedule(torch.tensor([0.0, 0.5, 1.0]))[0]]
        [10.0, 0.0232, -8.0]
    """

    ends: Tensor

    def __init__(self, kind: str = "cosine", log_snr: tuple[float, float] = (-10.0, 13.3), units: int = 64) -> None:
        super().__init__()
        check_choice("schedule", kind, SCHEDULES)
        self.kind = kind
        ends = torch.tensor([float(v) for v in log_snr])
        if kind != "learned":
            self.register_buffer("ends", ends)
            return
        self.ends = nn.Parameter(ends)
        self.slope = nn.Parameter(torch.full((units,), math.log(math.expm1(10.0))))
        self.centre = nn.Parameter(torch.linspace(0.0, 1.0, units))
        self.height = nn.Parameter(torch.full((units,), -3.0))

    def forward(self, t: Tensor, judged: Callable[[Tensor], Tensor] | None = None) -> tuple[Tensor, Tensor]:
        r""":math:`\lambda_t` and :math:`-d\lambda / dt` at times of any shape; ``judged`` takes the part that is learned."""
        low, high = self.ends[0], self.ends[1]
        if self.kind == "cosine":
            start, stop = (torch.atan(torch.exp(-0.5 * end)) * (2 / math.pi) for end in (high, low))
            angle = 0.5 * math.pi * (start + (stop - start) * t)
            return -2 * torch.log(torch.tan(angle)), (stop - start) * (2 * math.pi) / torch.sin(2 * angle)
        if self.kind == "linear":
            start, stop = (_linear_time(end) for end in (high, low))
            s = start + (stop - start) * t
            spent = 0.1 * s + 9.95 * s * s  # - log alpha^2
            return -torch.log(torch.expm1(spent)), (stop - start) * (0.1 + 19.9 * s) / -torch.expm1(-spent)
        done, rate = (t, torch.ones_like(t)) if self.kind == "linear_log_snr" else self._learned(t)
        if judged is not None:
            done, rate = judged(done), judged(rate)
        return high - (high - low) * done, (high - low) * rate

    def _learned(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """A rising function of t from 0 to 1, and its slope: a line and sigmoids."""
        steep, height = softplus(self.slope), softplus(self.height)

        def rising(t: Tensor) -> tuple[Tensor, Tensor]:
            s = torch.sigmoid(steep * (t.unsqueeze(-1) - self.centre))
            return t + (height * s).sum(-1), 1 + (height * steep * s * (1 - s)).sum(-1)

        ends = rising(torch.arange(2.0, device=t.device, dtype=t.dtype))[0]
        value, slope = rising(t)
        return (value - ends[0]) / (ends[1] - ends[0]), slope / (ends[1] - ends[0])


def _linear_time(log_snr: Tensor) -> Tensor:
    """When the linear schedule reaches a log signal-to-noise ratio."""
    spent = softplus(-log_snr)
    return 2 * spent / (0.1 + (0.01 + 39.8 * spent).sqrt())


class _Chain(TorchDistribution):
    """What both directions share: a value is z_0, the noise that leads from x to z_t, and t: ``(B, 2 D + 1)``."""

    arg_constraints: dict[str, Any] = {}
    support = constraints.real_vector
    estimated = True
    """Log-densities are unbiased estimates: their means are bounds, logarithms of mean exponentials are not."""

    def __init__(self, rows: int, size: int) -> None:
        super().__init__(torch.Size([rows]), torch.Size([2 * size + 1]), validate_args=False)
        self.size = size


class Noising(_Chain):
    r"""The forward chain from x: its end z_0, and its noise at one random time.

    Times are uniform on [0, 1), and evenly spread over the data of a batch: :math:`t_i = (u + i / B) \bmod 1` with one u for
    all (Kingma et al. 2021, appendix I.1). The log-density relative to the forward chain itself is 0.

    Args:
        x: Data, ``(B, *event_shape)``.
        log_snr: That of z_0, ``()``.
    """

    has_rsample = True

    def __init__(self, x: Tensor, log_snr: Tensor) -> None:
        super().__init__(len(x), math.prod(x.shape[1:]))
        self.x, self.log_snr = x, log_snr

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008  (the base class's signature)
        """One draw for each datum."""
        x, (alpha, sigma) = self.x.flatten(1), alpha_sigma(self.log_snr)
        z = alpha * x + sigma * torch.randn_like(x)
        return torch.cat([z, torch.randn_like(x), _even_times(x)[:, None]], -1)

    def log_prob(self, value: Tensor) -> Tensor:
        """Zero: the measure is the chain's own."""
        return value.new_zeros(value.shape[:-1])


class Denoising(_Chain):
    r"""The reverse chain, relative to the forward chain from x: minus the divergence of the two, estimated at one time.

    .. math::

        \log \frac{p(z_{0..1})}{q(z_{0..1} \mid x)} \simeq -D\bigl(q(z_1 \mid x) \,\|\, \mathcal{N}(0, I)\bigr)
            - \tfrac12 \omega_t \lVert x - \hat{x}(z_t, \lambda_t) \rVert^2

    with :math:`\omega_t = -e^{\lambda_t} d\lambda / dt` in continuous time, and :math:`T (e^{\lambda_s} - e^{\lambda_t})` for a
    chain of T steps, where t is i / T, s one step before it, and i uniform on 1..T.

    Shapes: a value is ``(B, 2 D + 1)``: z_0, the noise at time t, and t.

    Args:
        denoise: From z ``(B, *event_shape)`` and log-SNR ``(B,)`` to the estimate of x, ``(B, *event_shape)``.
        schedule: The noise schedule.
        x: Data, ``(B, *event_shape)``; None to sample.
        draw: Draws z_0, ``(rows, *event_shape)``, from the reverse chain.
        rows: How many to draw, where x is None.
        event_shape: Shape of a datum.
        num_steps: T; None for continuous time.
        weight: What ``regression`` multiplies the squared error of x by, from the log-SNR ``(B,)``.
        real: Whether x is real, so that ever less noise leaves ever as much to predict: then what the best estimate of
            standard normal data would err, less its mean, is subtracted, which takes most of the variance away.

    References:
        Kingma et al. (2021), arXiv:2107.00630, equations 11 to 18.
    """

    has_rsample = False

    def __init__(
        self,
        denoise: Callable[[Tensor, Tensor], Tensor],
        schedule: NoiseSchedule,
        x: Tensor | None,
        draw: Callable[[int], Tensor],
        *,
        rows: int,
        event_shape: Sequence[int],
        num_steps: int | None = None,
        weight: Callable[[Tensor], Tensor] = torch.exp,
        real: bool = True,
    ) -> None:
        super().__init__(rows, math.prod(event_shape))
        self.denoise, self.schedule, self.x, self.draw, self.shape_of_x = denoise, schedule, x, draw, tuple(event_shape)
        self.num_steps, self.weight, self.real = num_steps, weight, real

    def log_prob(self, value: Tensor) -> Tensor:
        """Minus the divergence, estimated, ``(B,)`` in nats."""
        share: dict[str, Tensor] = {}
        judged = None if self.num_steps else lambda part: _judged(part, share)
        log_snr, weight = self._weighted(value[..., -1], judged)
        loss = cost = 0.5 * weight * self._error(value, log_snr)
        if self.real:
            cost = loss - 0.5 * weight * self._luck(value, log_snr)
        share["cost"], share["scale"] = cost, loss.mean()
        return -self._prior() - cost

    def regression(self, value: Tensor) -> Tensor:
        """Half the squared error of what the network predicts at the value's time, ``(B,)``: the simple loss."""
        if self.schedule.kind == "learned":
            raise ValueError("a learned schedule is trained by the bound: use objective=pgen.ELBO(), or a fixed schedule")
        log_snr, _ = self._weighted(value[..., -1], None)
        return 0.5 * self.weight(log_snr) * self._error(value, log_snr)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008  (the base class's signature)
        """z_0 from the reverse chain, and no noise."""
        z = self.draw(self.batch_shape[0]).flatten(1)
        return torch.cat([z, z.new_zeros(len(z), self.size + 1)], -1)

    def _weighted(self, t: Tensor, judged: Callable[[Tensor], Tensor] | None) -> tuple[Tensor, Tensor]:
        """Log-SNR of z_t, and the weight of the squared error of x."""
        if self.num_steps is None:
            log_snr, rate = self.schedule(t, judged)
            return log_snr, log_snr.exp() * rate
        i = (t * self.num_steps).floor() + 1
        before, log_snr = (self.schedule(k / self.num_steps)[0] for k in (i - 1, i))
        return log_snr, self.num_steps * log_snr.exp() * torch.expm1(before - log_snr)

    def _error(self, value: Tensor, log_snr: Tensor) -> Tensor:
        """Squared error of the estimate of x, ``(B,)``."""
        assert self.x is not None
        x = self.x
        noise = value[..., self.size : -1].unflatten(-1, self.shape_of_x)
        alpha, sigma = (wide(part, x) for part in alpha_sigma(log_snr))
        return (x - self.denoise(alpha * x + sigma * noise, log_snr)).square().flatten(1).sum(-1)

    def _luck(self, value: Tensor, log_snr: Tensor) -> Tensor:
        r"""Of the estimate :math:`\alpha z` of x: its squared error less the mean of that over the noise, ``(B,)``."""
        assert self.x is not None
        x, noise, (alpha, sigma) = self.x.flatten(1), value[..., self.size : -1], alpha_sigma(log_snr)
        drawn = alpha * alpha * (noise.square().sum(-1) - self.size) - 2 * alpha * sigma * (noise * x).sum(-1)
        return sigma * sigma * drawn

    def _prior(self) -> Tensor:
        """Divergence of q(z_1 | x) from standard normal noise, ``(B,)``."""
        assert self.x is not None
        low = self.schedule.ends[0]
        signal, noise = torch.sigmoid(low), torch.sigmoid(-low)
        return 0.5 * (signal * self.x.square().flatten(1).sum(-1) + self.size * (noise - 1 - noise.log()))


class Transport(TorchDistribution):
    r"""What standard normal noise becomes along a velocity, from t = 1 back to t = 0.

    .. math:: x = z_0, \qquad \frac{dz_t}{dt} = v(z_t, t), \qquad z_1 \sim \mathcal{N}(0, I)

    ``regression`` is what flow matching minimises: :math:`\tfrac12 \lVert v(z_t, t) - (\epsilon - y) \rVert^2` at
    :math:`z_t = (1 - t) y + t \epsilon`, with y the data in the units of z and one random time for each datum.

    Args:
        velocity: v of z ``(B, *event_shape)`` and times ``(B,)``.
        standard: From x to the units of z.
        density: The log-density of x ``(B, *event_shape)``, ``(B,)`` in nats.
        draw: Draws of x.
        rows: Batch size.
        event_shape: Shape of a datum.

    References:
        Lipman et al. (2023), arXiv:2210.02747, equations 20 to 23 with a smallest standard deviation of zero.
    """

    arg_constraints: dict[str, Any] = {}
    has_rsample = False

    def __init__(
        self,
        velocity: Callable[[Tensor, Tensor], Tensor],
        standard: Callable[[Tensor], Tensor],
        density: Callable[[Tensor], Tensor],
        draw: Callable[[int], Tensor],
        *,
        rows: int,
        event_shape: Sequence[int],
    ) -> None:
        super().__init__(torch.Size([rows]), torch.Size(event_shape), validate_args=False)
        self.velocity, self.standard, self.density, self.draw = velocity, standard, density, draw

    @property
    def support(self) -> Any:
        """The reals."""
        real: Any = constraints.real
        return constraints.independent(real, len(self.event_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density in nats."""
        return self.density(value)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008  (the base class's signature)
        """One draw a row."""
        return self.draw(self.batch_shape[0])

    def regression(self, value: Tensor) -> Tensor:
        """Half the squared error of the velocity at one time, ``(B,)``."""
        y = self.standard(value)
        noise, t = torch.randn_like(y), _even_times(y)
        at = wide(t, y)
        error = self.velocity((1 - at) * y + at * noise, t) - (noise - y)
        return 0.5 * error.square().flatten(1).sum(-1)


def _even_times(x: Tensor) -> Tensor:
    """Uniform on [0, 1), spread evenly over the rows of x, ``(B,)``."""
    even = torch.arange(len(x), device=x.device, dtype=x.dtype) / max(len(x), 1)
    return (torch.rand(1, device=x.device, dtype=x.dtype) + even) % 1.0


def _judged(part: Tensor, share: dict[str, Tensor]) -> Tensor:
    """The same; gradients that come back through it are those of the squared cost, over the mean of the loss."""
    if not part.requires_grad:
        return part
    alias = part.view_as(part)

    def weigh(gradient: Tensor) -> Tensor:
        return gradient * (2 * share["cost"] / share["scale"]).detach()

    alias.register_hook(weigh)
    return alias
