r"""The evidence lower bound."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from pyro.distributions import Delta
from pyro.distributions.util import scale_and_mask
from torch import Tensor, nn

from ..contracts import Batch, Kind, check_positive
from ..programs import Term, Traces, call, innermost, run_pair, vectorize
from .baselines import DecayingAverage, leave_one_out
from .enumerated import Branch, over_branches
from .schedules import Schedule, check_not_negative, check_schedule

__all__ = ["ELBO", "Objective"]

Scalars = Mapping[str, Any]
Signed = list[tuple[Term, Tensor]]
"""Terms and their rows, with the sign and scale that they have in the bound."""


class Objective(Protocol):
    """What ``fit`` minimises, and what it reports.

    Calling it gives the loss, in nats a datum of the whole data set, and metric tensors. ``rows`` gives the bound of each
    datum, for validation. ``kind`` says what minus the loss is of the log-evidence.

    It may also have ``schedules``, a mapping from names to functions of (step, total steps), whose values it then finds in
    ``scalars`` as tensors; and ``state``, a module: a fit works on a copy of it, trains its parameters beside the model's
    and carries its buffers from step to step. Where that state depends on the data (chains that begin there), ``begin(model,
    guide, batch)`` gives the objective with it; it is called before the first step with all data (of a source, with those
    looked at first), preprocessed. ``end(model, guide)`` is called after the last step, finished or not: there it may give
    the model what it is to keep. ``explain(metrics)`` may say in a line why a step with such metrics is not finite.

    A game has ``players``: the objective of each, by the name of the part of the model that it trains (a part of its
    parameters' dotted names), in the order in which they move. A player with ``moves`` moves as often in every step, each time
    on a batch of its own. ``whole_batches`` leaves out what is left of an epoch once no batch can be filled; a game with
    several moves does so anyway. Without ``rows`` nothing is measured on held-out data; where ``selects`` is False, what is
    measured there decides nothing. ``divisible`` False refuses micro-batches: each of these meets the state as the step found
    it, and the mean of what they make of it must be the next one, which does not hold for chains.

    ``concerns``, a function of the history's columns so far, gives what is wrong with the training, a line each by a name: each
    is warned of once, and those that stand at the end are in ``Run.warnings``.

    ``rows`` is maximised on held-out data (early stopping, the best parameters, ``Run.bound``), and ``word``, a string, says
    what it is: ``"critic accuracy"``, say. An objective without one is told as ``"log-likelihood"`` where the guide draws
    nothing, else as ``"bound"``, in nats a datum, and as minus the loss on training data. With a word of its own, the loss
    on training data is told as ``"loss"``, without a unit; a word that ends in ``"loss"`` or ``"error"`` says that ``rows``
    are minus it, and it is shown with its own sign. ``exact`` True says that ``rows`` are log-densities though the loss is not
    normalised, so that they are told in the units of the data.
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
    their lengths, is the full-data loss. Bias: none. Variance: falls as 1 / ``num_particles``.

    *Discrete latents*: those that the guide leaves out are summed inside the model, exactly. Those that it marks with
    ``infer={"enumerate": "parallel"}`` are summed too. Others that cannot be reparameterised get the score-function term,
    with each datum's own signal inside the data plate, less a baseline.

    Args:
        num_particles: Draws a step, evaluated in one batched run.
        sticking_the_landing: Whether the gradient leaves out the score of the guide,
            :math:`\nabla_\phi \log q_\phi(z)` at fixed z, whose expectation is zero. Same bound, no bias; the variance is
            exactly zero where the guide is the posterior, and grows with the distance from it: a guide that cannot come near
            (mean field under strong correlation) may do better without, so it is off unless asked for. A bijection inside
            the guide is inverted at every step: slow for autoregressive flows. Unchanged where the guide has no latents.
        analytic_kl: Whether each latent's log p - log q gives way to minus its Kullback-Leibler divergence, given its
            parents, where torch or Pyro know it in closed form and no parent in the model is drawn after it in the guide;
            the draw remains elsewhere. Same expectation. The variance is most often lower (an encoder far from the
            posterior), yet not zero at the posterior, where without it the bound itself has none: so it is off by default.
        kl_weight: Weight of the Kullback-Leibler part: a number or a schedule, such as ``Linear(0, 1, steps=10_000)``.
            Below 1, minus the loss is no bound (``kind`` is ``"estimate"``); above 1 it is a looser one (Higgins et al.
            2017, beta-VAE). Validation always takes 1.
        free_bits: Nats a datum, for each latent inside the data plate, below which the batch's mean divergence counts no
            further: the gradient stops pressing it down. Minus the loss stays a lower bound, but a looser one; the law of
            partitions does not hold, as the floor is taken for each batch. Validation takes none. 0 for none.
        baseline: Of score-function terms. By default the mean of the other particles (leave one out), where there are
            several. ``DecayingAverage()``, or a module that maps the programs' arguments to one number a datum ``(B,)``, what
            it expects of that datum's bound in nats; it is trained by least squares beside the model. Neither adds bias.

    References:
        Jordan et al. (1999), An introduction to variational methods; Kingma and Welling (2014), arXiv:1312.6114, eq. 3;
        Roeder, Wu, Duvenaud (2017), Sticking the landing, arXiv:1703.09194, eq. 8; Kingma et al. (2016),
        arXiv:1606.04934, eq. 15 (free bits); Bowman et al. (2016), arXiv:1511.06349, section 3.1 (KL annealing);
        Mnih and Gregor (2014), arXiv:1402.0030 (baselines).
    """

    num_particles: int = 1
    sticking_the_landing: bool = field(default=False, kw_only=True)
    analytic_kl: bool = field(default=False, kw_only=True)
    kl_weight: float | Schedule = field(default=1.0, kw_only=True)
    free_bits: float = field(default=0.0, kw_only=True)
    baseline: nn.Module | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        check_positive("num_particles", self.num_particles)
        check_not_negative("free_bits", self.free_bits)
        if not callable(self.kl_weight):
            check_not_negative("kl_weight", self.kl_weight)
        else:
            check_schedule("kl_weight", self.kl_weight)
        if self.baseline is not None and not isinstance(self.baseline, nn.Module):
            raise TypeError(f"`baseline` should be DecayingAverage() or a module, got {type(self.baseline).__name__}")

    @property
    def kind(self) -> Kind:
        """``"lower_bound"``, unless the Kullback-Leibler part may have a weight below 1."""
        return "estimate" if callable(self.kl_weight) or self.kl_weight < 1 else "lower_bound"

    @property
    def schedules(self) -> dict[str, Schedule]:
        """The weight, where it changes."""
        return {"kl_weight": self.kl_weight} if callable(self.kl_weight) else {}

    @property
    def state(self) -> nn.Module | None:
        """The baseline."""
        return self.baseline

    def __call__(
        self, model: Callable[..., Any], guide: Callable[..., Any], batch: Batch, scalars: Scalars
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss in nats a datum, and the metrics ``log_likelihood`` and ``kl`` (nats a datum)."""
        weight = scalars["kl_weight"] if callable(self.kl_weight) else self.kl_weight

        def particle() -> dict[str, Any]:
            return over_branches(lambda branch: self._particle(model, guide, batch, branch, scalars["num_data"], weight))

        out = particle() if self.num_particles == 1 else vectorize(particle, self.num_particles)
        likelihood, bound, kl = (self._mean(out[name]) for name in ("likelihood", "bound", "kl"))
        for cost in out["floored"].values():
            cost = self._mean(cost)
            bound, kl = bound - weight * cost.clamp(min=self.free_bits), kl + cost
        surrogate = bound + self._scores(out["scores"], out["signals"], batch)
        metrics = {"log_likelihood": likelihood.detach(), "kl": kl.detach()}
        return -(surrogate - (surrogate - bound).detach()), metrics

    def rows(self, model: Callable[..., Any], guide: Callable[..., Any], batch: Batch) -> tuple[Tensor, Tensor]:
        """Each datum's terms ``(B,)`` and the terms outside the data plate ``()``, for one draw, in nats."""

        def run(branch: Branch) -> dict[str, Any]:
            traces = run_pair(model, guide, batch, double=True)
            parts = [*_gains(traces), *((term, rows) for _, term, rows in self._costs(traces))]
            local, outside = _weighted(split(parts), branch.weights(traces))
            return {"local": outside.new_zeros(0) if local is None else local, "outside": outside}

        out = over_branches(run)
        local, outside = out["local"], out["outside"]
        return (local.sum(0), outside.sum()) if outside.dim() else (local, outside)

    # -- one draw -----------------------------------------------------------------------------------------------------

    def _particle(
        self, model: Callable[..., Any], guide: Callable[..., Any], batch: Batch, branch: Branch, num_data: float, weight: Any
    ) -> dict[str, Any]:
        """The parts of the bound, in nats a datum, and the rows that score-function terms need."""
        traces = run_pair(model, guide, batch, hold=self.sticking_the_landing)
        weights = branch.weights(traces)
        costs = self._costs(traces)
        scores = {n: t for n, t in traces.scores.items() if n not in branch.sizes}
        floored = _floored(traces, scores) if self.free_bits else ()
        gain = _weighted(split(_gains(traces)), weights)
        cost = _weighted(split((term, rows) for name, term, rows in costs if name not in floored), weights)
        likelihood, kl = _nats(gain, num_data), -_nats(cost, num_data)
        return {
            "likelihood": likelihood,
            "kl": kl,
            "bound": likelihood - weight * kl,
            "floored": {
                name: -_nats(_weighted(split((term, rows) for n, term, rows in costs if n == name), weights), num_data)
                for name in floored
            },
            "scores": {("local" if t.local else "shared", n): t.rows for n, t in scores.items()},
            "signals": _signals(_add(gain, _times(cost, weight)), num_data, {t.local for t in scores.values()}),
        }

    def _costs(self, traces: Traces) -> list[tuple[str, Term, Tensor]]:
        """Minus the Kullback-Leibler part, by site."""
        closed = _closed_forms(traces) if self.analytic_kl else {}
        costs = [(n, t, scaled(t, closed.get(n, t).rows)) for n, t in traces.latents.items()]
        return costs + [(n, t, -scaled(t, t.rows)) for n, t in traces.guide.items() if n not in closed]

    # -- particles together -------------------------------------------------------------------------------------------

    def _mean(self, value: Tensor) -> Tensor:
        """Sum over branches, mean over particles."""
        return value.sum() / self.num_particles if value.dim() else value

    def _scores(self, scores: dict[Any, Tensor], signals: dict[str, Tensor], batch: Batch) -> Tensor | float:
        """Score-function terms: each latent is judged by what depends on it, less a baseline; and the baseline's own loss."""
        if not scores:
            return 0.0
        judged = {place: self._less_baseline(place, signal, batch) for place, signal in signals.items()}
        terms = [(rows * judged[place].detach()).sum() for (place, _), rows in scores.items()]
        surrogate = sum(terms[1:], terms[0]) / self.num_particles
        if isinstance(self.baseline, DecayingAverage):
            self.baseline.update({p: s * (s.shape[-1] if p == "local" else 1) for p, s in signals.items()})
        elif self.baseline is not None and "local" in judged:
            surrogate = surrogate - (judged["local"] * judged["local"].shape[-1]).square().mean()
        return surrogate

    def _less_baseline(self, place: str, signal: Tensor, batch: Batch) -> Tensor:
        """The signal less what was expected; inside the plate both are 1 / B of a datum's bound."""
        rows = signal.shape[-1] if place == "local" else 1
        if isinstance(self.baseline, DecayingAverage):
            return signal - getattr(self.baseline, place).clone() / rows
        if self.baseline is not None and place == "local":
            return signal - self._expected(batch, rows) / rows
        return signal - leave_one_out(signal) if self.num_particles > 1 else signal

    def _expected(self, batch: Batch, rows: int) -> Tensor:
        expected = call(self.baseline, batch)  # type: ignore[arg-type]
        if tuple(expected.shape) != (rows,):
            raise ValueError(
                f"`baseline` should give one number a datum, shape ({rows},), got {tuple(expected.shape)}; add .squeeze(-1)?"
            )
        return expected


# ---------------------------------------------------------------------------------------------------------------------
# Sums of terms


def scaled(term: Term, rows: Tensor) -> Tensor:
    """Rows times the program's own scale (``poutine.scale``, subsampling plates); a tensor scale stays a tensor."""
    return rows if isinstance(term.scale, (int, float)) and term.scale == 1 else rows * term.scale


Sums = tuple[Tensor | None, Tensor]
"""What lies inside the data plate ``(B,)``, None if nothing does, and what lies outside ``()``; unscaled by N / B."""


def split(terms: Iterable[tuple[Term, Tensor]]) -> Sums:
    """Sum of the terms inside the data plate and of those outside."""
    terms = list(terms)
    local = [rows for term, rows in terms if term.local]
    outside = [rows for term, rows in terms if not term.local]
    zero = terms[0][1].new_zeros(()) if terms else torch.zeros(())
    return (sum(local[1:], local[0]) if local else None), sum(outside[1:], outside[0]) if outside else zero


def _gains(traces: Traces) -> Signed:
    return [(t, scaled(t, t.rows)) for t in traces.likelihoods.values()]


def _floored(traces: Traces, scores: Mapping[str, Term]) -> tuple[str, ...]:
    """Latents whose divergence has a floor."""
    for name in traces.guide:
        if name not in traces.latents:
            raise ValueError(f"`free_bits` needs a guide that draws each latent itself, and {name!r} is no site of the model")
        if name in scores:
            raise ValueError(f"`free_bits` needs latents with a gradient, and {name!r} cannot be reparameterised")
    return tuple(name for name, term in traces.latents.items() if term.local)


def _nats(sums: Sums, num_data: float) -> Tensor:
    """Nats a datum of the whole data set."""
    local, outside = sums
    return outside / num_data if local is None else outside / num_data + local.sum() / len(local)


def _add(first: Sums, second: Sums) -> Sums:
    local = first[0] if second[0] is None else second[0] if first[0] is None else first[0] + second[0]
    return local, first[1] + second[1]


def _times(sums: Sums, factor: Any) -> Sums:
    return (None if sums[0] is None else sums[0] * factor), sums[1] * factor


def _weighted(sums: Sums, weights: tuple[Tensor | None, Tensor | None]) -> Sums:
    """Sums times the weights of a branch."""
    local, outside = sums
    if weights[0] is None or weights[1] is None:
        return sums
    return (None if local is None else local * weights[0]), outside * weights[1]


def _signals(sums: Sums, num_data: float, places: set[bool]) -> dict[str, Tensor]:
    """Inside the plate a site is judged by its own datum and by what is shared, outside it by everything."""
    local, outside = (None if s is None else s.detach() for s in sums)
    signals = {}
    if True in places and local is not None:
        signals["local"] = local / len(local) + outside / num_data  # type: ignore[operator]
    if False in places:
        signals["shared"] = _nats((local, outside), num_data)  # type: ignore[arg-type]
    return signals


# ---------------------------------------------------------------------------------------------------------------------
# Closed forms


def _closed_forms(traces: Traces) -> dict[str, Term]:
    """Latents whose divergence is known, with minus it as log-density.

    Replacing a draw's log p - log q by its expectation given everything else is right if nothing that the prior of the latent
    is conditioned on was drawn after it in the guide: what precedes it in the model must precede it in the guide.
    """
    found: dict[str, Term] = {}
    drawn, before = list(traces.guide), list[str]()
    for name, prior in traces.model.items():
        if prior.observed:
            continue
        if name in traces.guide and all(parent in drawn[: drawn.index(name)] for parent in before):
            kl = _divergence(traces.proposals[name], traces.guide[name], prior)
            if kl is not None:
                found[name] = kl
        before.append(name)
    return found


def _divergence(fn: Any, proposal: Term, prior: Term) -> Term | None:
    alike = proposal.mask is prior.mask and proposal.plates == prior.plates and _same(proposal.scale, prior.scale)
    if not alike or isinstance(innermost(fn), Delta):
        return None
    try:
        kl = torch.distributions.kl_divergence(fn, prior.fn)
    except NotImplementedError:
        return None
    return replace(prior, log_prob=scale_and_mask(-kl.to(prior.log_prob.dtype), mask=prior.mask))


def _same(first: Any, second: Any) -> bool:
    return first is second or (not isinstance(first, Tensor) and not isinstance(second, Tensor) and first == second)
