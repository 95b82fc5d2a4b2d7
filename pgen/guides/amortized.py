r"""Encoders: networks that map a datum to a distribution of its latents.

An encoder wraps a network of the features and returns a distribution with batch shape ``batch`` and event shape
``(latent_dim,)``; its log-density is exact, and costs nothing extra at the encoder's own draws.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ..contracts import check_positive
from .transport import Transported, autoregressive_flow

__all__ = ["ENCODERS", "FlowEncoder", "FullCovarianceEncoder", "GaussianEncoder", "StructuredEncoder"]

MAX_FLOW_LATENTS = 512
"""Latents of one datum beyond which a flow encoder is refused: its masks alone would be larger than the networks."""


class GaussianEncoder(nn.Module):
    r"""Amortized diagonal Gaussian.

    .. math:: q(z \mid x, c) = \mathcal{N}(z; \mu(x, c), \operatorname{diag} \sigma(x, c)^2),
        \quad (\mu, \log \sigma) = \mathrm{net}(x, c)

    Shapes: features ``(*batch, in_features)`` -> a distribution with batch shape ``batch`` and event shape ``(latent_dim,)``.

    Args:
        network: Any module from features to ``2 * latent_dim`` outputs: means, then log standard deviations.

    References:
        Kingma and Welling (2014), Auto-encoding variational Bayes, arXiv:1312.6114, eq. 9.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, features: Tensor) -> dist.TorchDistribution:
        """The distribution of the latents."""
        loc, log_scale = self.network(features).chunk(2, -1)
        return dist.Normal(loc, log_scale.exp()).to_event(1)


class FullCovarianceEncoder(nn.Module):
    r"""Amortized Gaussian with a full covariance.

    .. math:: q(z \mid x, c) = \mathcal{N}(z; \mu, L L^\top), \quad L = \operatorname{diag}(\sigma)(I + A), \quad
        (\mu, \log \sigma, A) = \mathrm{net}(x, c)

    with A strictly lower triangular. It is exact where the posterior is Gaussian, as in a linear model.

    Shapes: features ``(*batch, in_features)`` -> a distribution with batch shape ``batch`` and event shape ``(latent_dim,)``.

    Args:
        network: Any module from features to ``outputs(latent_dim)`` numbers: means, log standard deviations, then A by rows.
        latent_dim: Size D of z.

    References:
        Kingma and Welling (2019), An introduction to variational autoencoders, arXiv:1906.02691, section 2.5.1.
    """

    table: Tensor

    def __init__(self, network: nn.Module, latent_dim: int) -> None:
        super().__init__()
        check_positive("latent_dim", latent_dim)
        self.network, self.latent_dim = network, latent_dim
        row, column = torch.tril_indices(latent_dim, latent_dim, -1)
        free = len(row)
        table = torch.full((latent_dim, latent_dim), free).index_put((row, column), torch.arange(free))
        self.register_buffer("table", table.reshape(-1), persistent=False)

    @staticmethod
    def outputs(latent_dim: int) -> int:
        """Numbers that the network must give."""
        return latent_dim * (latent_dim + 3) // 2

    def forward(self, features: Tensor) -> dist.TorchDistribution:
        """The distribution of the latents."""
        d = self.latent_dim
        out = self.network(features)
        loc, scale = out[..., :d], out[..., d : 2 * d].exp()
        free = nn.functional.pad(out[..., 2 * d :], (0, 1))  # the last place holds the zero of every other entry
        lower = scale.unsqueeze(-1) * free.index_select(-1, self.table).unflatten(-1, (d, d))
        return Transported(loc, scale, lower, validate_args=False)


