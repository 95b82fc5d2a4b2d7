r"""Solvers: from noise to data along a diffusion, one function each, all of one signature.

``solver(denoise, z, log_snr) -> z``: ``denoise(z, log_snr)`` estimates the data x from z ``(N, *event_shape)`` at a log
signal-to-noise ratio ``()``; z starts at the first of the rising ``log_snr`` ``(S + 1,)`` and comes out at the last. S is the
number of steps; noise, where there is any, comes from torch's generator. With
:math:`\alpha^2 = \operatorname{sigmoid}(\lambda)`, :math:`\sigma^2 = \operatorname{sigmoid}(-\lambda)` and
:math:`\hat\epsilon = (z - \alpha \hat{x}) / \sigma`, all but ``ancestral`` solve the probability-flow equation

.. math:: \frac{dz}{d\lambda} = \tfrac12 \alpha (\hat{x}(z, \lambda) - \alpha z)

Song et al. (2021), Score-based generative modeling through stochastic differential equations, arXiv:2011.13456, equation 13.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Protocol, cast

import torch
from torch import Tensor

__all__ = [
    "FLOWS",
    "SOLVERS",
    "Denoise",
    "Field",
    "Solver",
    "ancestral",
    "ddim",
    "divergence",
    "dpm",
    "euler",
    "heun",
    "infill",
    "midpoint",
    "rk4",
    "runge_kutta",
]

Denoise = Callable[[Tensor, Tensor], Tensor]
"""Estimates x from z ``(N, *event_shape)`` at a log signal-to-noise ratio ``()``."""

Field = Callable[[Tensor, Tensor], Tensor]
"""A velocity: of z ``(N, *event_shape)`` at a time ``()``."""


class Solver(Protocol):
    """What every solver is."""

    def __call__(self, denoise: Denoise, z: Tensor, log_snr: Tensor) -> Tensor:
        """z at the last of ``log_snr``."""


def _pairs(times: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Each time with the next."""
    return pairwise(times.unbind())


def _alpha_sigma(log_snr: Tensor) -> tuple[Tensor, Tensor]:
    return torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()


def ancestral(denoise: Denoise, z: Tensor, log_snr: Tensor) -> Tensor:
    r"""Draws each z_s from the posterior q(z_s | z_t, x) at the estimate of x: the model's own chain.

    .. math:: z_s \sim \mathcal{N}\Bigl(\frac{\alpha_s}{\alpha_t} (1 - c) z_t + \alpha_s c\, \hat{x},\; \sigma_s^2 c\, I\Bigr),
        \qquad c = 1 - e^{\lambda_t - \lambda_s}

    References:
        Ho, Jain, Abbeel (2020), arXiv:2006.11239, algorithm 2; Kingma et al. (2021), arXiv:2107.00630, equation 33.
    """
    for before, after in _pairs(log_snr):
        z = _ancestral_step(denoise, z, before, after)
    return z


def _ancestral_step(denoise: Denoise, z: Tensor, before: Tensor, after: Tensor) -> Tensor:
    (alpha_t, _), (alpha_s, sigma_s), c = _alpha_sigma(before), _alpha_sigma(after), -torch.expm1(before - after)
    mean = alpha_s / alpha_t * (1 - c) * z + alpha_s * c * denoise(z, before)
    return mean + sigma_s * c.sqrt() * torch.randn_like(z)


def ddim(denoise: Denoise, z: Tensor, log_snr: Tensor) -> Tensor:
    r"""First order, one evaluation a step: :math:`z_s = \alpha_s \hat{x} + \sigma_s \hat\epsilon`.

    References:
        Song, Meng, Ermon (2021), Denoising diffusion implicit models, arXiv:2010.02502, equation 12 without noise.
    """
    for before, after in _pairs(log_snr):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = _alpha_sigma(before), _alpha_sigma(after)
        x = denoise(z, before)
        z = alpha_s * x + sigma_s * (z - alpha_t * x) / sigma_t
    return z


def heun(denoise: Denoise, z: Tensor, log_snr: Tensor) -> Tensor:
    r"""Second order, two evaluations a step: Heun's rule for :math:`d(z / \alpha) / d(\sigma / \alpha) = \hat\epsilon`.

    References:
        Karras, Aittala, Aila, Laine (2022), arXiv:2206.00364, algorithm 1.
    """
    for before, after in _pairs(log_snr):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = _alpha_sigma(before), _alpha_sigma(after)
        step = sigma_s / alpha_s - sigma_t / alpha_t
        first = (z - alpha_t * denoise(z, before)) / sigma_t
        ahead = z / alpha_t + step * first
        second = (alpha_s * ahead - alpha_s * denoise(alpha_s * ahead, after)) / sigma_s
        z = alpha_s * (z / alpha_t + step * 0.5 * (first + second))
    return z


