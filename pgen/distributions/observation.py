r"""Observation models p(x | outputs), with every axis of x declared an event axis."""

from __future__ import annotations

import math
from typing import ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.constraints import Constraint

from ..contracts import check_positive
from .discretized import DiscretizedLogisticMixture

__all__ = ["OBSERVATIONS", "Bernoulli", "Categorical", "DiscretizedLogistic", "Gaussian", "GaussianMixture", "Observation"]


MOST_SORTED = 10_000_000
"""Most numbers whose quantiles are taken; of more data, some are looked at."""


class Observation:
    """From outputs ``(*batch, outputs * prod(event_shape))`` of a network to the distribution of x.

    Attributes:
        outputs: Numbers that the network gives for each scalar of x.
    """

    name: ClassVar[str]
    outputs: int

    def __init__(self, event_shape: tuple[int, ...]) -> None:
        self.event_shape = event_shape

    def split(self, outputs: Tensor) -> Tensor:
        """``(*batch, *event_shape, outputs)``."""
        return outputs.unflatten(-1, (*self.event_shape, self.outputs))

    def distribution(self, outputs: Tensor) -> dist.TorchDistribution:
        """The distribution of x, event shape ``event_shape``."""
        raise NotImplementedError

    def at(self, outputs: Tensor, t: Tensor) -> dist.TorchDistribution:
        """The distribution of x where x is what is at position ``t`` of a sequence: the same at every position.

        Shapes: outputs ``(B, outputs)`` with t ``()``, or ``(B, T, outputs)`` with t ``(T,)``.
        """
        return self.distribution(outputs)

    def draw(self, outputs: Tensor, t: Tensor) -> Tensor:
        """One draw at position t, ``(B, *event_shape)``: where it can, from noise that does not depend on the outputs."""
        fn = self.at(outputs, t)
        return fn.rsample() if fn.has_rsample else fn.sample()

    @property
    def support(self) -> Constraint:
        """The values that each number of x may take."""
        raise NotImplementedError

    def mean(self, outputs: Tensor) -> Tensor:
        """The mean of x, ``(*batch, *event_shape)``."""
        return self.distribution(outputs).mean

    def features(self, x: Tensor) -> Tensor:
        """x as an encoder sees it, floating point of order one."""
        return x

    width = 2
    """Numbers that ``encode`` makes of one."""

    def encode(self, x: Tensor) -> Tensor:
        """x as input of a network to which nothing is zero: its features and a one, ``(*x.shape, width)``."""
        features = self.features(x)
        return torch.stack([features, torch.ones_like(features)], -1)

    def start(self, x: Tensor) -> Tensor:
        """Outputs that fit the mean of the data, ``(outputs * prod(event_shape),)``."""
        raise NotImplementedError


class Bernoulli(Observation):
    r""":math:`p(x \mid \ell) = \prod_d \sigma(\ell_d)^{x_d} (1 - \sigma(\ell_d))^{1 - x_d}`, x in {0, 1}.

    Outputs are logits.
    """

    name = "bernoulli"
    outputs = 1
    support = constraints.boolean

    def draw(self, outputs: Tensor, t: Tensor) -> Tensor:
        """1 where a uniform number lies below the probability."""
        probs = torch.sigmoid(self.split(outputs).squeeze(-1))
        return (torch.rand_like(probs) < probs).to(probs.dtype)

    def distribution(self, outputs: Tensor) -> dist.TorchDistribution:
        """Independent Bernoulli variables."""
        return dist.Bernoulli(logits=self.split(outputs).squeeze(-1)).to_event(len(self.event_shape))

    def start(self, x: Tensor) -> Tensor:
        """Logits of the mean, clipped to [0.001, 0.999]."""
        return torch.logit(x.double().mean(0).clamp(0.001, 0.999)).reshape(-1)