class FlowEncoder(nn.Module):
    r"""Amortized normalizing flow: a diagonal Gaussian bent by an inverse autoregressive flow that sees the datum.

    .. math:: z = \mu + \operatorname{diag}(\sigma)\, f_\theta(\varepsilon; h), \quad \varepsilon \sim \mathcal{N}(0, I), \quad
        (\mu, \log \sigma, h) = \mathrm{net}(x, c)

    One pass draws, and the density of a draw is read off that pass; the density at any other value takes D passes. At the
    start f is nearly the identity.

    Shapes: features ``(*batch, in_features)`` -> a distribution with batch shape ``batch`` and event shape ``(latent_dim,)``.

    Args:
        network: Any module from features to ``outputs(latent_dim, context)`` numbers: means, log standard deviations, then h.
        latent_dim: Size D of z, at most 512.
        context: Size of h.
        transforms: Autoregressive transforms, in alternating order.
        hidden: Hidden layers of each transform's network.
        spline: Rational-quadratic splines (Durkan et al. 2019, arXiv:1906.04032) instead of affine maps: more flexible
            and three to five times slower.

    References:
        Kingma et al. (2016), Improving variational inference with inverse autoregressive flow, arXiv:1606.04934, section 4.
    """

    def __init__(
        self,
        network: nn.Module,
        latent_dim: int,
        *,
        context: int = 32,
        transforms: int = 2,
        hidden: tuple[int, ...] = (64,),
        spline: bool = False,
    ) -> None:
        super().__init__()
        check_positive("latent_dim", latent_dim)
        if latent_dim > MAX_FLOW_LATENTS:
            raise ValueError(
                f"`latent_dim` of a flow encoder should be at most {MAX_FLOW_LATENTS}, got {latent_dim}; use 'full_covariance'"
            )
        self.network, self.latent_dim = network, latent_dim
        self.flow = autoregressive_flow(latent_dim, transforms, hidden, context=context, spline=spline)

    @staticmethod
    def outputs(latent_dim: int, context: int = 32) -> int:
        """Numbers that the network must give."""
        return 2 * latent_dim + context

    def forward(self, features: Tensor) -> dist.TorchDistribution:
        """The distribution of the latents."""
        d = self.latent_dim
        out = self.network(features)
        bend = self.flow.transform(out[..., 2 * d :])  # type: ignore[operator]
        return Transported(out[..., :d], out[..., d : 2 * d].exp(), bend=bend, validate_args=False)


class StructuredEncoder(nn.Module):
    r"""Amortized guide for chained latents, each given the datum and the latents stated before it.

    .. math:: q(z \mid x) = \prod_k q_k(z_k \mid x, z_1, \dots, z_{k-1})

    Called inside the data plate, it makes one statement a latent; the model may state them in any order.

    Args:
        parts: An encoder for each latent by its site's name, in the order of the product. Its network sees the features
            with all earlier latents appended: ``in_features`` plus their sizes.

    Example:
        >>> from pgen.nn import MLP
        >>> guide = StructuredEncoder({"z1": GaussianEncoder(MLP(5, (8,), 2 * 3)), "z2": GaussianEncoder(MLP(5 + 3, (8,), 2))})
        >>> {name: tuple(z.shape) for name, z in guide(torch.zeros(7, 5)).items()}
        {'z1': (7, 3), 'z2': (7, 1)}

    References:
        Webb et al. (2018), Faithful inversion of generative models for effective amortized inference, arXiv:1712.00287.
    """

    def __init__(self, parts: Mapping[str, nn.Module]) -> None:
        super().__init__()
        if not parts:
            raise ValueError("`parts` is empty; give an encoder for each latent, such as {'z': GaussianEncoder(network)}")
        self.names = list(parts)
        self.parts = nn.ModuleList(parts.values())

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        """Make the statements; the values by name, each ``(*batch, size)``."""
        values: dict[str, Tensor] = {}
        for name, encoder in zip(self.names, self.parts):
            values[name] = cast(Tensor, pyro.sample(name, encoder(features)))
            features = torch.cat([features, values[name]], -1)
        return values


def _full_covariance(make: Callable[[int], nn.Module], latent_dim: int) -> nn.Module:
    return FullCovarianceEncoder(make(FullCovarianceEncoder.outputs(latent_dim)), latent_dim)


def _flow(make: Callable[[int], nn.Module], latent_dim: int) -> nn.Module:
    return FlowEncoder(make(FlowEncoder.outputs(latent_dim)), latent_dim)


ENCODERS: dict[str, Callable[[Callable[[int], nn.Module], int], nn.Module]] = {
    "gaussian": lambda make, latent_dim: GaussianEncoder(make(2 * latent_dim)),
    "full_covariance": _full_covariance,
    "flow": _flow,
}
"""Encoders by name, from the simplest to the most flexible: the closed list that a saved file may name.

Each is made from a function that makes a network with so many outputs, and the size of z.
"""
