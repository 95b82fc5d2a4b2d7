r"""Multi-sample bounds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..contracts import Batch, Kind, check_positive
from ..programs import DATA_PLATE, Traces, run_pair, vectorize
from .elbo import Scalars

__all__ = ["IWAE"]


@dataclass(frozen=True)
class IWAE:
    r"""Importance-weighted bound with K samples.

    .. math:: \mathcal{L}_K = \mathbb{E}\Bigl[\log \frac{1}{K} \sum_{k=1}^{K} \frac{p(x, z_k)}{q(z_k \mid x)}\Bigr],
        \qquad \mathcal{L}_1 = \mathrm{ELBO} \le \mathcal{L}_K \le \log p(x)

    Inside the data plate each datum has its own logarithm, so minibatches are right: the mean of the loss over a
    partition, weighted by length, is the full-data loss. A latent *outside* the plate is shared by all data: then there is
    one logarithm of the joint weight, and a minibatch would not give a bound; that is refused, as is a scale (a scale
    inside a logarithm of a sum is no bound).

    Args:
        num_samples: K. The gradient of the encoder loses signal-to-noise as K grows, as :math:`1 / \sqrt{K}`
            (Rainforth et al. 2018, arXiv:1802.04537).

    References:
        Burda, Grosse, Salakhutdinov (2016), Importance weighted autoencoders, arXiv:1509.00519, eq. 8.
    """

    num_samples: int = 5
    kind: Kind = "lower_bound"

    def __post_init__(self) -> None:
        check_positive("num_samples", self.num_samples)

    def __call__(
        self, model: Callable[..., Any], guide: Callable[..., Any], batch: Batch, scalars: Scalars
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss in nats a datum, and the metric ``elbo`` (nats a datum) from the same samples."""
        num_data = scalars["num_data"]
        log_weight, joint = self._log_weight(model, guide, batch, num_data)  # (K, B) or, joint, (K,)
        bound = torch.logsumexp(log_weight, 0) - math.log(self.num_samples)
        scale = num_data if joint else 1.0
        return -bound.mean() / scale, {"elbo": (log_weight.mean() / scale).detach()}

    def rows(self, model: Callable[..., Any], guide: Callable[..., Any], batch: Batch) -> tuple[Tensor, Tensor]:
        """Each datum's bound ``(B,)`` and zero; or, with latents outside the plate, nothing and the joint bound."""
        log_weight, joint = self._log_weight(model, guide, batch, None, double=True)
        bound = torch.logsumexp(log_weight, 0) - math.log(self.num_samples)
        return (bound.new_zeros(0), bound) if joint else (bound, bound.new_zeros(()))

    def _log_weight(
        self, model: Callable[..., Any], guide: Callable[..., Any], batch: Batch, num_data: float | None, double: bool = False
    ) -> tuple[Tensor, bool]:
        joint = False

        def once() -> Tensor:
            nonlocal joint
            traces = run_pair(model, guide, batch, double=double)
            joint = _check(traces, num_data)
            signed = [(1, t) for t in traces.model.values()] + [(-1, t) for t in traces.guide.values()]
            return sum(sign * (t.rows.sum() if joint else t.rows) for sign, t in signed)  # type: ignore[return-value]

        return vectorize(once, self.num_samples), joint


def _check(traces: Traces, num_data: float | None) -> bool:
    """Whether the weights are joint; refuses programs for which the multi-sample bound is none."""
    terms = [*traces.model.values(), *traces.guide.values()]
    for term in terms:
        if not (isinstance(term.scale, (int, float)) and term.scale == 1):
            raise ValueError(f"site {term.name!r} is scaled, and IWAE with a scale is no bound; remove the scale or use ELBO")
        if term.name in traces.guide and not term.reparameterized:
            raise ValueError(f"guide site {term.name!r} cannot be reparameterised; use ELBO, which has a score-function term")
    joint = any(not term.local for term in terms)
    rows = [len(t.rows) for t in terms if t.local]
    if joint and num_data is not None and rows and rows[0] < num_data:
        outside = next(t.name for t in terms if not t.local)
        raise ValueError(
            f'site {outside!r} lies outside the plate "{DATA_PLATE}", so IWAE needs all {num_data:.0f} data in each step '
            f"(batch of {rows[0]}): drop batch_size or use ELBO"
        )
    return joint
