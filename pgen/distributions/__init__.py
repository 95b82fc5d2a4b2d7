"""Observation models: from a network's outputs to a Pyro distribution of one datum."""

from .autoregressive import Autoregressive, CausalNetwork, stepping
from .discretized import DiscretizedLogisticMixture
from .linear_gaussian import LinearGaussian, regress
from .observation import OBSERVATIONS, Bernoulli, Categorical, DiscretizedLogistic, Gaussian, GaussianMixture, Observation

__all__ = [
    "OBSERVATIONS",
    "Autoregressive",
    "Bernoulli",
    "Categorical",
    "CausalNetwork",
    "DiscretizedLogistic",
    "DiscretizedLogisticMixture",
    "Gaussian",
    "GaussianMixture",
    "LinearGaussian",
    "Observation",
    "regress",
    "stepping",
]
