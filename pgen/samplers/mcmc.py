r"""Markov chains as pure steps: from a state to the next, many chains at a time.

A step draws its noise from torch's default generators (key them with ``programs.keyed_rng``), reads nothing from the device,
and decides nothing in Python, so that it can be captured.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Density", "Info", "State", "hmc", "start", "with_gradient"]

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


def _choose(accepted: Tensor, new: State, old: State) -> State:
    def choose(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(accepted.reshape(accepted.shape + (1,) * (a.dim() - accepted.dim())), a, b)

    position, log_density, gradient = (choose(a, b) for a, b in zip(new[:3], old[:3]))
    return State(position, log_density, gradient, tuple(choose(a, b) for a, b in zip(new.parts, old.parts)))
