r"""Samples symbol by symbol at speed: one step, captured once and repeated.

Sampling from an autoregressive distribution is T small steps. As written each is some hundred calls of Python; captured it is
a graph, compiled it is a few kernels, and a native loop repeats those without Python in between. The noise of a step does not
depend on the tier, and neither does what is drawn, up to rounding: each tier draws the same random numbers in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..distributions.autoregressive import StepFunction
from ..programs import keyed_rng, seed_generators
from ..training.capture import CaptureRefused, CompileFailed, capture
from ..training.noise import Noise, hoist_noise
from ..training.progress import Progress
from ..training.step import CompiledStep, unchanged
from .units import CAPTURE_SECONDS, COMPILE_SECONDS, QUIET_SECONDS, compiled, estimate

__all__ = ["Steps"]

CHUNK_NUMBERS = 1 << 22
"""Numbers of noise that a native loop is given at a time."""


_Repeated = Callable[[list[Tensor], Tensor, Tensor, Progress], Tensor]


class Steps:
    """Repeats the steps of autoregressive distributions; what ``pgen.distributions.stepping`` takes.

    Args:
        held: Tensors that the steps close over, parameters and buffers; a graph takes them as inputs.
        compile: ``"auto"`` decides by the amount of work, counted and never timed; else the tier.
        progress: Whether to show a bar on what takes more than two seconds.

    Attributes:
        tier: What ran last.
        reason: Why not a faster tier, where one was tried.
    """

    def __init__(self, held: Sequence[Tensor], *, compile: str = "auto", progress: bool = False) -> None:
        self.tier, self.reason = "eager", ""
        self._held, self._compile, self._progress = list(held), compile, progress
        self._loops: dict[Any, _Repeated] = {}

    def __call__(self, owner: Any, step: StepFunction, state: list[Tensor], given: Tensor, observed: Tensor) -> Tensor:
        """All steps, ``(T, B, *element)``; see ``pgen.distributions.autoregressive``."""
        tensors = [*state, given, observed]
        known = (*map(id, owner), *((tuple(t.shape), t.dtype) for t in tensors))
        if known not in self._loops:
            self._loops[known] = self._loop(owner, step, state, given, observed)
        with Progress(len(given), self._progress, QUIET_SECONDS) as bar:
            return self._loops[known](state, given, observed, bar)

    def _loop(self, owner: Any, step: StepFunction, state: list[Tensor], given: Tensor, observed: Tensor) -> _Repeated:
        device = given.device
        example = [torch.zeros((), dtype=torch.int64, device=device), given[0].contiguous(), observed[0].contiguous()]

        def whole(*tensors: Tensor) -> list[Tensor]:
            return [step(tensors[: len(state)], *tensors[len(tensors) - 3 :])]

        seconds = math.inf
        if self._compile == "auto":
            seconds, _ = estimate(whole, [*(s.clone() for s in state), *example], device)
            seconds *= len(given)
        self.tier, self.reason = "eager", ""
        plain = _Loop(owner, whole, [])
        if self._compile == "eager" or seconds < CAPTURE_SECONDS:
            return plain
        try:
            return self._captured(owner, whole, state, example, seconds)
        except (CaptureRefused, CompileFailed) as refusal:
            self.reason = str(refusal)
            if self._compile != "auto":
                raise ValueError(
                    f"compile={self._compile!r} cannot be had, {refusal}; leave it out, or use 'eager'"
                ) from refusal
            return plain

    def _captured(
        self, owner: Any, whole: Callable[..., list[Tensor]], state: list[Tensor], example: list[Tensor], seconds: float
    ) -> _Repeated:
        device, held = example[0].device, [t.detach() for t in self._held]
        own = [s.clone() for s in state]
        other = [example[0] + 1, *example[1:]]
        with keyed_rng(0, device), torch.no_grad():
            graph = capture(
                whole, [*own, *self._held, *example], [*own, *self._held, *other], lambda k: seed_generators(k, device)
            )
            self.tier = "graph"
            if self._compile == "graph" or (self._compile == "auto" and seconds < COMPILE_SECONDS):
                return _Loop(owner, graph.forward, held)
            hoisted = hoist_noise(graph)
            graph, noises = (graph, None) if hoisted is None else hoisted
            moving = [*example, *(noise.draw(1)[0] for noise in noises or ())]
            with unchanged(own):
                fn = compiled(graph, [*own, *held, *moving])
                found = CompiledStep(fn, [*own, *held], moving, noises, len(own))
        self.tier, self.reason = "compiled", found.reason
        return _Native(owner, found, own)


class _Loop:
    """Steps called one by one."""

    def __init__(self, owner: Any, fn: Callable[..., Sequence[Tensor]], held: list[Tensor]) -> None:
        self.owner, self.fn, self.held = owner, fn, held  # the owner stays alive, so that its identity is its own

    def __call__(self, state: list[Tensor], given: Tensor, observed: Tensor, bar: Progress) -> Tensor:
        found = []
        for i, t in enumerate(torch.arange(len(given), device=given.device)):
            bar.at(i, "step")
            found.append(self.fn(*state, *self.held, t, given[i], observed[i])[0].clone())
        return torch.stack(found)


class _Native:
    """Compiled steps over a state of their own, many at a call."""

    def __init__(self, owner: Any, steps: CompiledStep, state: list[Tensor]) -> None:
        self.owner, self.steps, self.state = owner, steps, state

    def __call__(self, state: list[Tensor], given: Tensor, observed: Tensor, bar: Progress) -> Tensor:
        for own, value in zip(self.state, state):
            own.copy_(value)
        positions = torch.arange(len(given), device=given.device)
        numbers = sum(noise.example.numel() for noise in self.steps.noises or ())
        chunk, found = max(1, CHUNK_NUMBERS // max(1, numbers)), []
        for start in range(0, len(given), chunk):
            bar.at(start, "step")
            part = slice(start, start + chunk)
            moving = [given[part].contiguous(), observed[part].contiguous()]
            found.append(self.steps(None, positions[part], [*moving, *_drawn(self.steps.noises, len(moving[0]))])[0])
        return torch.cat(found)


def _drawn(noises: Sequence[Noise] | None, steps: int) -> list[Tensor]:
    """Noise of some steps, in the order in which steps alone would draw it."""
    rows = [[noise.draw(1) for noise in noises or ()] for _ in range(steps)]
    return [torch.cat(column) for column in zip(*rows)]
