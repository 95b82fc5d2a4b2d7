"""Evaluation: likelihoods and their bounds, posterior and predictive draws, in bounded memory, with keyed noise."""

from .annealing import AIS, Sandwich, anneal
from .likelihood import importance_bound

__all__ = ["AIS", "Sandwich", "anneal", "importance_bound"]
