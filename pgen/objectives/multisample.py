r"""Multi-sample bounds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..contracts import Batch, Kind, check_positive
from ..programs import DATA_PLATE, Term, draw_guide, held, run_model, run_pair, vectorize
from .elbo import Scalars

__all__ = ["IWAE", "VIMCO", "DReG", "Renyi"]

Program = Callable[..., Any]


@dataclass(frozen=True)
class IWAE:
    r"""Importance-weighted bound with K samples.

    .. math:: \mathcal{L}_K = \mathbb{E}\Bigl[\log \frac{1}{K} \sum_{k=1}^{K} \frac{p(x, z_k)}{q(z_k \mid x)}\Bigr],
        \qquad \mathcal{L}_1 = \mathrm{ELBO} \le \mathcal{L}_K \le \log p(x)

    Inside the data plate each datum has its own logarithm, so minibatches are right: the mean of the loss over a
    partition, weighted by length, is the full-data loss. A latent *outside* the plate is shared by all data: then there is
    one logarithm of the joint weight, and a minibatch would not give a bound; that is refused, as is a scale (a scale
    inside a logarithm of a sum is no bound). Discrete latents that the guide leaves out are summed inside each weight.

    Bias: none, of the bound and of its gradient. Variance: the gradient of the encoder loses signal-to-noise as K grows, as
    :math:`1 / \sqrt{K}` (Rainforth et al. 2018, arXiv:1802.04537); ``DReG`` does not.

    Args:
        num_samples: K.

    References:
        Burda, Grosse, Salakhutdinov (2016), Importance weighted autoencoders, arXiv:1509.00519, eq. 8.
    """

    num_samples: int = 5
    score_function: ClassVar[bool] = False
    """Whether latents without a gradient are allowed."""

    def __post_init__(self) -> None:
        check_positive("num_samples", self.num_samples)

    @property
    def kind(self) -> Kind:
        """What minus the loss is of the log-evidence, in expectation."""
        return "lower_bound"

    def __call__(self, model: Program, guide: Program, batch: Batch, scalars: Scalars) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss in nats a datum, and the metric ``elbo`` (nats a datum) from the same samples."""
        log_weight, joint = self._log_weight(model, guide, batch, scalars["num_data"])  # (K, B) or, joint, (K,)
        scale = scalars["num_data"] if joint else 1.0
        return -self.combine(log_weight).mean() / scale, _metrics(log_weight, scale)

    def rows(self, model: Program, guide: Program, batch: Batch) -> tuple[Tensor, Tensor]:
        """Each datum's bound ``(B,)`` and zero; or, with latents outside the plate, nothing and the joint bound."""
        log_weight, joint = self._log_weight(model, guide, batch, None, double=True)
        bound = self.combine(log_weight)
        return (bound.new_zeros(0), bound) if joint else (bound, bound.new_zeros(()))

    def combine(self, log_weight: Tensor) -> Tensor:
        """The bound from log-weights along axis 0."""
        return torch.logsumexp(log_weight, 0) - math.log(self.num_samples)

    def _log_weight(
        self, model: Program, guide: Program, batch: Batch, num_data: float | None, double: bool = False
    ) -> tuple[Tensor, bool]:
        joint = False

        def once() -> Tensor:
            nonlocal joint
            traces = run_pair(model, guide, batch, double=double)
            joint = self._check(traces.model, traces.guide, num_data)
            return _difference(traces.model, traces.guide, joint)

        return vectorize(once, self.num_samples), joint

    def _check(self, model: dict[str, Term], guide: dict[str, Term], num_data: float | None) -> bool:
        """Whether the weights are joint; refuses programs for which the multi-sample bound is none."""
        own = type(self).__name__
        terms = [*model.values(), *guide.values()]
        for term in terms:
            if not (isinstance(term.scale, (int, float)) and term.scale == 1):
                raise ValueError(
                    f"site {term.name!r} is scaled, and {own} with a scale is no bound; remove the scale or use ELBO"
                )
            if term.estimated:
                raise ValueError(
                    f"site {term.name!r} estimates its log-density, and {own} takes the exponential of it: use ELBO, a mean"
                )
        for term in guide.values():
            if not term.reparameterized and not self.score_function:
                raise ValueError(
                    f"guide site {term.name!r} cannot be reparameterised; use ELBO or VIMCO, which have a score-function term"
                )
        joint = any(not term.local for term in terms)
        rows = [len(t.rows) for t in terms if t.local]
        if joint and num_data is not None and rows and rows[0] < num_data:
            outside = next(t.name for t in terms if not t.local)
            raise ValueError(
                f'site {outside!r} lies outside the plate "{DATA_PLATE}", so {own} needs all {num_data:.0f} data in each step '
                f"(batch of {rows[0]}): drop batch_size or use ELBO"
            )
        return joint


