r"""Encoders: networks that map a datum to a distribution of its latents."""

from __future__ import annotations

import pyro.distributions as dist
from torch import Tensor, nn

__all__ = ["GaussianEncoder"]


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
