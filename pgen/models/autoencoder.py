r"""Plain autoencoder: the VAE's networks without probability.

.. math:: \min_{f, g} \; \frac{1}{N} \sum_n \lVert x_n - g(f(x_n)) \rVert^2

It has no density and no prior to sample from: the latent space may have gaps, and points between two codes need not decode
to anything. Comparing it with a VAE of the same networks shows what the ELBO adds.

Hinton and Salakhutdinov (2006), Reducing the dimensionality of data with neural networks, doi:10.1126/science.1127647.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ..base import GenerativeModel
from ..contracts import Batch, Kind, NotAvailable, Seed, as_seed, as_sizes, check_positive
from ..data.batches import key
from ..data.transforms import Transform
from ..nn import ACTIVATIONS, MLP, flatten
from ..programs import keyed_rng

__all__ = ["Autoencoder", "SquaredError"]


class SquaredError:
    r"""Mean squared reconstruction error a datum, summed over its coordinates. Not a bound of any likelihood."""

    kind: Kind = "unnormalised"
    word = "squared error"

    def __call__(
        self, model: Callable[..., Any], guide: Callable[..., Any], batch: Batch, scalars: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, in squared units of the data."""
        rows, _ = self.rows(model, guide, batch)
        return -rows.mean(), {}

    def rows(self, model: Callable[..., Any], guide: Callable[..., Any], batch: Batch) -> tuple[Tensor, Tensor]:
        """Minus the squared error of each datum."""
        assert isinstance(batch, dict)
        x = batch["x"]
        error = (x - model(**batch)).flatten(1).square().sum(1)
        return -error, error.new_zeros(())


class Autoencoder(GenerativeModel):
    r"""Autoencoder with dense networks and squared error.

    Shapes: x ``(N, *event_shape)``, codes ``(N, latent_dim)``.

    Args:
        event_shape: Shape of one datum.
        latent_dim: Size of the code.
        hidden: Sizes of the encoder's hidden layers; the decoder's are the same in reverse.
        activation: As in ``VAE``.
        preprocess: Invertible preprocessing of x.
        seed: Keys the initial weights.

    Example:
        >>> Autoencoder((8, 8), latent_dim=3).encode(torch.zeros(5, 8, 8)).shape
        torch.Size([5, 3])
    """

    family = "autoencoder"
    has_density = False

    def __init__(
        self,
        event_shape: Sequence[int],
        latent_dim: int = 8,
        hidden: int | Sequence[int] = (256, 256),
        *,
        activation: str | type[nn.Module] = "silu",
        preprocess: Transform | None = None,
        seed: Seed = 0,
    ) -> None:
        super().__init__(event_shape, preprocess=preprocess)
        check_positive("latent_dim", latent_dim)
        self.latent_dim, self.hidden, self.activation = latent_dim, as_sizes("hidden", hidden), ACTIVATIONS.name(activation)
        size, make = math.prod(self.event_shape), ACTIVATIONS[self.activation]
        with self.initial_weights(seed):
            self.encoder = MLP(size, self.hidden, latent_dim, make).glorot()
            self.decoder = MLP(latent_dim, self.hidden[::-1], size, make).glorot()

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments as plain JSON values."""
        names = ("latent_dim", "activation")
        return {"event_shape": list(self.event_shape), "hidden": list(self.hidden), **{n: getattr(self, n) for n in names}}

    def default_objective(self) -> SquaredError:
        """Squared error."""
        return SquaredError()

    def model(self, x: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        """The reconstruction g(f(x)); no sites."""
        assert x is not None
        return self.decode(self.code(x))

    def code(self, x: Tensor) -> Tensor:
        """f(x), of preprocessed x."""
        return self.encoder(flatten(x, len(self.event_shape)))

    def decode(self, code: Tensor) -> Tensor:
        """g(code), of the shape of preprocessed x."""
        return self.decoder(code).unflatten(-1, self.event_shape)

    def _strict(self, batch: Batch, num_data: int, whole: Batch | None = None) -> None:
        """There are no sites to check."""

    # -- questions ----------------------------------------------------------------------------------------------------

    def encode(self, x: Any, context: Any = None, *, seed: Seed = 0, progress: bool = True) -> Tensor:
        """Codes, ``(N, latent_dim)``."""
        batch = self._batch("x", x, context)
        with torch.no_grad(), keyed_rng(key(as_seed(seed), "encode"), batch["x"].device):
            return self.code(self._prepared(batch)[0]["x"])

    def reconstruct(self, x: Any, context: Any = None, *, seed: Seed = 0, progress: bool = True) -> Tensor:
        """g(f(x)) in the units of the data."""
        batch = self._batch("x", x, context)
        with torch.no_grad(), keyed_rng(key(as_seed(seed), "encode"), batch["x"].device):
            out = self.model(self._prepared(batch)[0]["x"])
            return out if self.preprocess is None else self.preprocess.inverse(out)

    def _refuse(self, question: str) -> NoReturn:
        raise NotAvailable(
            f"an autoencoder has no {question}: it minimises squared error and defines no distribution; "
            f"pgen.models.VAE has the same networks with one"
        )

    def log_prob(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not available: there is no density."""
        self._refuse("density")

    def sample(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not available: there is no distribution to sample from."""
        self._refuse("distribution to sample from")

    def draw(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not available: there is no posterior."""
        self._refuse("posterior")

    def posterior(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not available: there is no posterior."""
        self._refuse("posterior")

    def predict(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not available: there is no predictive distribution."""
        self._refuse("predictive distribution")


_ = torch
