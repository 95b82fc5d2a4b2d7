"""Observation models: from a network's outputs to a Pyro distribution of one datum."""

from .discretized import DiscretizedLogisticMixture
from .observation import OBSERVATIONS, Bernoulli, Categorical, DiscretizedLogistic, Gaussian, GaussianMixture, Observation

__all__ = [
    "OBSERVATIONS",
    "Bernoulli",
    "Categorical",
    "DiscretizedLogistic",
    "DiscretizedLogisticMixture",
    "Gaussian",
    "GaussianMixture",
    "Observation",
]