class Categorical(Observation):
    r""":math:`p(x \mid \ell) = \prod_d \operatorname{softmax}(\ell_d)_{x_d}`, x in {0, ..., num_classes - 1}."""

    name = "categorical"

    def __init__(self, event_shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__(event_shape)
        check_positive("num_classes", num_classes)
        self.outputs = num_classes
        self.width = num_classes if num_classes <= self.most_apart else 2

    most_apart = 32
    """Classes up to which a network is told them apart, instead of their number."""

    def encode(self, x: Tensor) -> Tensor:
        """One number for each class, 1 for that of x; or the number of the class, where there are many."""
        if self.outputs > self.most_apart:
            return super().encode(x)
        return (x.unsqueeze(-1) == torch.arange(self.outputs, device=x.device)).to(x.dtype)

    @property
    def support(self) -> Constraint:
        """0, ..., num_classes - 1."""
        return constraints.integer_interval(0, self.outputs - 1)

    def draw(self, outputs: Tensor, t: Tensor) -> Tensor:
        """The class with the largest logit plus Gumbel noise."""
        logits = self.split(outputs)
        return (logits - (-torch.rand_like(logits).log()).log()).argmax(-1)

    def distribution(self, outputs: Tensor) -> dist.TorchDistribution:
        """Independent categorical variables."""
        return dist.Categorical(logits=self.split(outputs)).to_event(len(self.event_shape))

    def mean(self, outputs: Tensor) -> Tensor:
        """The mean of the classes' numbers."""
        probs = self.split(outputs).softmax(-1)
        return probs @ torch.arange(self.outputs).to(probs)

    def features(self, x: Tensor) -> Tensor:
        """x / (num_classes - 1)."""
        return x / max(self.outputs - 1, 1)

    def start(self, x: Tensor) -> Tensor:
        """Log frequencies, one count added to each class."""
        counts = torch.stack([(x == k).double().sum(0) for k in range(self.outputs)], -1) + 1
        return (counts / counts.sum(-1, keepdim=True)).log().reshape(-1)


class Gaussian(Observation):
    r""":math:`p(x \mid \mu, s) = \prod_d \mathcal{N}(x_d; \mu_d, \sigma_d^2)` with
    :math:`\sigma = \sigma_{\min} + \operatorname{softplus}(s)`.

    Mean and standard deviation are both outputs. The floor :math:`\sigma_{\min}` = 0.001 keeps the likelihood bounded.
    """

    name = "gaussian"
    outputs = 2
    support = constraints.real
    floor = 1e-3

    def distribution(self, outputs: Tensor) -> dist.TorchDistribution:
        """Independent Gaussian variables."""
        loc, raw = self.split(outputs).unbind(-1)
        return dist.Normal(loc, self.floor + torch.nn.functional.softplus(raw)).to_event(len(self.event_shape))

    def start(self, x: Tensor) -> Tensor:
        """Mean and standard deviation of each coordinate."""
        x = x.double()
        sd = x.std(0).clamp(min=0.01) if len(x) > 1 else torch.ones_like(x[0])
        return torch.stack([x.mean(0), torch.log(torch.expm1(sd))], -1).reshape(-1)


class GaussianMixture(Observation):
    r""":math:`p(x) = \prod_d \sum_k \pi_{dk} \mathcal{N}(x_d; \mu_{dk}, \sigma_{dk}^2)`: a mixture for each scalar of x.

    Outputs are K logits, K means and K raw scales, :math:`\sigma = 0.001 + \operatorname{softplus}(s)`.
    """

    name = "gaussian_mixture"
    floor = Gaussian.floor
    support = constraints.real

    def __init__(self, event_shape: tuple[int, ...], num_components: int = 10) -> None:
        super().__init__(event_shape)
        check_positive("num_components", num_components)
        self.num_components, self.outputs = num_components, 3 * num_components

    def draw(self, outputs: Tensor, t: Tensor) -> Tensor:
        """The component by Gumbel noise, then its Gaussian."""
        logits, loc, raw = self.split(outputs).chunk(3, -1)
        component = (logits - (-torch.rand_like(logits).log()).log()).argmax(-1, keepdim=True)
        loc, raw = (part.gather(-1, component).squeeze(-1) for part in (loc, raw))
        return loc + (self.floor + torch.nn.functional.softplus(raw)) * torch.randn_like(loc)

    def distribution(self, outputs: Tensor) -> dist.TorchDistribution:
        """Independent mixtures."""
        logits, loc, raw = self.split(outputs).chunk(3, -1)
        parts = dist.Normal(loc, self.floor + torch.nn.functional.softplus(raw))
        return dist.MixtureSameFamily(dist.Categorical(logits=logits), parts).to_event(len(self.event_shape))

    def start(self, x: Tensor) -> Tensor:
        """Equal weights, means at evenly spaced quantiles of each coordinate."""
        loc, sd = _spread(x, self.num_components, least=0.01)
        return torch.cat([torch.zeros_like(loc), loc, torch.log(torch.expm1(sd))], -1).reshape(-1)


class DiscretizedLogistic(Observation):
    r"""A mixture of logistics, rounded to the levels 0, ..., num_classes - 1, for each scalar of x.

    Outputs are K logits, K centres and K log-scales, for levels that span [-1, 1]; log-scales are at least -7. See
    ``DiscretizedLogisticMixture``: an ordered alternative to ``categorical``, with 3 K outputs however many levels there are.
    """

    name = "discretized_logistic_mixture"
    least = -7.0

    def __init__(self, event_shape: tuple[int, ...], num_classes: int, num_components: int = 10) -> None:
        super().__init__(event_shape)
        check_positive("num_components", num_components)
        if num_classes < 2:
            raise ValueError(f"`num_classes` should be at least 2 levels, got {num_classes}")
        self.levels, self.num_components, self.outputs = num_classes, num_components, 3 * num_components

    @property
    def support(self) -> Constraint:
        """0, ..., num_classes - 1."""
        return constraints.integer_interval(0, self.levels - 1)

    def distribution(self, outputs: Tensor) -> dist.TorchDistribution:
        """Independent mixtures of discretised logistics."""
        logits, loc, log_scale = self.split(outputs).chunk(3, -1)
        mixture = DiscretizedLogisticMixture(logits, loc, log_scale.clamp(min=self.least), self.levels)
        return mixture.to_event(len(self.event_shape))

    def features(self, x: Tensor) -> Tensor:
        """Levels as numbers in [-1, 1]."""
        return x * (2 / (self.levels - 1)) - 1

    def start(self, x: Tensor) -> Tensor:
        """Equal weights, centres at evenly spaced quantiles of each coordinate."""
        loc, sd = _spread(self.features(x), self.num_components, least=1 / (self.levels - 1))
        return torch.cat([torch.zeros_like(loc), loc, (0.5 * sd).log()], -1).reshape(-1)


def _spread(x: Tensor, num_components: int, least: float) -> tuple[Tensor, Tensor]:
    """Evenly spaced quantiles of each coordinate, and its standard deviation, each ``(*event_shape, num_components)``."""
    if x.numel() > MOST_SORTED:  # multiples of the golden ratio, which are even and follow no pattern of the data
        turns = torch.arange(max(1, MOST_SORTED * len(x) // x.numel()), dtype=torch.float64, device=x.device)
        x = x[(turns * (math.sqrt(5) - 1) / 2 % 1 * len(x)).long()]
    x = x.double()
    levels = (torch.arange(num_components).to(x) + 0.5) / num_components
    sd = x.std(0, correction=0).clamp(min=least)
    return x.quantile(levels, dim=0).movedim(0, -1), sd.unsqueeze(-1).expand(*sd.shape, num_components)


OBSERVATIONS: dict[str, type[Observation]] = {
    o.name: o for o in (Bernoulli, Categorical, Gaussian, GaussianMixture, DiscretizedLogistic)
}
"""Observation models by name."""
LEVELS = ("categorical", "discretized_logistic_mixture")
"""Those of finitely many levels, which ``num_classes`` counts."""
MIXTURES = ("gaussian_mixture", "discretized_logistic_mixture")
"""Those of several ``num_components``."""


def observation(
    likelihood: str, event_shape: tuple[int, ...], num_classes: int | None = None, num_components: int | None = None
) -> Observation:
    """The named observation model; ``num_classes`` goes with levels, ``num_components`` (default 10) with mixtures."""
    options: dict[str, int] = {}
    if (num_classes is None) == (likelihood in LEVELS):
        known = " or ".join(repr(name) for name in LEVELS)
        if num_classes is None:
            raise ValueError(f"`num_classes` is missing: likelihood={likelihood!r} needs the number of values that x takes")
        raise ValueError(f"`num_classes` goes with likelihood={known}, not {likelihood!r}; leave it out")
    if num_classes is not None:
        options["num_classes"] = num_classes
    if num_components is not None:
        if likelihood not in MIXTURES:
            known = " or ".join(repr(name) for name in MIXTURES)
            raise ValueError(f"`num_components` goes with likelihood={known}, not {likelihood!r}; leave it out")
        options["num_components"] = num_components
    return OBSERVATIONS[likelihood](event_shape, **options)
