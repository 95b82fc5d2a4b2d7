r"""Annealed importance sampling: the evidence by a path of distributions from one that is known to the posterior.

.. math:: \log f_\beta(z) = (1 - \beta) \log f_0(z) + \beta \log p(x, z), \qquad 0 = \beta_0 < \dots < \beta_T = 1

with :math:`f_0` the prior p(z) or the guide q(z | x). A chain starts at a draw from :math:`f_0`; at each temperature its weight
grows and a Hamiltonian Monte Carlo transition that leaves :math:`f_{\beta_t}` invariant moves it:

.. math:: \log w = \sum_{t=1}^T (\beta_t - \beta_{t-1}) \bigl(\log p(x, z_{t-1}) - \log f_0(z_{t-1})\bigr), \qquad E[w] = p(x)

so :math:`\log \frac{1}{C} \sum_c w_c` is a lower bound of log p(x) in expectation (Jensen). The same path backwards from a
*posterior* draw gives an upper bound; simulated data come with such a draw (bidirectional Monte Carlo).

References:
    Neal (2001), Annealed importance sampling, Statistics and Computing 11:125, eq. 11.
    Wu, Burda, Salakhutdinov, Grosse (2017), On the quantitative analysis of decoder-based generative models, arXiv:1611.04273.
    Grosse, Ghahramani, Adams (2015), Sandwiching the marginal likelihood with bidirectional Monte Carlo, arXiv:1511.02543.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
from pyro.poutine.uncondition_messenger import UnconditionMessenger
from torch import Tensor
from torch.distributions import biject_to
from torch.distributions.transforms import Transform

from ..contracts import Batch, NotAvailable, Score, check_choice, check_positive, nearest
from ..data.batches import key
from ..programs import (
    DATA_PLATE,
    Term,
    batch_length,
    keyed_rng,
    rows_at,
    run_latents,
    run_model,
    run_program,
    seed_generators,
    vectorize,
)
from ..samplers.mcmc import State, hmc, start
from ..training.progress import Progress
from .likelihood import UNIT_ROWS, At, each
from .units import QUIET_SECONDS, Deal, Unit, device_of, opened, rows_of

__all__ = ["AIS", "METHODS", "Annealed", "Sandwich", "anneal", "bidirectional", "log_mean", "schedule", "simulate"]

METHODS = ("importance", "ais")
"""Ways to estimate a log-density that has latents to integrate out."""
TARGET_ACCEPTANCE = 0.65
"""Of the transitions, which the pilot run adapts the step size to: Wu et al. (2017); Beskos et al. (2013), arXiv:1001.4460."""
PILOT_TEMPS = 100
"""Most temperatures of the pilot run."""
_FIRST_STEP, _GAIN, _WARM_UP = 0.1, 0.3, 10


@dataclass(frozen=True)
class AIS:
    r"""How to anneal.

    Args:
        num_temps: T, temperatures after the first; the error falls about as 1/T.
        num_chains: C, chains a datum.
        leapfrog: Steps of each transition.
        step_size: Of the leapfrog steps; None adapts one to each datum and temperature in a pilot run with noise of its own,
            which keeps the weights unbiased.
        initial: ``"prior"`` or ``"guide"``: where chains start.
    """

    num_temps: int = 1000
    num_chains: int = 16
    leapfrog: int = 10
    step_size: float | None = None
    initial: str = "prior"

    def __post_init__(self) -> None:
        for name in ("num_temps", "num_chains", "leapfrog"):
            check_positive(name, getattr(self, name))
        check_positive("step_size", self.step_size, allow_none=True, integer=False)
        check_choice("initial", self.initial, ("prior", "guide"))

    @classmethod
    def of(cls, method: str, options: dict[str, Any]) -> AIS | None:
        """The settings that a question's keywords ask for; None for importance sampling, which has none of them."""
        check_choice("method", method, METHODS)
        names = [f.name for f in fields(cls)] if method == "ais" else []
        for name in options:
            if name not in names:
                known = nearest(name, names) if names else "; method='importance' takes none of its own"
                raise TypeError(f"unknown option {name!r} of method={method!r}{known}")
        return cls(**options) if method == "ais" else None


