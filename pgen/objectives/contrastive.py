r"""Contrastive divergence: maximum likelihood of a density without its normaliser, by Markov chains.

.. math:: \nabla_\theta \bigl( -\mathbb{E}_{data} \log p_\theta(x) \bigr) =
    \mathbb{E}_{x \sim data} \nabla_\theta E_\theta(x) - \mathbb{E}_{x \sim p_\theta} \nabla_\theta E_\theta(x)

The second expectation is taken over chains: short ones that start at the data (Hinton 2002), or ones that are carried from
step to step (Tieleman 2008), some of them started anew at every step (Du and Mordatch 2019).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ..contracts import Batch, Kind, check_choice, check_positive
from ..samplers.mcmc import Info, State, exchange, gibbs, hmc, langevin, start, with_gradient
from .density import both_densities, check_without_latents, is_discrete, law, log_density, parts
from .elbo import Scalars

__all__ = ["Chains", "ContrastiveDivergence", "PersistentContrastiveDivergence"]

Program = Callable[..., Any]

SAMPLERS = ("langevin", "hmc", "unadjusted", "gibbs")
TARGETS = {"langevin": 0.574, "hmc": 0.65}
"""Acceptance to which step sizes are adapted: Roberts and Rosenthal (1998); Beskos et al. (2013)."""
_GAIN, _SPACING = 0.1, 0.03
WATCHED, STUCK, APART, RUNAWAY = 20, 0.02, 0.05, 100.0
"""Steps that are looked at, at least; acceptance of chains that stand still; exchanges of temperatures too far apart; gap over
data energy of chains that run away."""
CURE = "try a smaller learning rate, clip_norm=1.0, a smaller step_size, or restart=0.05"


class Chains(nn.Module):
    """Where chains are, with the other arguments of the model that they go with, and the step size that suits them.

    Args:
        x: Positions, ``(M, *event_shape)``.
        given: Other tensors of the batch, ``(M, ...)`` each.
        step_size: To begin with.
        loc: Means of the data, where chains begin anew.
        scale: Their standard deviations; of binary data it does not matter.
        num_temps: K, temperatures. Hotter chains ``hot``, ``(K - 1, M, *event_shape)``, begin at noise with those moments.
    """

    x: Tensor
    hot: Tensor
    log_step: Tensor
    log_gap: Tensor
    loc: Tensor
    scale: Tensor

    def __init__(
        self, x: Tensor, given: Sequence[Tensor], step_size: float, loc: Tensor, scale: Tensor, num_temps: int = 1
    ) -> None:
        super().__init__()
        self.register_buffer("x", x.clone())
        self.register_buffer("hot", loc + scale * torch.randn(num_temps - 1, *x.shape, dtype=x.dtype, device=x.device))
        self.register_buffer("log_step", x.new_full((num_temps,) if num_temps > 1 else (), math.log(step_size)))
        rising = torch.arange(1, num_temps, dtype=x.dtype, device=x.device)
        self.register_buffer("log_gap", math.log(2) * rising)  # inverse temperatures that double from one to the next
        for name, value in (("loc", loc), ("scale", scale)):
            self.register_buffer(name, value.clone())
        self.count = len(given)
        for i, tensor in enumerate(given):
            self.register_buffer(f"given_{i}", tensor.clone())

    @property
    def given(self) -> list[Tensor]:
        """The other arguments."""
        return [getattr(self, f"given_{i}") for i in range(self.count)]

    @property
    def betas(self) -> Tensor:
        """Inverse temperatures, from 0 to 1, ``(K,)``."""
        return torch.cat([self.log_gap.new_zeros(1), self.log_gap.softmax(0).cumsum(0)])


@dataclass(frozen=True)
class ContrastiveDivergence:
    r"""Contrastive divergence: k steps of a chain from each datum.

    .. math:: \mathrm{loss} = \mathbb{E}_{x \sim data}[E(x)] - \mathbb{E}_{\tilde x \sim T^k(data)}[E(\tilde x)]

    Chains are held constant, so the gradient lacks a term that is small where k steps come near the model's law: biased for
    any k, towards the likelihood's gradient as k grows. For any model that gives a datum's density up to a constant: a site
    whose distribution is not normalised, or ``pyro.factor``. Metrics: mean energy of data and chains, acceptance, step size.

    Args:
        steps: k.
        sampler: ``"langevin"`` (with Metropolis' correction), ``"hmc"``, ``"unadjusted"`` (Langevin without correction), or
            ``"gibbs"``: the conditionals of whole blocks where the model's distribution has a method ``gibbs``, else one
            coordinate after another of binary x.
        step_size: Of the first step, in standard deviations of each number of the data; ``"langevin"`` and ``"hmc"`` adapt
            it to acceptances of 0.574 and 0.65.
        leapfrog: Steps of each trajectory of ``"hmc"``.

    References:
        Hinton (2002), Training products of experts by minimizing contrastive divergence, doi:10.1162/089976602760128018.
    """

    steps: int = 1
    sampler: str = "langevin"
    step_size: float = field(default=0.1, kw_only=True)
    leapfrog: int = field(default=5, kw_only=True)
    chains: Chains | None = field(default=None, kw_only=True, repr=False, compare=False)
    exact: bool = field(default=False, kw_only=True, repr=False)

    kind: ClassVar[Kind] = "unnormalised"
    takes_sites: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_positive("steps", self.steps)
        check_positive("step_size", self.step_size, integer=False)
        check_positive("leapfrog", self.leapfrog)
        check_choice("sampler", self.sampler, SAMPLERS)

    @property
    def state(self) -> nn.Module | None:
        """The chains."""
        return self.chains

    @property
    def selects(self) -> bool:
        """Whether held-out data decide anything: where the normaliser is known."""
        return self.exact

    @property
    def word(self) -> str:
        """What ``rows`` are."""
        return "exact log-likelihood" if self.exact else "energy gap"

    def begin(self, model: Program, guide: Program, batch: Batch) -> ContrastiveDivergence:
        """The same with chains for these data."""
        check_without_latents(self, model, batch)
        x, given, _ = parts(batch)
        fn = law(model, batch)
        discrete = is_discrete(fn)
        if discrete != (self.sampler == "gibbs") and not (self.sampler == "gibbs" and hasattr(fn, "gibbs")):
            what = "discrete data have no gradient: use 'gibbs'" if discrete else "real data need a gradient: use 'langevin'"
            raise ValueError(f"`sampler` is {self.sampler!r}, but {what}")
        scale = x.std(0, correction=0)
        scale, num_temps = torch.where(scale > 0, scale, 1.0), getattr(self, "num_temps", 1)
        chains = Chains(*self._first(model, x, given), self.step_size, x.mean(0), scale, num_temps)
        return replace(self, chains=chains, exact=getattr(fn, "few_states", False))

    def _first(self, model: Program, x: Tensor, given: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Where chains begin; none are kept here."""
        return x[:0], [tensor[:0] for tensor in given]

    def __call__(self, model: Program, guide: Program, batch: Batch, scalars: Scalars) -> tuple[Tensor, dict[str, Tensor]]:
        """Energy of the data less that of the chains, nats a datum, less the log-density of what else is observed."""
        drawn, metrics = self._negative(model, batch)
        self._adapt(metrics)
        metrics = {name: value.mean() for name, value in metrics.items()}
        rows, rest = both_densities(model, batch)
        data = rows.mean()
        chains = log_density(model, drawn, scales=True).mean()
        metrics = {"data_energy": -data.detach(), "chain_energy": -chains.detach(), **metrics}
        return chains - data - (rest.mean() if isinstance(rest, Tensor) else rest), metrics

    def rows(self, model: Program, guide: Program, batch: Batch) -> tuple[Tensor, Tensor]:
        """Each datum's log-density: exact, or how far it lies above the mean over the chains."""
        found = log_density(model, batch)
        if self.exact:
            return found - law(model, batch).log_normalizer(), found.new_zeros(())
        return found - log_density(model, self._kept(model, batch)).mean(), found.new_zeros(())

    def explain(self, metrics: dict[str, float]) -> str:
        """What to say of a step that is not finite; nothing if the chains have no part in it."""
        if math.isfinite(metrics.get("data_energy", math.nan)) and not math.isfinite(metrics.get("chain_energy", math.nan)):
            fix = "sampler='langevin', whose steps are corrected" if self.sampler == "unadjusted" else "restart=0.05"
            return f"the chains diverged (their energy is {metrics.get('chain_energy')}); use a smaller step_size, or {fix}"
        return ""

    def concerns(self, history: Mapping[str, np.ndarray]) -> dict[str, str]:
        """What is wrong with the chains so far: ``chains``, where they stand still or their energies run away."""
        last = len(history.get("chain_energy", ())) // 10
        if last < WATCHED:
            return {}
        found = {}
        if "acceptance" in history and (rate := float(np.nanmean(history["acceptance"][-last:]))) < STUCK:
            found["chains"] = f"the chains stand still (acceptance {rate:.1%}); {CURE}"
        if "exchange" in history and (rate := float(np.nanmean(history["exchange"][-last:]))) < APART:
            found["temperatures"] = f"neighbouring temperatures hardly exchange chains ({rate:.1%}); use more num_temps"
        gap = (history["chain_energy"] - history["data_energy"])[-last:]
        far = float(np.nanmedian(np.abs(gap)))
        if far > RUNAWAY * max(1.0, float(np.nanmedian(np.abs(history["data_energy"][-last:])))):
            found["chains"] = f"the energies of chains and data are {far:.3g} nats apart: the chains run away; {CURE}"
        return found

    # -- the chains ---------------------------------------------------------------------------------------------------

    def _negative(self, model: Program, batch: Batch) -> tuple[Batch, dict[str, Tensor]]:
        """A batch of chains, moved on."""
        x, given, closed = parts(batch)
        moved, metrics = self._moved(model, x, given, closed)
        return closed(moved, given), metrics

    def _kept(self, model: Program, batch: Batch) -> Batch:
        """A batch of chains to compare held-out data with."""
        return self._negative(model, batch)[0]

    def _moved(
        self, model: Program, x: Tensor, given: Sequence[Tensor], closed: Callable[[Tensor, Sequence[Tensor]], Batch]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Chains k steps on, and what happened."""
        with torch.no_grad():
            if self.sampler == "gibbs":
                return self._swept(model, x, given, closed), {}
            assert self.chains is not None
            scale = self.chains.scale.flatten()
            density = with_gradient(lambda at: log_density(model, closed((at * scale).reshape(x.shape), given)))
            state = start(density, x.flatten(1) / scale)
            size, accepted = self.chains.log_step.exp(), []
            for _ in range(self.steps):
                state, info = self._step(density, state, size)
                accepted.append(info.acceptance.mean())
            metrics = {"acceptance": torch.stack(accepted).mean(), "step_size": size.clone()}
            return (state.position * scale).reshape(x.shape), metrics

    def _step(self, density: Any, state: State, size: Tensor) -> tuple[State, Info]:
        if self.sampler == "unadjusted":
            return langevin(density, state, size)
        return hmc(density, state, size, 1 if self.sampler == "langevin" else self.leapfrog)

    def _adapt(self, metrics: dict[str, Tensor]) -> None:
        """Move the step size towards the acceptance that suits the sampler (Robbins and Monro)."""
        if self.sampler in TARGETS and self.chains is not None:
            self.chains.log_step.add_(_GAIN * (metrics["acceptance"] - TARGETS[self.sampler]))
        if "exchange" in metrics and self.chains is not None:  # neighbours that exchange more than others move apart
            self.chains.log_gap.add_(_SPACING * (metrics["exchange"] - metrics["exchange"].mean()))

    def _swept(
        self, model: Program, x: Tensor, given: Sequence[Tensor], closed: Callable[[Tensor, Sequence[Tensor]], Batch]
    ) -> Tensor:
        fn = law(model, closed(x, given))
        if hasattr(fn, "gibbs"):
            for _ in range(self.steps):
                x = fn.gibbs(x)
            return x
        flat, shape = x.flatten(1), x.shape
        values = torch.arange(2, dtype=x.dtype, device=x.device)
        for _ in range(self.steps):
            flat = gibbs(lambda at: log_density(model, closed(at.reshape(shape), given)), flat, values)
        return flat.reshape(shape)


@dataclass(frozen=True)
class PersistentContrastiveDivergence(ContrastiveDivergence):
    r"""Contrastive divergence with chains that are carried from step to step, and mix while the model changes slowly.

    Each step takes as many chains as there are data in the batch, moves them k steps and puts them back. Biased as far as
    the chains lag behind the model: less with more steps, smaller learning rates, or more temperatures.

    Chains at the model's own temperature stay in the mode where they are; the model may then dig holes where no chain comes,
    and its normaliser runs away. With ``num_temps`` K each chain has K - 1 hotter ones beside it, at

    .. math:: \log f_\beta(x) = (1 - \beta) \log \mathcal{N}(x; m, s^2) + \beta \log f(x), \qquad
        0 = \beta_1 < \dots < \beta_K = 1

    with the data's moments, and neighbours exchange places after every step. The :math:`\beta` move until all pairs exchange
    equally often, step sizes until all accept equally often. Metric ``exchange``: how often they do, best near 0.5.

    Args:
        steps: k.
        sampler: As for ``ContrastiveDivergence``.
        num_chains: How many are kept, the replay buffer.
        restart: Probability with which a chain starts anew at each step: at Gaussian noise with the means and standard
            deviations of the data, or at bits of the data's frequencies.
        num_temps: K; each costs as much as the chains themselves. 1 for none but the model's.
        step_size: As for ``ContrastiveDivergence``.
        leapfrog: As for ``ContrastiveDivergence``.

    References:
        Tieleman (2008), Training restricted Boltzmann machines using approximations to the likelihood gradient,
        doi:10.1145/1390156.1390290 (restart 0); Du and Mordatch (2019), arXiv:1903.08689, section 3.2 (0.05); Desjardins et
        al. (2010), Tempered Markov chain Monte Carlo for training of restricted Boltzmann machines, AISTATS, PMLR 9:145;
        Syed et al. (2022), Non-reversible parallel tempering, arXiv:1905.02939 (equal rates of exchange).
    """

    steps: int = 10
    num_chains: int = field(default=1000, kw_only=True)
    restart: float = field(default=0.0, kw_only=True)
    num_temps: int = field(default=1, kw_only=True)

    whole_batches: ClassVar[bool] = True
    divisible: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("num_chains", self.num_chains)
        check_positive("num_temps", self.num_temps)
        if self.num_temps > 1 and self.sampler == "gibbs":
            raise ValueError(
                f"num_temps={self.num_temps} leads from a Gaussian to real data; with sampler='gibbs' use num_temps=1"
            )
        if not 0 <= self.restart < 1:
            raise ValueError(f"`restart` should be a probability below 1, such as 0.05, got {self.restart}")

    def _first(self, model: Program, x: Tensor, given: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The chains that the model has kept of an earlier fit, as often as there is room, or random data.

        Contexts are kept too. What comes before them, labels, has no part in the chains' law, and is the data's.
        """
        kept = getattr(getattr(model, "__self__", None), "kept_chains", lambda: None)()
        if kept is not None and len(kept[1]) <= len(given):
            order = torch.arange(self.num_chains, device=x.device)
            rows, others = order % len(kept[0]), given[: len(given) - len(kept[1])]
            return kept[0][rows], [*(tensor[order % len(x)] for tensor in others), *(tensor[rows] for tensor in kept[1])]
        rows = torch.randint(len(x), (self.num_chains,), device=x.device)
        return x[rows], [tensor[rows] for tensor in given]

    def end(self, model: Program, guide: Program) -> None:
        """Let the model keep the chains, if it can."""
        keep = getattr(getattr(model, "__self__", None), "keep_chains", None)
        if keep is not None and self.chains is not None:
            keep(self.chains.x, self.chains.given)

    def _negative(self, model: Program, batch: Batch) -> tuple[Batch, dict[str, Tensor]]:
        assert self.chains is not None
        x, given, closed = parts(batch)
        with torch.no_grad():
            rows = self._rows(min(len(x), len(self.chains.x)))
            at, own = self.chains.x[rows], [tensor[rows] for tensor in self.chains.given]
            if self.restart:
                at, own = self._renewed(model, at, own, given)
            if self.num_temps == 1:
                moved, metrics = self._moved(model, at, own, closed)
            else:
                ladders = torch.cat([self.chains.hot[:, rows], at[None]])
                ladders, metrics = self._exchanged(model, ladders, own, closed)
                moved = ladders[-1]
                self.chains.hot.index_copy_(1, rows, ladders[:-1])
            for kept, new in zip([self.chains.x, *self.chains.given], [moved, *own]):
                kept.index_copy_(0, rows, new)
        return closed(moved, own), metrics

    def _exchanged(
        self, model: Program, x: Tensor, given: Sequence[Tensor], closed: Callable[[Tensor, Sequence[Tensor]], Batch]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Ladders of chains ``(K, C, *event_shape)`` k steps on, each followed by exchanges, and what happened.

        In coordinates u in which the Gaussian at the hot end is standard: log f_beta = beta c - |u|^2 / 2, where c is what the
        model's log-density adds to the Gaussian's. It goes with each chain from level to level.
        """
        assert self.chains is not None
        loc, scale, betas = self.chains.loc.flatten(), self.chains.scale.flatten(), self.chains.betas
        shape, level = x.shape, betas.repeat_interleave(x.shape[1])  # (K * C,)
        given = [tensor.repeat(len(betas), *[1] * (tensor.dim() - 1)) for tensor in given]

        def added(u: Tensor) -> Tensor:
            return log_density(model, closed((loc + scale * u).reshape(-1, *shape[2:]), given)) + 0.5 * u.square().sum(1)

        def mixed(u: Tensor, c: Tensor, slope: Tensor) -> tuple[Tensor, ...]:
            return level * c - 0.5 * u.square().sum(1), level[:, None] * slope - u, c, slope

        def density(u: Tensor) -> tuple[Tensor, ...]:
            return mixed(u, *with_gradient(added)(u))

        state = start(density, ((x.flatten(2) - loc) / scale).flatten(0, 1))
        size, column = self.chains.log_step.exp(), torch.arange(shape[1], device=x.device)
        accepted, exchanged = [], []
        for _ in range(self.steps):
            state, info = self._step(density, state, size.repeat_interleave(shape[1])[:, None])
            levels, rate = exchange(betas, state.parts[0].reshape(shape[:2]))
            rows = (levels * shape[1] + column).flatten()
            log_f, gradient, *parts = mixed(u := state.position[rows], *(part[rows] for part in state.parts))
            state = State(u, log_f, gradient, tuple(parts))
            accepted.append(info.acceptance.reshape(shape[:2]).mean(1))
            exchanged.append(rate.mean(1))
        metrics = {"acceptance": torch.stack(accepted).mean(0), "exchange": torch.stack(exchanged).mean(0)}
        return (loc + scale * state.position).reshape(shape), {**metrics, "step_size": size[-1:]}

    def _rows(self, count: int) -> Tensor:
        """Numbers of the chains of a step, ``(count,)``: a random stretch of them."""
        assert self.chains is not None
        total, device = len(self.chains.x), self.chains.x.device
        order = torch.arange(count, device=device)
        if count == total:
            return order
        return (order + (torch.rand((), device=device) * total).long()) % total

    def _renewed(self, model: Program, at: Tensor, own: list[Tensor], given: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Some chains started anew, with the batch's own arguments."""
        assert self.chains is not None
        loc, scale = self.chains.loc, self.chains.scale
        if self.sampler == "gibbs":
            noise = (torch.rand_like(at) < loc).to(at.dtype)
        else:
            noise = loc + scale * torch.randn_like(at)
        anew = torch.rand(len(at), device=at.device) < self.restart

        def some(new: Tensor, old: Tensor) -> Tensor:
            return torch.where(anew.reshape(-1, *[1] * (old.dim() - 1)), new, old)

        return some(noise, at), [some(new[: len(old)], old) for new, old in zip(given, own)]

    def _kept(self, model: Program, batch: Batch) -> Batch:
        assert self.chains is not None
        return parts(batch)[2](self.chains.x, self.chains.given)