@dataclass(frozen=True)
class Renyi(IWAE):
    r"""Variational Renyi bound of order alpha with K samples.

    .. math:: \mathcal{L}_\alpha = \frac{1}{1 - \alpha} \log \frac{1}{K} \sum_{k=1}^{K}
        \left( \frac{p(x, z_k)}{q(z_k \mid x)} \right)^{1 - \alpha}

    Order 0 is IWAE, order 1 (a limit) the ELBO of K draws. For every :math:`\alpha \ge 0` and every K it is a lower bound in
    expectation, as a power mean of order at most one lies below the mean of the weights; it falls as alpha grows. For
    :math:`\alpha < 0` it is an upper bound only in the limit of many samples, and ``kind`` is ``"estimate"``. Minibatches,
    shared latents and scales: as for ``IWAE``.

    Bias: against the bound of infinitely many samples, of order 1 / K; none where alpha is 1. Variance: the lower the order,
    the more a single weight decides.

    Args:
        num_samples: K.
        alpha: The order.

    References:
        Li and Turner (2016), Renyi divergence variational inference, arXiv:1602.02311, eq. 4 and theorem 2.
    """

    alpha: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, (int, float)) or not math.isfinite(self.alpha):
            raise ValueError(f"`alpha` should be a number, 0 or above for a bound, got {self.alpha!r}")

    @property
    def kind(self) -> Kind:
        """``"lower_bound"`` for orders of at least 0."""
        return "lower_bound" if self.alpha >= 0 else "estimate"

    @property
    def word(self) -> str:
        """``"estimate"`` for orders below 0, which bound nothing."""
        return "" if self.alpha >= 0 else "estimate"

    def combine(self, log_weight: Tensor) -> Tensor:
        """The bound from log-weights along axis 0."""
        if self.alpha == 1:
            return log_weight.mean(0)
        power = 1 - self.alpha
        return (torch.logsumexp(power * log_weight, 0) - math.log(self.num_samples)) / power


