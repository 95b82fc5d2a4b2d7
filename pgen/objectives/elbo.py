r"""The evidence lower bound."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..contracts import Batch, Kind, check_positive
from ..programs import Term, Traces, run_pair, vectorize

__all__ = ["ELBO", "Objective"]

Scalars = Mapping[str, Any]


class Objective(Protocol):
    """What ``fit`` minimises, and what it reports.

    Calling it gives the loss, in nats a datum of the whole data set, and metric tensors. ``rows`` gives the bound of each
    datum, for validation. ``kind`` says what minus the loss is of the log-evidence.
    """

    kind: Kind

    def __call__(
        self, model: Callable[..., Any], guide: Callable[..., Any], batch: Batch, scalars: Scalars
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss in nats a datum, and metrics."""

    def rows(self, model: Callable[..., Any], guide: Callable[..., Any], batch: Batch) -> tuple[Tensor, Tensor]:
        """Each datum's bound ``(B,)``, and the part that all data share ``()``."""


@dataclass(frozen=True)
class ELBO:
    r"""Evidence lower bound, by reparameterisation where the guide allows it.

    .. math:: \mathcal{L} = \mathbb{E}_{q(z \mid x)}[\log p(x, z) - \log q(z \mid x)] \le \log p(x)

    Under minibatches of B of N data, with :math:`\ell_n` the terms inside the data plate and :math:`g` those outside, the
    loss is :math:`-(\frac{N}{B} \sum_{n \in B} \ell_n + g) / N`: its mean over any partition into batches, weighted by
    their lengths, is the full-data loss. Bias: none. Variance: falls as 1 / ``num_particles``. Latents that cannot be
    reparameterised get the score-function term, with each datum's own signal inside the data plate.

    Args:
        num_particles: Draws a step, evaluated in one batched run.

    References:
        Jordan et al. (1999), An introduction to variational methods; Kingma and Welling (2014), arXiv:1312.6114, eq. 3.
    """

    num_particles: int = 1
    kind: Kind = "lower_bound"

    def __post_init__(self) -> None:
        check_positive("num_particles", self.num_particles)

    def __call__(
        self, model: Callable[..., Any], guide: Callable[..., Any], batch: Batch, scalars: Scalars
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss in nats a datum, and the metrics ``log_likelihood`` and ``kl`` (nats a datum)."""
        num_data = scalars["num_data"]

        def once() -> tuple[Tensor, Tensor, Tensor]:
            return _particle(run_pair(model, guide, batch), num_data)

        if self.num_particles == 1:
            surrogate, bound, likelihood = once()
        else:
            surrogate, bound, likelihood = (t.mean(0) for t in vectorize(once, self.num_particles))
        metrics = {"log_likelihood": likelihood.detach(), "kl": (likelihood - bound).detach()}
        return -(surrogate - (surrogate - bound).detach()), metrics

    def rows(self, model: Callable[..., Any], guide: Callable[..., Any], batch: Batch) -> tuple[Tensor, Tensor]:
        """Each datum's terms ``(B,)`` and the terms outside the data plate ``()``, for one draw, in nats."""
        traces = run_pair(model, guide, batch, double=True)
        local, outside = split(_signed(traces))
        if local is None:
            local = torch.zeros(0, dtype=outside.dtype)
        return local, outside


def _signed(traces: Traces) -> list[tuple[Term, Tensor]]:
    model = [(t, scaled(t, t.rows)) for t in traces.model.values()]
    return model + [(t, -scaled(t, t.rows)) for t in traces.guide.values()]


def scaled(term: Term, rows: Tensor) -> Tensor:
    """Rows times the program's own scale (``poutine.scale``, subsampling plates); a tensor scale stays a tensor."""
    return rows if isinstance(term.scale, (int, float)) and term.scale == 1 else rows * term.scale


def split(terms: Iterable[tuple[Term, Tensor]]) -> tuple[Tensor | None, Tensor]:
    """Sum of the terms inside the data plate ``(B,)`` (None if there are none) and outside ``()``."""
    terms = list(terms)
    local = [rows for term, rows in terms if term.local]
    outside = [rows for term, rows in terms if not term.local]
    zero = terms[0][1].new_zeros(()) if terms else torch.zeros(())
    return (sum(local[1:], local[0]) if local else None), sum(outside, zero)


def _particle(traces: Traces, num_data: float) -> tuple[Tensor, Tensor, Tensor]:
    """Surrogate whose gradient is the bound's, the bound, and its likelihood part: nats a datum."""
    local, outside = split(_signed(traces))
    weight = 0.0 if local is None else 1.0 / len(local)
    bound = outside / num_data + (0.0 if local is None else weight * local.sum())
    likelihood = sum(
        (scaled(t, t.rows).sum() * (weight if t.local else 1.0 / num_data) for t in traces.likelihoods.values()),
        bound.new_zeros(()),
    )
    surrogate = bound
    for term in traces.guide.values():
        if not term.reparameterized:
            surrogate = surrogate + _score_function(term, local, outside, num_data)
    return surrogate, bound, likelihood


def _score_function(term: Term, local: Tensor | None, outside: Tensor, num_data: float) -> Tensor:
    """REINFORCE: inside the plate a site is judged by its own datum and by what is shared, outside it by everything."""
    if term.local and local is not None:
        return (term.rows * (local / len(local) + outside / num_data).detach()).sum()
    total = outside if local is None else outside + local.sum() * (num_data / len(local))
    return term.rows * total.detach() / num_data
