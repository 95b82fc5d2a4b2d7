r"""A distribution that is known up to its normaliser."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from ..contracts import NotAvailable

__all__ = ["Unnormalised"]


class Unnormalised(dist.TorchDistribution):
    r"""A law whose ``log_prob`` is minus an energy, in nats, up to a constant that nobody knows.

    .. math:: \log p(x) = -E(x) - \log Z

    Shapes: x ``(*batch, *event_shape)`` -> ``(*batch)``. Whoever observes with it in a Pyro program is to be fitted by an
    objective that needs no normaliser, such as ``pgen.objectives.ContrastiveDivergence``.

    Args:
        energy: From x ``(B, *event_shape)`` to E(x) ``(B,)``.
        event_shape: Shape of one datum.
        support: Of x.
        batch_shape: Shape of the batch.

    Example:
        >>> law = Unnormalised(lambda x: 0.5 * x.square().sum(1), (2,))
        >>> law.log_prob(torch.tensor([[3.0, 4.0]]))
        tensor([-12.5000])
    """

    def __init__(
        self,
        energy: Callable[[Tensor], Tensor],
        event_shape: Sequence[int],
        support: Any = constraints.real,
        batch_shape: Sequence[int] = (),
    ) -> None:
        self.energy, self._support = energy, support
        super().__init__(torch.Size(batch_shape), torch.Size(event_shape), validate_args=False)

    @property
    def support(self) -> Any:  # type: ignore[override]
        """The values that x may take."""
        return constraints.independent(self._support, len(self.event_shape))

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> Unnormalised:
        """The same for more data."""
        return Unnormalised(self.energy, self.event_shape, self._support, batch_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Minus the energy."""
        flat = self.energy(value.reshape(-1, *self.event_shape))
        shape = value.shape[: value.dim() - len(self.event_shape)]
        rows = -flat.reshape(shape)
        if not self.batch_shape or shape == self.batch_shape:
            return rows
        return rows.expand(torch.broadcast_shapes(shape, self.batch_shape))

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """There are no draws of it without a Markov chain."""
        raise NotAvailable("a law known up to its normaliser has no sampler of its own; ask the model: model.sample(n)")
