r"""Markov chains as pure steps: from a state to the next, many chains at a time.

A step draws its noise from torch's default generators (key them with ``programs.keyed_rng``), reads nothing from the device,
and decides nothing in Python, so that it can be captured.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Density", "Info", "State", "exchange", "gibbs", "hmc", "langevin", "start", "with_gradient"]

Density = Callable[[Tensor], tuple[Tensor, ...]]
"""From positions ``(*chains, D)`` to log-densities ``(*chains)``, gradients ``(*chains, D)``, and whatever goes with them."""


class State(NamedTuple):
    """Where chains are.

    Attributes:
        position: ``(*chains, D)``.
        log_density: Log-density there up to a constant, nats, ``(*chains)``.
        gradient: Its gradient, ``(*chains, D)``.
        parts: What else the density gave there, tensors that begin with the axes ``chains``.
    """

    position: Tensor
    log_density: Tensor
    gradient: Tensor
    parts: tuple[Tensor, ...] = ()


class Info(NamedTuple):
    """What a step did.

    Attributes:
        acceptance: Probability of acceptance, ``(*chains)``.
        accepted: Whether the proposal was taken, ``(*chains)``.
        energy_error: Change of the total log-density along the trajectory, nats, ``(*chains)``; 0 for exact dynamics.
    """

    acceptance: Tensor
    accepted: Tensor
    energy_error: Tensor


def with_gradient(log_density: Callable[[Tensor], Tensor]) -> Density:
    """A density with its gradient, by automatic differentiation; each chain's density depends on its own position alone."""

    def both(position: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            at = position.detach().requires_grad_()
            value = log_density(at)
            (gradient,) = torch.autograd.grad(value.sum(), at, materialize_grads=True)
        return value.detach(), gradient

    return both


def start(density: Density, position: Tensor) -> State:
    """The state of chains that begin at ``position``."""
    log_density, gradient, *parts = density(position)
    return State(position, log_density, gradient, tuple(parts))


def hmc(density: Density, state: State, step_size: Tensor | float, leapfrog: int) -> tuple[State, Info]:
    r"""One Hamiltonian Monte Carlo transition with unit mass, which leaves the density invariant.

    .. math:: p \sim \mathcal{N}(0, I), \quad (u', p') = \text{leapfrog}^L_\varepsilon(u, p), \quad
        \alpha = \min\Bigl(1, \frac{f(u') \, \mathcal{N}(p')}{f(u) \, \mathcal{N}(p)}\Bigr)

    Args:
        density: The target.
        state: Where the chains are; its log-density and gradient are the target's.
        step_size: :math:`\varepsilon`, one or one a chain (it broadcasts with ``position``).
        leapfrog: Steps L of the trajectory, each one evaluation of ``density``.

    Returns:
        The next state, and what happened. A trajectory that leaves the finite numbers is refused.

    References:
        Duane et al. (1987), Physics Letters B 195; Neal (2011), MCMC using Hamiltonian dynamics, arXiv:1206.1901, section 3.
    """
    momentum = torch.randn_like(state.position)
    before = state.log_density - 0.5 * momentum.square().sum(-1)
    new, momentum = state, momentum + 0.5 * step_size * state.gradient
    for step in range(leapfrog):
        new = start(density, new.position + step_size * momentum)
        momentum = momentum + (step_size if step < leapfrog - 1 else 0.5 * step_size) * new.gradient
    error = new.log_density - 0.5 * momentum.square().sum(-1) - before
    error = torch.nan_to_num(error, nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    acceptance = error.clamp(max=0.0).exp()
    accepted = torch.rand_like(acceptance) < acceptance
    return _choose(accepted, new, state), Info(acceptance, accepted, error)


def langevin(density: Density, state: State, step_size: Tensor | float, temperature: float = 1.0) -> tuple[State, Info]:
    r"""One unadjusted Langevin step, whose stationary law differs from the density by :math:`O(\varepsilon^2)`.

    .. math:: u' = u + \tfrac{\varepsilon^2}{2} \nabla \log f(u) + \sqrt{T} \, \varepsilon \, \xi,
        \quad \xi \sim \mathcal{N}(0, I)

    With the correction of Metropolis it is ``hmc`` with one leapfrog step, and exact.

    Args:
        density: The target.
        state: Where the chains are.
        step_size: :math:`\varepsilon`, one or one a chain.
        temperature: T; below 1 the chains look for modes, and their law is another than the density's.

    Returns:
        The next state, and what happened: nothing is ever refused.

    References:
        Roberts and Tweedie (1996), Bernoulli 2:341; Welling and Teh (2011), Stochastic gradient Langevin dynamics.
    """
    noise = torch.randn_like(state.position)
    drift = 0.5 * step_size * step_size * state.gradient
    new = start(density, state.position + drift + math.sqrt(temperature) * step_size * noise)
    one = torch.ones_like(state.log_density)
    return new, Info(one, one > 0, new.log_density - state.log_density)


def gibbs(log_density: Callable[[Tensor], Tensor], position: Tensor, values: Tensor) -> Tensor:
    r"""One sweep of Gibbs sampling over coordinates with finitely many values, which leaves the density invariant.

    .. math:: u_d \sim p(u_d \mid u_{-d}) \propto f(u_1, \ldots, u_d, \ldots, u_D), \qquad d = 1, \ldots, D

    Every coordinate costs one evaluation of the density at all its values; a model that knows conditionals of whole blocks
    is faster by them.

    Args:
        log_density: From positions ``(*chains, D)`` to log-densities ``(*chains)`` up to a constant.
        position: Where the chains are, ``(*chains, D)``.
        values: What each coordinate may be, ``(K,)``.

    Returns:
        Where they are next.

    References:
        Geman and Geman (1984), Stochastic relaxation, Gibbs distributions, doi:10.1109/TPAMI.1984.4767596.
    """
    for d in range(position.shape[-1]):
        tried = position.expand(len(values), *position.shape).clone()
        tried[..., d] = values.reshape(-1, *[1] * (position.dim() - 1))
        share = torch.softmax(torch.stack([log_density(one) for one in tried]), 0).cumsum(0)  # (K, *chains)
        drawn = (torch.rand_like(share[0]) * share[-1] > share[:-1]).sum(0)
        position = tried.gather(0, drawn.reshape(1, *drawn.shape, 1).expand(1, *position.shape))[0]
    return position


def exchange(betas: Tensor, change: Tensor) -> tuple[Tensor, Tensor]:
    r"""Replica exchange between neighbouring temperatures, which leaves the product of their laws invariant.

    .. math:: f_k(x) = f_0(x) \, e^{\beta_k c(x)}, \qquad
        \alpha = \min\bigl(1, e^{(\beta_{k+1} - \beta_k) (c(x_k) - c(x_{k+1}))}\bigr)

    Each ladder of chains tries the pairs that begin at even levels, or those that begin at odd ones, by the toss of a coin.

    Args:
        betas: Inverse temperatures, rising, ``(K,)``.
        change: c at each ladder's chains, nats, ``(K, *ladders)``.

    Returns:
        The level that each place is filled from, ``(K, *ladders)``, and each pair's probability of acceptance, tried or not,
        ``(K - 1, *ladders)``.

    References:
        Geyer (1991), Markov chain Monte Carlo maximum likelihood; Swendsen and Wang (1986), doi:10.1103/PhysRevLett.57.2607.
    """
    levels = torch.arange(len(betas), device=betas.device).reshape(-1, *[1] * (change.dim() - 1))
    gap = (betas[1:] - betas[:-1]).reshape(levels[1:].shape)
    acceptance = (gap * (change[:-1] - change[1:])).clamp(max=0.0).exp()
    odd = (torch.rand_like(change[0]) < 0.5).long()
    taken = ((torch.rand_like(acceptance) < acceptance) & (levels[:-1] % 2 == odd)).long()
    none = torch.zeros_like(taken[:1])
    return levels + torch.cat([taken, none]) - torch.cat([none, taken]), acceptance


def _choose(accepted: Tensor, new: State, old: State) -> State:
    def choose(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(accepted.reshape(accepted.shape + (1,) * (a.dim() - accepted.dim())), a, b)

    position, log_density, gradient = (choose(a, b) for a, b in zip(new[:3], old[:3]))
    return State(position, log_density, gradient, tuple(choose(a, b) for a, b in zip(new.parts, old.parts)))
