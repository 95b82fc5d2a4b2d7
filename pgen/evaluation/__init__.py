"""Evaluation: likelihoods and their bounds, posterior and predictive draws, in bounded memory, with keyed noise."""

from . import calibration, divergences, ood, samples
from .annealing import AIS, Sandwich, anneal
from .calibration import Calibration
from .compare import Comparison, Difference
from .likelihood import importance_bound
from .watch import Watch

__all__ = [
    "AIS",
    "Calibration",
    "Comparison",
    "Difference",
    "Sandwich",
    "Watch",
    "anneal",
    "calibration",
    "divergences",
    "importance_bound",
    "ood",
    "samples",
]
