r"""How noisy is an estimator of the gradient?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..contracts import check_positive

__all__ = ["GradientSNR", "gradient_snr"]


@dataclass(frozen=True)
class GradientSNR:
    r"""Signal-to-noise ratio of a stochastic gradient, :math:`|\mathbb{E} g| / \operatorname{sd}(g)`.

    With R repeats the ratio of a parameter whose gradient is zero in expectation is about :math:`0.8 / \sqrt{R}` and not zero.

    Attributes:
        mean: Mean gradient of each parameter tensor, by name; in nats a datum and unit of the parameter.
        sd: Standard deviation of one gradient, number by number, likewise.
        num_repeats: Repeats R.
    """

    mean: dict[str, Tensor]
    sd: dict[str, Tensor]
    num_repeats: int

    @property
    def snr(self) -> dict[str, Tensor]:
        """The ratio, number by number; infinite where there is no noise, NaN where there is no gradient at all."""
        return {name: mean.abs() / self.sd[name] for name, mean in self.mean.items()}

    @property
    def tensors(self) -> dict[str, float]:
        """One ratio a tensor: Euclidean norm of the mean over root of the summed variances."""
        return {n: float(m.norm() / self.sd[n].norm()) for n, m in self.mean.items()}

    def __str__(self) -> str:
        lines = [f"{name}: {ratio:.3g}" for name, ratio in self.tensors.items()]
        return "\n".join([f"gradient signal-to-noise ratio over {self.num_repeats} repeats", *lines])


def gradient_snr(fitted: Any, data: Any, objective: Any = None, *, num_repeats: int = 64, seed: int = 0) -> GradientSNR:
    r"""Measure the signal-to-noise ratio of a stochastic gradient at the parameters as they are.

    .. math:: \mathrm{SNR}_i = \frac{|\mathbb{E} g_i|}{\operatorname{sd}(g_i)}

    Each repeat is the gradient of the loss on all of ``data`` under new noise. Compare objectives at the same parameters: for
    ``IWAE`` the encoder's ratio falls as :math:`1 / \sqrt{K}` with K samples, for ``DReG`` it does not.

    Args:
        fitted: A pair or a family whose parameters exist (fitted once, or a family).
        data: What ``fit`` takes; with a context, a dict of x and context.
        objective: An objective; the model's default if None.
        num_repeats: Repeats R, at least 2.
        seed: Keys the noise; the global random state is left as it was.

    Returns:
        A GradientSNR; ``.tensors`` holds one number a parameter tensor, ``.snr`` one a parameter.

    References:
        Rainforth et al. (2018), Tighter variational bounds are not necessarily better, arXiv:1802.04537, eq. 5.
    """
    check_positive("num_repeats", num_repeats)
    if num_repeats < 2:
        raise ValueError("`num_repeats` should be at least 2, since a standard deviation is taken, got 1")
    mean: dict[str, Tensor] = {}
    squares: dict[str, Tensor] = {}
    for count, gradient in enumerate(fitted.gradients(data, objective, num_repeats=int(num_repeats), seed=seed), start=1):
        for name, value in gradient.items():
            value = value.double()
            before = mean.get(name, torch.zeros_like(value))
            mean[name] = before + (value - before) / count
            squares[name] = squares.get(name, 0.0) + (value - before) * (value - mean[name])
    sd = {name: (total / (num_repeats - 1)).sqrt() for name, total in squares.items()}
    return GradientSNR(mean, sd, int(num_repeats))
