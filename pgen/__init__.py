"""Generative models as Pyro programs: fit them fast, question them, know whether to believe the answer."""

from __future__ import annotations

import importlib
from typing import Any

from . import data, evaluation, models, objectives, training
from .base import GenerativeModel, Pair, load
from .contracts import Draws, NotAvailable, Run, Score
from .evaluation.choose import Choice, choose
from .evaluation.compare import compare
from .models import GenerativeClassifier
from .multistart import Restarts, multistart
from .objectives import ELBO, IWAE
from .training import Training

__all__ = [
    "ELBO",
    "IWAE",
    "Choice",
    "Draws",
    "GenerativeClassifier",
    "GenerativeModel",
    "NotAvailable",
    "Pair",
    "Restarts",
    "Run",
    "Score",
    "Training",
    "choose",
    "compare",
    "data",
    "diagnostics",
    "evaluation",
    "load",
    "models",
    "multistart",
    "objectives",
    "plots",
    "training",
]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Load at use what brings heavy libraries."""
    if name in ("diagnostics", "plots"):
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module 'pgen' has no attribute {name!r}")
