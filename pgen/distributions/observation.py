r"""Observation models p(x | outputs), with every axis of x declared an event axis."""

from __future__ import annotations

from typing import ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor

from ..contracts import check_positive

__all__ = ["OBSERVATIONS", "Bernoulli", "Categorical", "Gaussian", "Observation"]


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

    def mean(self, outputs: Tensor) -> Tensor:
        """The mean of x, ``(*batch, *event_shape)``."""
        return self.distribution(outputs).mean

    def features(self, x: Tensor) -> Tensor:
        """x as an encoder sees it, floating point of order one."""
        return x

    def start(self, x: Tensor) -> Tensor:
        """Outputs that fit the mean of the data, ``(outputs * prod(event_shape),)``."""
        raise NotImplementedError


class Bernoulli(Observation):
    r""":math:`p(x \mid \ell) = \prod_d \sigma(\ell_d)^{x_d} (1 - \sigma(\ell_d))^{1 - x_d}`, x in {0, 1}.

    Outputs are logits.
    """

    name = "bernoulli"
    outputs = 1

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


OBSERVATIONS: dict[str, type[Observation]] = {o.name: o for o in (Bernoulli, Categorical, Gaussian)}
"""Observation models by name."""


def observation(likelihood: str, event_shape: tuple[int, ...], num_classes: int | None) -> Observation:
    """The named observation model; ``num_classes`` goes with ``categorical`` alone."""
    if likelihood == "categorical":
        if num_classes is None:
            raise ValueError("`num_classes` is missing: likelihood='categorical' needs the number of values that x takes")
        return Categorical(event_shape, num_classes)
    if num_classes is not None:
        raise ValueError(f"`num_classes` goes with likelihood='categorical', not {likelihood!r}; leave it out")
    return OBSERVATIONS[likelihood](event_shape)
