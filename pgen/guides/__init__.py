"""Guides q(z | x): amortized encoders, and automatic guides for any traced program."""

from .amortized import ENCODERS, FlowEncoder, FullCovarianceEncoder, GaussianEncoder, StructuredEncoder
from .automatic import AUTOMATIC, Flow, FullRank, LowRank, MeanField

__all__ = [
    "AUTOMATIC",
    "ENCODERS",
    "Flow",
    "FlowEncoder",
    "FullCovarianceEncoder",
    "FullRank",
    "GaussianEncoder",
    "LowRank",
    "MeanField",
    "StructuredEncoder",
]
