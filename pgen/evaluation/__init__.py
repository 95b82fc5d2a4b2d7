"""Evaluation: likelihoods and their bounds, in bounded memory, with keyed noise."""

from .likelihood import importance_bound

__all__ = ["importance_bound"]