@dataclass(frozen=True)
class Annealed:
    """Estimates of log p(x), ``(N,)``: ``value`` and its Monte Carlo ``error`` (delta method) in nats, mean ``acceptance``."""

    value: Tensor
    error: Tensor
    acceptance: Tensor


@dataclass(frozen=True)
class Sandwich:
    """Bounds of the log-density of simulated data from both sides.

    Attributes:
        lower: Lower bound of each datum.
        upper: Upper bound of each datum.
        acceptance: Mean probability of acceptance of the transitions.
    """

    lower: Score
    upper: Score
    acceptance: float

    @property
    def gap(self) -> float:
        """Mean of upper minus lower, nats a datum: it bounds the error of either, on data from the model."""
        return self.upper.mean - self.lower.mean

    def __str__(self) -> str:
        return (
            f"log p(x) between {self.lower.mean:.3f} and {self.upper.mean:.3f} nats a datum on {len(self.lower)} simulated "
            f"data (gap {self.gap:.3f}, acceptance {self.acceptance:.2f}); real data may be harder"
        )


def schedule(num_temps: int, steepness: float = 4.0) -> Tensor:
    r"""Temperatures :math:`\beta_0 = 0, \dots, \beta_T = 1` of a sigmoid, dense at both ends, ``(T + 1,)`` float64.

    .. math:: \beta_t = \frac{\sigma(\delta (2 t / T - 1)) - \sigma(-\delta)}{\sigma(\delta) - \sigma(-\delta)}

    References:
        Grosse et al. (2015), arXiv:1511.02543, section 6; Wu et al. (2017), arXiv:1611.04273, section 4.
    """
    at = torch.sigmoid(torch.linspace(-steepness, steepness, num_temps + 1, dtype=torch.float64))
    return (at - at[0]) / (at[-1] - at[0])


