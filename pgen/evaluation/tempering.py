r"""Draws of a law that is known up to its normaliser, by a population that is led there from a Gaussian.

.. math:: \log f_\beta(x) = (1 - \beta) \log \mathcal{N}(x; m, s^2) + \beta \log f(x)

Particles begin at the Gaussian. At each temperature they are weighed by what it changes, resampled where their weights have
become unequal, so that modes keep their shares, and moved by Hamiltonian Monte Carlo, whose steps adapt.

Del Moral, Doucet, Jasra (2006), Sequential Monte Carlo samplers, doi:10.1111/j.1467-9868.2006.00553.x.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.batches import key
from ..programs import keyed_rng, seed_generators
from ..samplers.mcmc import State, hmc, start
from ..training.progress import Progress
from .annealing import TARGET_ACCEPTANCE, schedule
from .units import QUIET_SECONDS, Unit

__all__ = ["Tempering", "move_on", "tempered"]

LogDensity = Callable[..., Tensor]
"""From x ``(N, *event)`` and further tensors with as many rows to log f(x) ``(N,)``, up to a constant."""
LEAST = 64
"""Particles below which shares of modes mean little: so many are led, whatever is asked for."""
SPARE = 4
"""Particles led for each draw: where modes part, their shares are no better than the number of particles there."""
_GAIN, _OWN, _FIRST = 0.3, 0.1, 0.1
"""How fast steps adapt, together or (each particle with a law of its own) one by one, and a kept chain's first step. A step
that follows its own particle's acceptance fast would change the law."""


@dataclass(frozen=True)
class Tempering:
    """How to lead the population.

    Args:
        num_temps: Temperatures.
        num_steps: Transitions at the end, where the temperature is 1.
        leapfrog: Steps of each transition.
    """

    num_temps: int = 100
    num_steps: int = 50
    leapfrog: int = 3


def tempered(
    log_density: LogDensity,
    loc: Tensor,
    scale: Tensor,
    n: int,
    given: Sequence[Tensor] = (),
    *,
    settings: Tempering,
    seed: int,
    held: Sequence[Tensor] = (),
    compile: str = "auto",
    progress: bool = False,
) -> Tensor:
    """Draws of x, ``(n, *event)``.

    Args:
        log_density: log f.
        loc: m, ``(*event)``.
        scale: s, ``(*event)``.
        n: How many.
        given: What f depends on beside x, ``(n, ...)`` each; particles are then not resampled, as each has a law of its own.
        settings: Temperatures and transitions.
        seed: Keys the noise.
        held: Parameters and buffers that ``log_density`` uses.
        compile: The tier, as in ``Unit``.
        progress: Whether to show a bar on what takes more than two seconds.

    Raises:
        FloatingPointError: If log f is not a number, or infinite, where particles begin.
    """
    with keyed_rng(key(seed, "tempering"), loc.device):
        count = n if given else max(SPARE * n, LEAST)
        at = loc + scale * torch.randn(count, *loc.shape, dtype=loc.dtype, device=loc.device)
        betas = [*schedule(settings.num_temps).tolist(), *[1.0] * settings.num_steps]
        first = max(loc.numel(), 1) ** -0.25  # steps that suit the Gaussian: Beskos et al. (2013), arXiv:1001.4460
        x = _led(log_density, loc, scale, at, given, betas, settings.leapfrog, first, seed, held, compile, progress)
        seed_generators(key(seed, "chosen"), loc.device)
        return x if given else x[_resampled(x.new_zeros(count), ((x - loc) / scale).flatten(1), n)]


def move_on(
    log_density: LogDensity, loc: Tensor, scale: Tensor, x: Tensor, given: Sequence[Tensor] = (), *, settings: Tempering,
    seed: int, held: Sequence[Tensor] = (), compile: str = "auto", progress: bool = False,
) -> Tensor:  # fmt: skip
    """The chains x after ``num_steps`` transitions that leave f invariant; the arguments are those of ``tempered``."""
    betas = [1.0] * (settings.num_steps + 1)
    with keyed_rng(key(seed, "moving"), loc.device):
        return _led(log_density, loc, scale, x, given, betas, settings.leapfrog, _FIRST, seed, held, compile, progress)


