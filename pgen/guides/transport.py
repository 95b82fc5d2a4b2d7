r"""Distributions as images of standard normal noise, and the flows that make them.

A guide draws far more often than it is asked about values that are not its own draws. So noise goes forward in one pass, and
the density of a draw is read off that pass: :math:`\log q(z) = \log \mathcal{N}(\varepsilon) - \log |\det \partial z /
\partial \varepsilon|`. The slow inverse is there for values from elsewhere.
"""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from ..distributions.flows import validation_flag_kept

__all__ = ["Transported", "autoregressive_flow"]

MEAN_POINTS = 256
"""Points of the fixed quasi-random rule behind ``Transported.mean``."""


class Transported(dist.TorchDistribution):
    r"""The image of standard normal noise under :math:`z = \mu + L\, f(\varepsilon)`.

    Shapes: ``loc`` ``(*batch, D)``; a draw likewise, event shape ``(D,)``.

    Args:
        loc: :math:`\mu`.
        scale: Diagonal of L, ``(*batch, D)``, positive.
        lower: Strictly lower triangle of L, ``(*batch, D, D)`` (zeros elsewhere); None for a diagonal L.
        bend: A zuko transform f over vectors, with ``call_and_ladj`` and ``inv``; None for the identity.
    """

    arg_constraints = {"loc": constraints.real_vector, "scale": constraints.independent(constraints.positive, 1)}
    support = constraints.real_vector
    has_rsample = True

    def __init__(
        self,
        loc: Tensor,
        scale: Tensor,
        lower: Tensor | None = None,
        bend: Any = None,
        *,
        validate_args: bool | None = None,
    ) -> None:
        self.loc, self.scale, self.lower, self.bend = loc, scale, lower, bend
        self._own: tuple[Tensor, Tensor] | None = None
        super().__init__(loc.shape[:-1], loc.shape[-1:], validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Transported:
        """The same, for more batch axes."""
        if torch.Size(batch_shape) == self.batch_shape:
            return self
        if self.bend is not None:
            raise NotImplementedError(
                "a conditional flow cannot be expanded; give the encoder features of the full batch shape"
            )
        lower = None if self.lower is None else self.lower.expand(*batch_shape, *self.lower.shape[-2:])
        loc, scale = (t.expand(*batch_shape, t.shape[-1]) for t in (self.loc, self.scale))
        return Transported(loc, scale, lower, validate_args=False)

    def _image(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """z and log |det dz / dnoise|."""
        log_det = self.scale.log().sum(-1)
        if self.bend is not None:
            noise, bent = self.bend.call_and_ladj(noise)
            log_det = log_det + bent
        mixed = self.scale * noise
        if self.lower is not None:
            mixed = mixed + (self.lower @ noise.unsqueeze(-1)).squeeze(-1)
        return self.loc + mixed, log_det

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """A draw, whose density is remembered."""
        noise = torch.randn(self._extended_shape(torch.Size(sample_shape)), dtype=self.loc.dtype, device=self.loc.device)
        value, log_det = self._image(noise)
        self._own = value, _standard(noise) - log_det
        return value

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density in nats, ``(*batch,)``: at once for the latest draw, by the inverse for any other value."""
        if self._own is not None and self._own[0] is value:
            return self._own[1]
        centred = value - self.loc
        if self.lower is None:
            straight = centred / self.scale
        else:
            root = self.lower + torch.diag_embed(self.scale)
            straight = torch.linalg.solve_triangular(root, centred.unsqueeze(-1), upper=False).squeeze(-1)
        noise = straight if self.bend is None else self.bend.inv(straight)
        return _standard(noise) - self._image(noise)[1]

    @property
    def mean(self) -> Tensor:
        """Mean: exact without a bend, else over a fixed rule of 256 quasi-random points."""
        if self.bend is None:
            return self.loc
        return torch.stack([self._image(point.expand(self.loc.shape))[0] for point in _points(self.loc)]).mean(0)


def _standard(noise: Tensor) -> Tensor:
    return dist.Normal(torch.zeros_like(noise), 1.0).to_event(1).log_prob(noise)


def _points(like: Tensor) -> Tensor:
    """Antithetic quasi-random standard normal points ``(256, D)``; draws nothing from the global generators."""
    uniform = torch.quasirandom.SobolEngine(like.shape[-1], scramble=True, seed=0).draw(MEAN_POINTS // 2, dtype=torch.float64)
    half = torch.special.ndtri(uniform.clamp(1e-6, 1 - 1e-6)).to(like)
    return torch.cat([half, -half])


def autoregressive_flow(
    size: int, transforms: int = 4, hidden: tuple[int, ...] = (32, 32), *, context: int = 0, spline: bool = False
) -> nn.Module:
    """zuko's masked autoregressive flow on vectors of ``size``, nearly the identity at the start.

    Args:
        size: D.
        transforms: How many, in alternating order.
        hidden: Sizes of each masked network's hidden layers.
        context: Size of the vector that the flow is conditioned on; 0 for none.
        spline: Rational-quadratic splines (Durkan et al. 2019, arXiv:1906.04032) instead of affine maps.
    """
    with validation_flag_kept():
        import zuko
    kind = zuko.flows.NSF if spline else zuko.flows.MAF
    with torch.device("cpu"):  # its masks are computed from values, which a meta tensor has not
        flow = kind(size, context, transforms=transforms, hidden_features=hidden, randperm=False)
    with torch.no_grad():
        for transform in flow.transform.transforms:
            for parameter in _last_layer(transform):
                parameter.mul_(0.01)
    return flow


def _last_layer(transform: nn.Module) -> list[Tensor]:
    """The parameters that make a transform: outputs of its network, or its own where it has none."""
    layers = [m for m in transform.modules() if isinstance(m, nn.Linear)]
    return list(layers[-1].parameters()) if layers else list(transform.parameters())
