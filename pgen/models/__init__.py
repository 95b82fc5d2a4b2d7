"""The families: one file each, read top to bottom."""

from ..base import FAMILIES as REGISTRY
from .autoencoder import Autoencoder
from .gaussian import Gaussian
from .linear import FactorAnalysis, ProbabilisticPCA
from .made import MADE
from .vae import VAE

__all__ = [
    "MADE",
    "REGISTRY",
    "VAE",
    "Autoencoder",
    "FactorAnalysis",
    "Gaussian",
    "ProbabilisticPCA",
]
