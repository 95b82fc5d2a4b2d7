"""Guides q(z | x): amortized encoders, and automatic guides for any traced program."""

from .amortized import GaussianEncoder
from .automatic import AUTOMATIC, Flow, FullRank, MeanField

__all__ = ["AUTOMATIC", "Flow", "FullRank", "GaussianEncoder", "MeanField"]
