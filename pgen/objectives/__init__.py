"""Objectives: functions of (model, guide, batch, scalars) that return a loss tensor and a dict of metric tensors.

None calls ``.item()``: a whole training step can be captured into one graph.
"""

from .adversarial import Adversarial
from .baselines import DecayingAverage
from .contrastive import ContrastiveDivergence, PersistentContrastiveDivergence
from .elbo import ELBO, Objective
from .energy_score import DenoisingScoreMatching, SlicedScoreMatching
from .multisample import IWAE, VIMCO, DReG, Renyi
from .noise_contrastive import NoiseContrastive
from .schedules import Cyclical, Linear, Schedule
from .simple import Simple

__all__ = [
    "ELBO",
    "IWAE",
    "VIMCO",
    "Adversarial",
    "ContrastiveDivergence",
    "Cyclical",
    "DReG",
    "DecayingAverage",
    "DenoisingScoreMatching",
    "Linear",
    "NoiseContrastive",
    "Objective",
    "PersistentContrastiveDivergence",
    "Renyi",
    "Schedule",
    "Simple",
    "SlicedScoreMatching",
]