def _led(
    log_density: LogDensity,
    loc: Tensor,
    scale: Tensor,
    x: Tensor,
    given: Sequence[Tensor],
    betas: Sequence[float],
    leapfrog: int,
    first: float,
    seed: int,
    held: Sequence[Tensor],
    compile: str,
    progress: bool,
) -> Tensor:
    """Particles from x along the temperatures; ``first`` is the size of the first steps, which adapt."""
    shape = x.shape
    unit, position = _unit(log_density, loc, scale, x, given, leapfrog, len(betas), held, compile)
    log_step = position.new_full((len(x),), first).log()
    log_weight, change = torch.zeros_like(log_step), torch.zeros_like(log_step)
    with Progress(len(betas), progress, QUIET_SECONDS) as bar:
        for number, beta in enumerate(betas):
            if number:
                log_weight = log_weight + (beta - betas[number - 1]) * change
            last = beta == 1.0 and betas[number - 1] < 1.0
            if not given and _unequal(log_weight, last):
                seed_generators(key(seed, "resample", number), loc.device)
                rows = _resampled(log_weight, position)
                position, log_step, log_weight = position[rows], log_step[rows], torch.zeros_like(log_weight)
            temperature = position.new_tensor(beta)
            position, change, acceptance = unit(key(seed, "move", number), position, log_step.exp(), temperature, *given)
            if not number:  # particles never step to where the density is not a number: they can only begin there
                _check_numbers(change)
            if given:
                log_step = log_step + _OWN * (acceptance - TARGET_ACCEPTANCE)
            else:
                log_step = log_step + _GAIN * (acceptance.mean() - TARGET_ACCEPTANCE)
            bar.at(number + 1, "sampling")
    return loc + scale * position.reshape(shape)


def _unit(
    log_density: LogDensity,
    loc: Tensor,
    scale: Tensor,
    x: Tensor,
    given: Sequence[Tensor],
    leapfrog: int,
    calls: int,
    held: Sequence[Tensor],
    compile: str,
) -> tuple[Unit, Tensor]:
    """One transition of all particles at a temperature, and their coordinates, in which the Gaussian is standard."""

    def move(u: Tensor, size: Tensor, beta: Tensor, *given: Tensor) -> list[Tensor]:
        def density(u: Tensor) -> tuple[Tensor, ...]:
            with torch.enable_grad():
                at = u.detach().requires_grad_()
                known = -0.5 * at.square().sum(-1)
                change = log_density(loc + scale * at.reshape(-1, *loc.shape), *given) - known
                (slope,) = torch.autograd.grad((known + beta * change).sum(), at)
            return (known + beta * change).detach(), slope, change.detach()

        state: State = start(density, u)
        state, info = hmc(density, state, size[:, None], leapfrog)
        return [state.position, state.parts[0], info.acceptance]

    position = ((x - loc) / scale).flatten(1)
    inputs = [position, torch.full_like(position[:, 0], _FIRST), position.new_tensor(0.5), *given]
    other = [position.flip(0) + 0.1, *inputs[1:]]
    known = {id(t): t for t in (loc, scale, *held)}
    return Unit(move, list(known.values()), inputs, other, calls=calls, compile=compile), position


def _check_numbers(change: Tensor) -> None:
    """Refuse a density that is not a number, or infinite, where particles begin: weights and moves would mean nothing."""
    wrong = torch.isnan(change) | (change == torch.inf)
    if bool(wrong.any()):
        raise FloatingPointError(
            f"the energy is {-float(change[wrong][0])} at {int(wrong.sum())} of {len(change)} points where chains begin, so "
            "nothing can be drawn; look for a parameter, a logarithm or a root that is not a number"
        )


def _unequal(log_weight: Tensor, last: bool) -> bool:
    """Whether fewer than half the particles carry the weight; at the end, whether weights differ at all."""
    share = log_weight.double().softmax(0)
    return bool((log_weight != log_weight[0]).any()) and (last or float(1 / share.square().sum()) < 0.5 * len(share))


def _resampled(log_weight: Tensor, position: Tensor, count: int | None = None) -> Tensor:
    """Numbers of the particles that go on, as many as before or ``count``, in random order.

    Systematic resampling of neighbours in a row keeps the share of each region almost as it was; in random order shares
    would wander with every resampling (Gerber, Chopin, Whiteley 2019, arXiv:1707.01845).
    """
    order = _in_neighbourhoods(position)
    count, share = count or len(log_weight), log_weight[order].double().softmax(0).cumsum(0)
    points = (torch.arange(count, device=share.device) + torch.rand((), dtype=torch.float64, device=share.device)) / count
    rows = order[torch.searchsorted(share / share[-1], points).clamp(max=len(order) - 1)]
    return rows[torch.randperm(count, device=rows.device)]


def _in_neighbourhoods(position: Tensor) -> Tensor:
    """Numbers of the particles ``(N, D)`` along the leaves of a tree that halves them by one coordinate after another."""
    count = len(position)
    order = torch.arange(count, device=position.device)
    widest = position.var(0, correction=0).argsort(descending=True)
    for depth in range(max(count - 1, 1).bit_length()):
        by = position[order, widest[depth % len(widest)]].argsort(stable=True)
        order = order[by[((by << depth) // count).argsort(stable=True)]]
    return order
