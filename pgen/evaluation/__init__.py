"""Evaluation: likelihoods and their bounds, posterior and predictive draws, in bounded memory, with keyed noise."""

from . import divergences, ood
from .annealing import AIS, Sandwich, anneal
from .compare import Comparison, Difference
from .likelihood import importance_bound

__all__ = ["AIS", "Comparison", "Difference", "Sandwich", "anneal", "divergences", "importance_bound", "ood"]