def dpm(denoise: Denoise, z: Tensor, log_snr: Tensor) -> Tensor:
    r"""DPM-Solver++(2M): second order, one evaluation a step, by extrapolating the estimate of x from the step before.

    .. math:: z_s = \frac{\sigma_s}{\sigma_t} z_t + \alpha_s (1 - e^{-h}) \Bigl[\Bigl(1 + \frac{1}{2r}\Bigr) \hat{x}_t
        - \frac{1}{2r} \hat{x}_{t'}\Bigr], \qquad h = \tfrac12 (\lambda_s - \lambda_t), \quad r = h' / h

    References:
        Lu, Zhou, Bao, Chen, Li, Zhu (2022), DPM-Solver++, arXiv:2211.01095, algorithm 2.
    """
    earlier: Tensor | None = None
    for i in range(len(log_snr) - 1):
        (_, sigma_t), (alpha_s, sigma_s) = _alpha_sigma(log_snr[i]), _alpha_sigma(log_snr[i + 1])
        h = log_snr[i + 1] - log_snr[i]
        x = denoise(z, log_snr[i])
        ahead = x if earlier is None else x + 0.5 * h / (log_snr[i] - log_snr[i - 1]) * (x - earlier)
        z, earlier = sigma_s / sigma_t * z - alpha_s * torch.expm1(-0.5 * h) * ahead, x
    return z


SOLVERS: dict[str, Solver] = {"ancestral": ancestral, "ddim": ddim, "heun": heun, "dpm": dpm}
"""Solvers by name."""


def infill(denoise: Denoise, z: Tensor, log_snr: Tensor, x: Tensor, observed: Tensor, repeats: int = 1) -> Tensor:
    """Ancestral steps whose observed numbers are replaced by noised data, each step taken ``repeats`` times.

    Between repeats z is noised again, so that what is drawn and what is given come to agree. It is not exact for any number.

    Args:
        denoise: Estimates x.
        z: Noise, ``(N, *event_shape)``.
        log_snr: Rising, ``(S + 1,)``.
        x: Data; what is not observed counts for nothing.
        observed: True where x is given, of its shape.
        repeats: Times that a step is taken.

    References:
        Lugmayr et al. (2022), RePaint, arXiv:2201.09865, algorithm 1.
    """
    for before, after in _pairs(log_snr):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = _alpha_sigma(before), _alpha_sigma(after)
        for repeat in range(repeats):
            if repeat:
                ratio = alpha_t / alpha_s
                z = ratio * z + (sigma_t.square() - (ratio * sigma_s).square()).sqrt() * torch.randn_like(z)
            z = torch.where(observed, alpha_s * x + sigma_s * torch.randn_like(z), _ancestral_step(denoise, z, before, after))
    return z


def euler(field: Field, z: Tensor, times: Tensor) -> Tensor:
    """First order, one evaluation a step."""
    for before, after in _pairs(times):
        z = z + (after - before) * field(z, before)
    return z


def midpoint(field: Field, z: Tensor, times: Tensor) -> Tensor:
    """Second order, two evaluations a step."""
    for before, after in _pairs(times):
        h = after - before
        z = z + h * field(z + 0.5 * h * field(z, before), before + 0.5 * h)
    return z


def rk4(field: Field, z: Tensor, times: Tensor) -> Tensor:
    """Fourth order, four evaluations a step."""
    return runge_kutta(field, z, times)[0]


FLOWS: dict[str, Callable[[Field, Tensor, Tensor], Tensor]] = {"euler": euler, "midpoint": midpoint, "rk4": rk4}
"""Rules for a velocity, ``(field, z, times) -> z`` at the last of the times, by name."""


def runge_kutta(field: Field, z: Tensor, times: Tensor, probe: Tensor | str | None = None) -> tuple[Tensor, Tensor]:
    r"""Fourth-order Runge-Kutta: z at the last time, and the integral of the divergence of the field along the way.

    Args:
        field: The velocity.
        z: Where to start, ``(N, *event_shape)``.
        times: Steps, ``(S + 1,)``, rising or falling.
        probe: As for ``divergence``; None leaves the integral zero.

    Returns:
        z, and :math:`\int \nabla \cdot f\, dt`, ``(N,)``: :math:`\log p` falls by it.
    """
    total = z.new_zeros(len(z))

    def both(z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return (field(z, t), total.new_zeros(len(z))) if probe is None else divergence(field, z, t, probe)

    for before, after in _pairs(times):
        h = after - before
        half = before + 0.5 * h
        k1, d1 = both(z, before)
        k2, d2 = both(z + 0.5 * h * k1, half)
        k3, d3 = both(z + 0.5 * h * k2, half)
        k4, d4 = both(z + h * k3, after)
        z = z + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        total = total + h / 6 * (d1 + 2 * d2 + 2 * d3 + d4)
    return z, total


def divergence(field: Field, z: Tensor, t: Tensor, probe: Tensor | str) -> tuple[Tensor, Tensor]:
    r"""The field and its divergence: exactly with ``probe="exact"`` (D products), else by Hutchinson's :math:`v^\top J v`.

    Args:
        field: The velocity.
        z: Where, ``(N, *event_shape)``.
        t: When, ``()``.
        probe: ``"exact"``, or v of the shape of z, of mean 0 and variance 1.

    References:
        Grathwohl et al. (2019), FFJORD, arXiv:1810.01367, equation 7.
    """

    value, pull, *_ = torch.func.vjp(lambda z: field(z, t), z)

    def along(v: Tensor) -> Tensor:
        return cast(Tensor, (v * pull(v)[0]).flatten(1).sum(-1))

    if isinstance(probe, Tensor):
        return value, along(probe)
    size = z[0].numel()
    axes = torch.eye(size, device=z.device, dtype=z.dtype).reshape(size, 1, *z.shape[1:]).expand(-1, *z.shape)
    return value, torch.func.vmap(along)(axes).sum(0)
