r"""Distributions over the levels 0, ..., L - 1 that come from continuous ones: the mixture of discretised logistics.

Salimans, Karpathy, Chen and Kingma (2017), PixelCNN++, arXiv:1701.05517, section 2.1, equations 2 and 3.
"""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints
from torch.nn.functional import softplus

__all__ = ["DiscretizedLogisticMixture"]


class DiscretizedLogisticMixture(dist.TorchDistribution):
    r"""A mixture of logistic distributions, each rounded to L levels, those at the ends taking the tails.

    With levels placed at :math:`y(x) = 2 x / (L - 1) - 1` in [-1, 1] and :math:`h = 1 / (L - 1)` half a step,

    .. math::

        P(x) = \sum_k \pi_k \Bigl[\sigma\Bigl(\frac{y(x) + h - \mu_k}{s_k}\Bigr)
            - \sigma\Bigl(\frac{y(x) - h - \mu_k}{s_k}\Bigr)\Bigr],

    where the first term is 1 at x = L - 1 and the second is 0 at x = 0, so that the levels' masses sum to one.

    Shapes: ``logits``, ``loc`` and ``log_scale`` ``(*batch, K)``; x ``(*batch,)`` holding 0, ..., L - 1. Masses in nats.

    Args:
        logits: Of the components' weights, not normalised.
        loc: Centres :math:`\mu`, in units in which the levels span [-1, 1].
        log_scale: Logarithms of the scales s, in the same units.
        levels: L, at least 2.

    References:
        Salimans et al. (2017), PixelCNN++, arXiv:1701.05517, equation 2; here without its approximations of small masses.

    Example:
        >>> one = DiscretizedLogisticMixture(torch.zeros(1), torch.zeros(1), torch.zeros(1), levels=2)
        >>> one.log_prob(torch.tensor([0.0, 1.0])).exp()  # half of a centred logistic lies on each side
        tensor([0.5000, 0.5000])
    """

    arg_constraints = {
        "logits": constraints.real_vector, "loc": constraints.real_vector, "log_scale": constraints.real_vector,
    }  # fmt: skip

    def __init__(self, logits: Tensor, loc: Tensor, log_scale: Tensor, levels: int, validate_args: bool | None = None) -> None:
        self.logits, self.loc, self.log_scale, self.levels = logits, loc, log_scale, levels
        super().__init__(loc.shape[:-1], torch.Size(), validate_args=validate_args)

    @property
    def support(self) -> Any:
        """The levels."""
        return constraints.integer_interval(0, self.levels - 1)

    def expand(self, batch_shape: Any, _instance: Any = None) -> DiscretizedLogisticMixture:
        """The same distribution with a larger batch shape."""
        shape = (*batch_shape, self.loc.shape[-1])
        logits, loc, log_scale = (t.expand(shape) for t in (self.logits, self.loc, self.log_scale))
        return DiscretizedLogisticMixture(logits, loc, log_scale, self.levels, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-mass of a level, in nats."""
        if self._validate_args:
            self._validate_sample(value)
        x, half = value.unsqueeze(-1), 1 / (self.levels - 1)
        centred = half * (2 * x) - 1 - self.loc
        precision = torch.exp(-self.log_scale)
        above, below = precision * (centred + half), precision * (centred - half)
        # sigma(a) - sigma(b) = sigma(a) (1 - sigma(b)) (1 - exp(b - a)), in which nothing cancels
        upper = -softplus(-above) * (x < self.levels - 1)
        lower = -softplus(below) * (x > 0)
        inner = torch.log(-torch.expm1(-2 * half * precision)) * ((x > 0) & (x < self.levels - 1))
        return torch.logsumexp(self.logits.log_softmax(-1) + upper + lower + inner, -1)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008  (the base class's signature)
        """Levels, int64 as of other classes: a component, a logistic variable, and its rounding."""
        shape = self._extended_shape(sample_shape)
        with torch.no_grad():
            # The component of largest logit plus Gumbel noise, which a graph can hold.
            gumbel = -torch.log(-torch.log(_uniform(self.logits.expand(*shape, -1))))
            component = (self.logits + gumbel).argmax(-1, keepdim=True)
            loc, log_scale = (t.expand(*shape, -1).gather(-1, component).squeeze(-1) for t in (self.loc, self.log_scale))
            y = loc + log_scale.exp() * torch.logit(_uniform(loc))
            return ((y + 1) * (self.levels - 1) / 2).round().clamp(0, self.levels - 1).long()

    @property
    def mean(self) -> Tensor:
        """The mean level: the sum of the levels weighed by their masses."""
        levels = self.enumerate_support()
        return (self.log_prob(levels).exp() * levels).sum(0)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """All levels along a new first axis."""
        values = torch.arange(self.levels).to(self.loc).reshape(-1, *(1,) * len(self.batch_shape))
        return values.expand(-1, *self.batch_shape) if expand else values


def _uniform(like: Tensor) -> Tensor:
    """Uniform noise inside (0, 1)."""
    tiny = torch.finfo(like.dtype).eps
    return torch.rand_like(like).clamp(tiny, 1 - tiny)
