r"""Variational autoencoder: a Gaussian latent, a decoder, and an amortized guide.

.. math::

    z \sim \mathcal{N}(0, I), \qquad x \mid z \sim p(x \mid \mathrm{decoder}(z, c)), \qquad
    q(z \mid x, c) = \mathcal{N}(\mu(x, c), \operatorname{diag} \sigma(x, c)^2)

Kingma and Welling (2014), Auto-encoding variational Bayes, arXiv:1312.6114; Rezende, Mohamed, Wierstra (2014),
arXiv:1401.4082.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ..base import GenerativeModel
from ..contracts import Batch, Seed, as_sizes, check_choice, check_positive
from ..data.transforms import Transform
from ..distributions.flows import FlowDistribution, bijection
from ..distributions.observation import OBSERVATIONS, observation
from ..guides import ENCODERS
from ..nn import ACTIVATIONS, MLP, flatten

__all__ = ["VAE"]


class VAE(GenerativeModel):
    r"""Variational autoencoder with dense networks.

    Shapes: x ``(N, *event_shape)``, context ``(N, context_dim)``, z ``(N, latent_dim)``.

    Args:
        event_shape: Shape of one datum.
        latent_dim: Size of z.
        hidden: Sizes of the encoder's hidden layers; the decoder's are the same in reverse.
        encoder: The family of q(z | x): ``"gaussian"`` (diagonal), ``"full_covariance"`` or ``"flow"`` (an inverse
            autoregressive flow that sees x); see ``pgen.guides``.
        prior: ``"gaussian"``, or ``"flow"``: p(z) is a trained spline coupling flow (Durkan et al. 2019, arXiv:1906.04032).
        likelihood: ``"bernoulli"`` (x in {0, 1}), ``"categorical"`` (x in {0, ..., num_classes - 1}), ``"gaussian"``
            (real x; mean and standard deviation both functions of z), ``"gaussian_mixture"`` or
            ``"discretized_logistic_mixture"`` (ordered levels 0, ..., num_classes - 1).
        num_classes: Values of a categorical x, or its levels.
        num_components: Of a mixture, for each number of x (default 10).
        activation: ``"silu"``, ``"tanh"``, ``"relu"``, ``"softplus"``, or the module class itself.
        context_dim: Size of the vector that model and guide are conditioned on; 0 for none.
        preprocess: Invertible preprocessing of x.
        seed: Keys the initial weights.

    Example:
        >>> vae = VAE((8, 8), latent_dim=3)
        >>> vae.sample(2).shape
        torch.Size([2, 8, 8])
    """

    family = "vae"

    def __init__(
        self,
        event_shape: Sequence[int],
        latent_dim: int = 8,
        hidden: int | Sequence[int] = (256, 256),
        *,
        encoder: str = "gaussian",
        prior: str = "gaussian",
        likelihood: str = "bernoulli",
        num_classes: int | None = None,
        num_components: int | None = None,
        activation: str | type[nn.Module] = "silu",
        context_dim: int = 0,
        preprocess: Transform | None = None,
        seed: Seed = 0,
    ) -> None:
        super().__init__(event_shape, preprocess=preprocess, context_dim=context_dim)
        check_positive("latent_dim", latent_dim)
        check_choice("likelihood", likelihood, tuple(OBSERVATIONS))
        check_choice("encoder", encoder, tuple(ENCODERS))
        check_choice("prior", prior, ("gaussian", "flow"))
        self.latent_dim, self.likelihood, self.num_classes = latent_dim, likelihood, num_classes
        self.encoder_name, self.prior_name = encoder, prior
        self.num_components, self.hidden = num_components, as_sizes("hidden", hidden)
        self.activation = ACTIVATIONS.name(activation)
        self.observation = observation(likelihood, self.event_shape, num_classes, num_components)
        size, make = math.prod(self.event_shape), ACTIVATIONS[self.activation]
        with self.initial_weights(seed):
            self.encoder = ENCODERS[encoder](
                lambda outputs: MLP(size + context_dim, self.hidden, outputs, make).glorot(), latent_dim
            )
            self.decoder = MLP(latent_dim + context_dim, self.hidden[::-1], self.observation.outputs * size, make).glorot()
            if prior == "flow":
                self.prior_flow = bijection("spline_coupling", latent_dim, 2, (64, 64), permutation="lu")

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments as plain JSON values."""
        names = ("latent_dim", "likelihood", "num_classes", "num_components", "activation", "context_dim")
        plain = {n: getattr(self, n) for n in names}
        return {
            "event_shape": list(self.event_shape),
            "hidden": list(self.hidden),
            "encoder": self.encoder_name,
            "prior": self.prior_name,
            **plain,
        }

    def prime(self, data: Batch) -> None:
        """Start the decoder's output at the mean of the training data."""
        last = cast(nn.Linear, self.decoder[-1])
        with torch.no_grad():
            last.bias.copy_(self.observation.start(self._prepared(data)[0]["x"]))
            if self.likelihood == "gaussian":  # a random scale here makes a few data cost thousands of nats
                last.weight.mul_(0.1)

    def decode(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Mean of p(x | z, c) in the units of the data, ``(N, *event_shape)``, at latents ``(N, latent_dim)``."""
        with torch.no_grad():
            mean = self.observation.mean(self.decoder(_with(z, context)))
            return mean if self.preprocess is None else self.preprocess.inverse(mean)

    def model(self, x: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        """p(x, z | c)."""
        with self.plate(x, context):
            z = pyro.sample("z", self.prior())
            return pyro.sample("x", self.observation.distribution(self.decoder(_with(z, context))), obs=x)

    def prior(self) -> dist.TorchDistribution:
        """p(z)."""
        zero = next(self.decoder.parameters()).new_zeros(self.latent_dim)
        noise = dist.Normal(zero, 1.0).to_event(1)
        return noise if self.prior_name == "gaussian" else FlowDistribution(self.prior_flow, noise, validate_args=False)

    def guide(self, x: Tensor | None = None, context: Tensor | None = None) -> None:
        """q(z | x, c)."""
        assert x is not None
        features = flatten(self.observation.features(x), len(self.event_shape)).to(next(self.encoder.parameters()))
        with self.plate(x, context):
            pyro.sample("z", self.encoder(_with(features, context)))


def _with(features: Tensor, context: Tensor | None) -> Tensor:
    return features if context is None else torch.cat([features, context.expand(*features.shape[:-1], -1)], -1)
