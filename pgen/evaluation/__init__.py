"""Evaluation: likelihoods and their bounds, posterior and predictive draws, in bounded memory, with keyed noise."""

from .likelihood import importance_bound

__all__ = ["importance_bound"]
