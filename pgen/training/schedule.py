r"""Learning-rate schedules: functions of the global step, so that a resumed run continues them exactly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..contracts import check_choice

__all__ = ["TorchSchedule", "multiplier"]

_NAMED: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "constant": np.ones_like,
    "linear": lambda t: 1.0 - t,
    "cosine": lambda t: 0.5 * (1.0 + np.cos(np.pi * t)),
    "warmup_cosine": lambda t: np.minimum(1.0, 0.01 + 20.0 * t) * 0.5 * (1.0 + np.cos(np.pi * t)),
    "decay": lambda t: 0.01**t,
}


@dataclass(frozen=True)
class TorchSchedule:
    """A torch scheduler as a schedule: ``TorchSchedule(lambda opt: torch.optim.lr_scheduler.StepLR(opt, 100))``.

    It is stepped once an optimizer step; its table of multipliers is made before training.
    """

    make: Callable[[torch.optim.Optimizer], Any]

    def table(self, lr: float, total: int) -> list[float]:
        """Multipliers of ``lr`` for every step."""
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=lr)
        scheduler = self.make(optimizer)
        rates = []
        for _ in range(total):
            rates.append(optimizer.param_groups[0]["lr"] / lr)
            optimizer.step()
            scheduler.step()
        return rates


Schedule = str | Callable[[int], float] | TorchSchedule | None


def multiplier(schedule: Schedule, lr: float, total: int) -> Callable[[np.ndarray], np.ndarray]:
    """The factor of the learning rate as a function of steps (from 0).

    Args:
        schedule: None or ``"constant"``, ``"linear"`` (to 0), ``"cosine"`` (to 0),
            ``"warmup_cosine"`` (the same after a rise over the first twentieth), ``"decay"`` (exponential, to 1 %), a
            function of the step, or a ``TorchSchedule``.
        lr: The base rate.
        total: Steps in all.
    """
    if isinstance(schedule, TorchSchedule):
        return np.array(schedule.table(lr, total)).__getitem__
    if callable(schedule):
        return lambda steps: np.array([schedule(int(t)) for t in steps], dtype=np.float64)
    name = "constant" if schedule is None else schedule
    check_choice("schedule", name, tuple(_NAMED))
    curve = _NAMED[name]
    return lambda steps: curve(steps / total)