@dataclass(frozen=True)
class _Site:
    """A latent as a block of the chains' coordinates: ``shape`` of its unconstrained value, ``row`` the data axis in it."""

    name: str
    transform: Transform
    shape: tuple[int, ...]
    row: int | None

    @classmethod
    def of(cls, term: Term, by_rows: bool) -> _Site:
        support = term.fn.support
        if support.is_discrete:
            raise NotAvailable(f"latent {term.name!r} is discrete, and annealing follows gradients; use method='importance'")
        axis = dict(term.plates).get(DATA_PLATE)
        if by_rows and axis is None:
            raise NotAvailable(f"data share {term.name!r}, so no datum has a density of its own; ask for log_evidence(data)")
        transform = biject_to(support)
        shape = tuple(transform.inverse_shape(term.value.shape))
        return cls(term.name, transform, shape, term.log_prob.dim() + axis if by_rows and axis is not None else None)

    @property
    def size(self) -> int:
        """Coordinates of one row."""
        return math.prod(self.shape) // (1 if self.row is None else self.shape[self.row])

    def flat(self, value: Tensor) -> Tensor:
        """Unconstrained coordinates ``(C, rows, size)`` of values ``(C, *shape)``."""
        free = self.transform.inv(value)
        free = free[:, None] if self.row is None else free.movedim(1 + self.row, 1)
        return free.reshape(*free.shape[:2], -1)

    def value(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """Values ``(C, *shape)``, and log |det| of each row ``(C, rows)``."""
        if self.row is None:
            free = flat.reshape(len(flat), *self.shape)
        else:
            rest = [n for i, n in enumerate(self.shape) if i != self.row]
            free = flat.reshape(*flat.shape[:2], *rest).movedim(1, 1 + self.row)
        value = self.transform(free)
        log_det = self.transform.log_abs_det_jacobian(free, value).double()
        log_det = log_det.reshape(len(flat), 1, -1) if self.row is None else log_det.movedim(1 + self.row, 1)
        return value, log_det.reshape(*log_det.shape[:2], -1).sum(-1)


class _Path:
    """The two ends of the path as functions of the chains' coordinates ``(C, rows, D)``."""

    def __init__(self, model: Callable[..., Any], guide: Callable[..., Any], batch: Batch, initial: str, by_rows: bool) -> None:
        self.model, self.guide, self.initial, self.by_rows = model, guide, initial, by_rows
        latents = list(run_latents(model, batch).values())
        if not latents:
            raise NotAvailable("there are no latent variables, so nothing to anneal; leave `method` out")
        self.sites = [_Site.of(term, by_rows) for term in latents]
        proposed = {t.name: t.auxiliary for t in run_program(guide, batch).values()} if initial == "guide" else {}
        if initial == "guide" and (any(proposed.values()) or set(proposed) != {t.name for t in latents}):
            raise NotAvailable(
                "this guide's sites are not the model's latents, so it has no density at given values; use initial='prior'"
            )

    def flat(self, values: dict[str, Tensor]) -> Tensor:
        """Coordinates of latents ``(C, *shape)``."""
        return torch.cat([site.flat(values[site.name]) for site in self.sites], -1)

    def first(self, batch: Batch, chains: int) -> Tensor:
        """Draws from the known end, ``(C, rows, D)``."""
        program = self.model if self.initial == "prior" else self.guide
        names = [site.name for site in self.sites]

        def once() -> dict[str, Tensor]:
            terms = run_program(program, batch)
            return {name: terms[name].value for name in names}

        return self.flat(vectorize(once, chains))

    def ends(self, flat: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """log f_0 and log p(x, z) with the change of variables, ``(C, rows)`` each, float64."""
        blocks = flat.split([site.size for site in self.sites], -1)
        pairs = [site.value(block) for site, block in zip(self.sites, blocks)]
        log_det = torch.stack([pair[1] for pair in pairs]).sum(0)
        known, joint = each(lambda z: self._at(z, batch), {s.name: pair[0] for s, pair in zip(self.sites, pairs)})
        return known + log_det, joint + log_det

    def _at(self, values: dict[str, Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
        rows = batch_length(batch) if self.by_rows else 1
        terms = run_model(self.model, batch, values, double=True).values()
        known = [t for t in terms if not t.observed]
        if self.initial == "guide":
            with At(values):
                known = list(run_program(self.guide, batch, double=True).values())
        return self._sum(known, rows), self._sum(list(terms), rows)

    def _sum(self, terms: list[Term], rows: int) -> Tensor:
        parts = [t.rows if self.by_rows else t.log_prob.sum()[None] for t in terms]
        return sum(parts[1:], parts[0]).expand(rows)

    def with_gradients(self, flat: Tensor, batch: Batch) -> list[Tensor]:
        """``[log f_0, log p(x, z), and their gradients]``."""
        with torch.enable_grad():
            at = flat.detach().requires_grad_()
            known, joint = self.ends(at, batch)
            (slope,) = torch.autograd.grad(joint.sum(), at, retain_graph=True, materialize_grads=True)
            (first,) = torch.autograd.grad(known.sum(), at, materialize_grads=True)
        return [known.detach(), joint.detach(), first, slope]


class _Chains:
    """The chains of one unit of rows: tensors ``(C, rows, ...)``.

    Args:
        path: The path.
        batch: The rows.
        unit: ``path.with_gradients``, in whatever tier.
        settings: Chains and transitions.
        noise: Keys the noise.
        tick: Called at every temperature.
    """

    def __init__(self, path: _Path, batch: Batch, unit: Unit, settings: AIS, noise: int, tick: Callable[[], None]) -> None:
        self.path, self.batch, self.unit, self.settings, self.noise, self.tick = path, batch, unit, settings, noise, tick
        self.tensors, _ = opened(batch)
        self.beta = 0.0

    def first(self, run: str) -> Tensor:
        """Positions at the known end; noise from here on is that of ``run``."""
        seed_generators(key(self.noise, run), device_of(self.batch))
        return self.path.first(self.batch, self.settings.num_chains)

    def density(self, flat: Tensor) -> tuple[Tensor, ...]:
        """log f at the temperature at hand, its gradient, and both ends."""
        return self.mixed(tuple(self.unit(None, flat, *self.tensors)))

    def mixed(self, parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The same from both ends."""
        known, joint, first, slope = parts
        return torch.lerp(known, joint, self.beta), torch.lerp(first, slope, self.beta), *parts

    def move(self, state: State, beta: float, step_size: Tensor) -> tuple[State, Tensor]:
        """One transition at a temperature, and the mean acceptance of each row."""
        self.beta = beta
        log_density, gradient, *parts = self.mixed(state.parts)
        state, info = hmc(
            self.density, State(state.position, log_density, gradient, tuple(parts)), step_size, self.settings.leapfrog
        )
        self.tick()
        return state, info.acceptance.mean(0)

    def step_sizes(self, pilot: Sequence[float]) -> Tensor:
        """Step sizes of each temperature and row, ``(T + 1, rows, 1)``, adapted along a pilot run that is then thrown away."""
        position, temps = self.first("pilot"), self.settings.num_temps
        log_step = position.new_full(position.shape[1:2], math.log(self.settings.step_size or _FIRST_STEP))
        if self.settings.step_size is not None:
            return log_step.exp().expand(temps + 1, -1)[..., None]
        state, sizes = start(self.density, position), []
        for beta in pilot:
            state, acceptance = self.move(state, beta, log_step.exp()[:, None])
            log_step = log_step + _GAIN * (acceptance - TARGET_ACCEPTANCE).to(log_step)
            sizes.append(log_step.exp()[:, None])
        first = pilot.count(0.0) - 1
        return torch.stack([sizes[first + round(t * (len(pilot) - 1 - first) / temps)] for t in range(temps + 1)])

    def run(self, position: Tensor, betas: Sequence[float], sizes: Tensor) -> tuple[Tensor, Tensor]:
        """Log-weights ``(C, rows)`` along temperatures from the first to the last, and mean acceptance ``(rows,)``."""
        self.beta = betas[0]
        state = start(self.density, position)
        log_weight, accepted = torch.zeros_like(state.log_density), []
        for number in range(1, len(betas)):
            log_weight = log_weight + (betas[number] - betas[number - 1]) * (state.parts[1] - state.parts[0])
            if number < len(betas) - 1:  # where the path ends, a move would change no weight
                state, acceptance = self.move(state, betas[number], sizes[number])
                accepted.append(acceptance)
        none = torch.full_like(log_weight[0], math.nan)
        return log_weight, torch.stack(accepted).mean(0) if accepted else none


def anneal(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    batch: Batch,
    settings: AIS,
    *,
    seed: int,
    held: Sequence[Tensor] = (),
    by_rows: bool = True,
    posterior: dict[str, Tensor] | None = None,
    compile: str = "auto",
    progress: bool = False,
) -> Annealed:
    r"""Estimate each datum's log p(x), or that of all data together; inside ``isolated``.

    Args:
        model: The model program.
        guide: The guide program, where ``settings.initial`` is ``"guide"``.
        batch: The data.
        settings: Temperatures, chains, transitions.
        seed: Keys the noise.
        held: Parameters and buffers of the programs.
        by_rows: Whether every latent belongs to one datum, and each datum has an estimate of its own.
        posterior: A draw of the latents from the exact posterior: the path is then run backwards from there, and the values are
            upper bounds (Grosse et al. 2015, arXiv:1511.02543, section 3).
        compile: The tier, as in ``Unit``.
        progress: Whether to show a bar on what takes more than two seconds.

    Returns:
        One number a datum (a lower bound in expectation; an upper one backwards), or one in all.
    """
    rows = Deal(batch_length(batch), UNIT_ROWS if by_rows else batch_length(batch))
    parts = [rows_of(batch, rows, number) for number in range(rows.units)]
    betas, pilot = schedule(settings.num_temps).tolist(), _pilot(settings)
    moves = rows.units * (len(pilot) + settings.num_temps)
    out = []
    with keyed_rng(0, device_of(batch)), rows_at(None), torch.no_grad(), Progress(moves, progress, QUIET_SECONDS) as bar:
        path = _Path(model, guide, parts[0], settings.initial, by_rows)
        unit = _unit(path, parts, settings, held, moves, compile)
        ends = None if posterior is None else path.flat({name: value[None] for name, value in posterior.items()})[0]
        for number, part in enumerate(parts):
            chains = _Chains(path, part, unit, settings, key(seed, "anneal", number), lambda: bar.at(bar.done + 1, "annealing"))
            sizes = chains.step_sizes(pilot)
            position, kept = chains.first("run"), rows.kept(number) if by_rows else 1
            if ends is None:
                log_weight, acceptance = chains.run(position, betas, sizes)
            else:
                position = cast(Tensor, rows_of(ends, rows, number) if by_rows else ends).expand_as(position).contiguous()
                log_weight, acceptance = chains.run(position, betas[::-1], sizes.flip(0))
            value, error = log_mean(log_weight)
            out.append(torch.stack([value if ends is None else -value, error, acceptance])[:, :kept])
    return Annealed(*torch.cat(out, -1))


def bidirectional(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    batch: Batch,
    posterior: dict[str, Tensor],
    settings: AIS,
    *,
    seed: int,
    event_size: int,
    **options: Any,
) -> Sandwich:
    """Bounds from both sides on data that were simulated together with their latents, by the arguments of ``anneal``."""
    below = anneal(model, guide, batch, settings, seed=key(seed, "forward"), **options)
    above = anneal(model, guide, batch, settings, seed=key(seed, "backward"), posterior=posterior, **options)
    return Sandwich(
        Score(below.value, "lower_bound", event_size, below.error, settings.num_chains),
        Score(above.value, "upper_bound", event_size, above.error, settings.num_chains),
        float(torch.cat([below.acceptance, above.acceptance]).mean()),
    )


def simulate(model: Callable[..., Any], batch: Batch) -> tuple[Batch, dict[str, Tensor]]:
    """The batch with its observed arguments replaced by draws of the model, and the latents behind them."""
    observed = {name: term.value for name, term in run_program(model, batch).items() if term.observed}
    with UnconditionMessenger():
        drawn = {name: term.value for name, term in run_program(model, batch).items()}
    tensors, closed = opened(batch)
    for name, value in observed.items():
        places = [i for i, tensor in enumerate(tensors) if tensor is value]
        if not places:
            raise NotAvailable(
                f"site {name!r} observes something computed from the arguments, so they cannot be simulated; "
                f"observe an argument itself: obs={name}"
            )
        tensors[places[0]] = drawn[name]
    return closed(tensors), {name: value for name, value in drawn.items() if name not in observed}


def _pilot(settings: AIS) -> list[float]:
    """Temperatures of the pilot run: some at the known end, then the schedule in coarser steps."""
    if settings.step_size is not None:
        return []
    return [0.0] * _WARM_UP + schedule(max(20, min(settings.num_temps // 5, PILOT_TEMPS))).tolist()


def _unit(path: _Path, parts: list[Batch], settings: AIS, held: Sequence[Tensor], moves: int, compile: str) -> Unit:
    """The density with its gradients, captured where there is much to do."""
    tensors, closed = opened(parts[0])
    flat = path.first(parts[0], settings.num_chains)
    return Unit(
        lambda flat, *tensors: path.with_gradients(flat, closed(tensors)), held, [flat, *tensors],
        [flat.flip(0) + 0.1, *opened(parts[-1])[0]], calls=moves * settings.leapfrog, compile=compile,
    )  # fmt: skip


def log_mean(log_weight: Tensor) -> tuple[Tensor, Tensor]:
    """Log of the mean weight over chains, and its standard error (delta method)."""
    count = len(log_weight)
    first = torch.logsumexp(log_weight, 0)
    relative = (torch.logsumexp(2 * log_weight, 0) - 2 * first + math.log(count)).exp() - 1
    error = (relative.clamp(min=0) / count).sqrt() if count > 1 else torch.full_like(first, math.nan)
    return first - math.log(count), error