@dataclass(frozen=True)
class DReG(IWAE):
    r"""The bound of ``IWAE`` with the doubly reparameterised gradient.

    .. math:: \nabla_\phi \mathcal{L}_K = \mathbb{E}\Bigl[\sum_k \tilde{w}_k^2 \,
        \frac{\partial \log w_k}{\partial z_k} \frac{d z_k}{d \phi}\Bigr], \qquad \tilde{w}_k = \frac{w_k}{\sum_j w_j}

    for the encoder, with the guide's parameters inside :math:`\log w_k` held constant; the model's own gradient is that of
    IWAE. Bias: none. Variance: the encoder's signal-to-noise does not fall as K grows, and is without noise where the guide
    is the posterior. What ``ELBO(sticking_the_landing=True)`` says of bijections inside guides holds here too.

    Args:
        num_samples: K.

    References:
        Tucker et al. (2019), Doubly reparameterized gradient estimators for Monte Carlo objectives, arXiv:1810.04152, eq. 8.
    """

    def __call__(self, model: Program, guide: Program, batch: Batch, scalars: Scalars) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss in nats a datum, and the metric ``elbo`` (nats a datum) from the same samples."""
        share: dict[str, Tensor] = {}
        drawn, axes = draw_guide(guide, batch, self.num_samples)
        values = {name: _through(value, axes[name], share) for name, value in drawn.items()}
        joint = False

        def weigh(values: dict[str, Tensor]) -> Tensor:
            nonlocal joint
            terms, proposal = run_model(model, batch, values), held(guide, batch, values)
            joint = self._check(terms, proposal, scalars["num_data"])
            return _difference(terms, proposal, joint)

        log_weight = vectorize(weigh, self.num_samples, values)
        share["w"] = torch.softmax(log_weight.detach(), 0)
        scale = scalars["num_data"] if joint else 1.0
        return -self.combine(log_weight).mean() / scale, _metrics(log_weight, scale)


def _through(value: Tensor, axis: int | None, share: dict[str, Tensor]) -> Tensor:
    """The value; gradients that come back through it are multiplied by the share of their sample, known by then."""
    if not value.requires_grad:
        return value

    def weigh(gradient: Tensor) -> Tensor:
        w = share["w"]  # (K, B), or (K,) where the weights are joint
        shape = [len(w)] + [1] * (gradient.dim() - 1)
        if w.dim() > 1 and axis is not None:
            shape[axis] = w.shape[1]
        return gradient * w.reshape(shape)

    alias = value.view_as(value)
    alias.register_hook(weigh)
    return alias


@dataclass(frozen=True)
class VIMCO(IWAE):
    r"""The bound of ``IWAE`` for latents that cannot be reparameterised.

    .. math:: \nabla \mathcal{L}_K = \mathbb{E}\Bigl[\sum_k \bigl(\hat{\mathcal{L}} - \hat{\mathcal{L}}_{-k}\bigr)
        \nabla \log q(z_k \mid x) + \sum_k \tilde{w}_k \nabla \log w_k\Bigr]

    where :math:`\hat{\mathcal{L}}_{-k}` is the bound with :math:`w_k` replaced by the geometric mean of the others. Latents
    that can be reparameterised are, and have no score-function term. Bias: none. Variance: each sample's baseline is made of
    the others, so there is nothing to learn; it needs K of at least 2.

    Args:
        num_samples: K.

    References:
        Mnih and Rezende (2016), Variational inference for Monte Carlo objectives, arXiv:1602.06725, eq. 10 and 11.
    """

    score_function: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_samples < 2:
            raise ValueError("`num_samples` of VIMCO should be at least 2, as each sample is judged by the others, got 1")

    def __call__(self, model: Program, guide: Program, batch: Batch, scalars: Scalars) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss in nats a datum, and the metric ``elbo`` (nats a datum) from the same samples."""
        joint = False

        def once() -> tuple[Tensor, Tensor]:
            nonlocal joint
            traces = run_pair(model, guide, batch)
            joint = self._check(traces.model, traces.guide, scalars["num_data"])
            log_weight = _difference(traces.model, traces.guide, joint)
            return log_weight, _total(traces.scores, joint, log_weight.new_zeros(log_weight.shape))

        log_weight, score = vectorize(once, self.num_samples)
        bound = self.combine(log_weight)
        signal = (bound - self._without_each(log_weight)).detach()
        surrogate = bound + (signal * score).sum(0)
        scale = scalars["num_data"] if joint else 1.0
        loss = -(surrogate - (surrogate - bound).detach()).mean() / scale
        return loss, _metrics(log_weight, scale)

    def _without_each(self, log_weight: Tensor) -> Tensor:
        """The bound with each sample's weight replaced by the geometric mean of the others, ``(K, ...)``."""
        others = (log_weight.sum(0) - log_weight) / (self.num_samples - 1)
        rest = log_weight.unsqueeze(0) + torch.diag_embed((others - log_weight).movedim(0, -1)).movedim((-2, -1), (0, 1))
        return torch.logsumexp(rest, 1) - math.log(self.num_samples)


def _metrics(log_weight: Tensor, scale: float) -> dict[str, Tensor]:
    return {"elbo": (log_weight.mean() / scale).detach()}


def _total(terms: dict[str, Term], joint: bool, start: Any = 0.0) -> Any:
    return sum((t.rows.sum() if joint else t.rows for t in terms.values()), start)


def _difference(model: dict[str, Term], guide: dict[str, Term], joint: bool) -> Tensor:
    """log p - log q: of each datum ``(B,)``, or of all together ``()``."""
    return _total(model, joint) - _total(guide, joint)
