"""Objectives: functions of (model, guide, batch, scalars) that return a loss tensor and a dict of metric tensors.

None calls ``.item()``: a whole training step can be captured into one graph.
"""

from .elbo import ELBO, Objective
from .multisample import IWAE

__all__ = ["ELBO", "IWAE", "Objective"]
