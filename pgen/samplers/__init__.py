"""Samplers: pure steps of Markov chains, with State and Info."""

from .mcmc import Info, State, hmc, start, with_gradient

__all__ = ["Info", "State", "hmc", "start", "with_gradient"]
