r"""Numbers that change as training goes on. They enter the step as inputs, so that a captured step follows them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass

from ..contracts import check_positive

__all__ = ["Cyclical", "Linear", "Schedule", "check_schedule"]

Schedule = Callable[[int, int], float]
"""From the step (0 at the first) and the number of all steps to a number."""


def check_schedule(argument: str, schedule: Schedule) -> None:
    """Raise TypeError unless ``schedule`` is a function of the step and the number of all steps."""
    try:
        inspect.signature(schedule).bind(0, 1)
    except TypeError:
        raise TypeError(
            f"`{argument}` should be a number or a function of (step, all steps), such as Linear(steps=1000) or "
            f"lambda step, steps: step / steps; this function takes other arguments"
        ) from None


@dataclass(frozen=True)
class Linear:
    r"""A straight line from ``start`` to ``end``, then ``end``.

    Args:
        start: Value at step 0.
        end: Value from step ``steps`` on.
        steps: Steps that it takes; None for all of the training.
    """

    start: float = 0.0
    end: float = 1.0
    steps: int | None = None

    def __post_init__(self) -> None:
        _check_weights(self.start, self.end)
        check_positive("steps", self.steps, allow_none=True)

    def __call__(self, step: int, total: int) -> float:
        """The value at a step."""
        return self.start + (self.end - self.start) * min(1.0, step / max(self.steps or total, 1))


@dataclass(frozen=True)
class Cyclical:
    r"""Rises from ``start`` to ``end`` in the first part of each of several equal cycles, and stays there for the rest.

    Args:
        start: Value at the beginning of each cycle.
        end: Value after the rise.
        cycles: Cycles in all of the training.
        ramp: Share of each cycle that the rise takes, in (0, 1].

    References:
        Fu et al. (2019), Cyclical annealing schedule, arXiv:1903.10145, eq. 6.
    """

    start: float = 0.0
    end: float = 1.0
    cycles: int = 4
    ramp: float = 0.5

    def __post_init__(self) -> None:
        _check_weights(self.start, self.end)
        check_positive("cycles", self.cycles)
        if not 0 < self.ramp <= 1:
            raise ValueError(f"`ramp` is the share of a cycle that rises, in (0, 1], got {self.ramp!r}")

    def __call__(self, step: int, total: int) -> float:
        """The value at a step."""
        phase = math.modf(step / max(total, 1) * self.cycles)[0]
        return self.start + (self.end - self.start) * min(1.0, phase / self.ramp)


def _check_weights(start: float, end: float) -> None:
    for name, value in (("start", start), ("end", end)):
        check_not_negative(name, value)


def check_not_negative(argument: str, value: object) -> None:
    """Raise ValueError unless ``value`` is a finite number of at least 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ValueError(f"`{argument}` should be a number of at least 0, got {value!r}")
