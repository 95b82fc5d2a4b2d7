"""Observation models: from a network's outputs to a Pyro distribution of one datum."""

from .observation import OBSERVATIONS, Bernoulli, Categorical, Gaussian, Observation

__all__ = ["OBSERVATIONS", "Bernoulli", "Categorical", "Gaussian", "Observation"]
