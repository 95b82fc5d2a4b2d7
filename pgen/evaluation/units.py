r"""A question at speed: a function of tensors on a unit of fixed size, captured once and run over keyed units.

A unit is some rows of the data with some draws of the latents. All units of a question have one shape: rows are dealt out
evenly, the last unit is filled up with repeated rows, and the last draws that nobody asked for are dropped. Noise is keyed by
(seed, question, unit), so an answer depends neither on memory nor on the clock. Which tier runs follows from the *amount* of
work, counted and never timed: equal calls give equal bits.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten
from torch.utils.flop_counter import flop_registry

from ..contracts import Batch, check_choice
from ..programs import batch_length, keyed_rng, seed_generators
from ..training.capture import CaptureRefused, CompileFailed, capture, compile_graph

__all__ = [
    "CAPTURE_SECONDS",
    "COMPILE_SECONDS",
    "QUIET_SECONDS",
    "TIERS",
    "Deal",
    "Unit",
    "compiled",
    "device_of",
    "estimate",
    "opened",
    "rows_of",
]

QUIET_SECONDS = 2.0
"""A question that is answered within about this time shows nothing."""

TIERS = ("auto", "eager", "graph", "compiled")

_CALL = 15e-6
"""Estimated seconds that the handlers' Python costs for each operation."""
_NUMBER = 1e-9
"""Estimated seconds for each number that an operation writes."""
_FLOP = 1e-11
"""Estimated seconds for each floating-point operation of a product."""
_FEW_CALLS = 8
"""Calls that are never worth a capture."""
CAPTURE_SECONDS = 3.0
"""Estimated eager seconds above which capture pays (it takes about one)."""
COMPILE_SECONDS = 20.0
"""Estimated eager seconds above which compilation pays (it takes about five, the first time)."""
_MOST_OPERATIONS = 5000
"""Operations of one unit above which capture takes too long."""


class Unit:
    """A function of tensors with keyed noise, run as written, as a graph, or compiled.

    Args:
        fn: From tensors to a list of tensors; its noise comes from torch's default generators.
        held: Tensors that ``fn`` closes over, parameters and buffers; a graph takes them as inputs.
        inputs: An example of what it is called on.
        other: Another example of the same shapes, which tells whether control flow depends on data.
        calls: How often it will be called.
        compile: ``"auto"`` decides by the amount of work; ``"eager"``, ``"graph"``, ``"compiled"``.

    Attributes:
        tier: What runs.
        reason: Why not a faster tier, where one was tried.

    Raises:
        ValueError: If ``compile`` asks for a tier that this function cannot have.
    """

    def __init__(
        self,
        fn: Callable[..., Sequence[Tensor]],
        held: Sequence[Tensor],
        inputs: Sequence[Tensor],
        other: Sequence[Tensor] | None = None,
        *,
        calls: int,
        compile: str = "auto",
    ) -> None:
        check_choice("compile", compile, TIERS)
        self.tier, self.reason = "eager", ""
        self._fn: Callable[..., Sequence[Tensor]] = fn
        self._held: list[Tensor] = []
        self._device = next((t.device for t in [*inputs, *held]), torch.device("cpu"))
        seconds = math.inf
        if compile == "auto":
            seconds = self._estimate(inputs) * calls if calls >= _FEW_CALLS else 0.0
        if compile != "eager" and seconds >= CAPTURE_SECONDS:
            self._capture(fn, held, inputs, inputs if other is None else other, compile, seconds)

    def __call__(self, noise: int | None, *inputs: Tensor) -> list[Tensor]:
        """The function at these inputs, its noise keyed by ``noise``; inside ``keyed_rng``, which restores the state.

        None leaves the generators alone, for a function without noise.
        """
        if noise is not None:
            seed_generators(noise, self._device)
        with torch.no_grad():
            return list(self._fn(*self._held, *inputs))

    def _estimate(self, inputs: Sequence[Tensor]) -> float:
        seconds, self.reason = estimate(self._fn, inputs, self._device)
        return seconds

    def _capture(
        self,
        fn: Callable[..., Sequence[Tensor]],
        held: Sequence[Tensor],
        inputs: Sequence[Tensor],
        other: Sequence[Tensor],
        compile: str,
        seconds: float,
    ) -> None:
        def whole(*tensors: Tensor) -> Sequence[Tensor]:
            return fn(*tensors[len(held) :])

        try:
            with keyed_rng(0, self._device), torch.no_grad():
                graph = capture(whole, [*held, *inputs], [*held, *other], lambda k: seed_generators(k, self._device))
            self._held = [t.detach() for t in held]
            self.tier, self._fn = "graph", graph.forward
            if compile == "compiled" or (compile == "auto" and seconds >= COMPILE_SECONDS):
                self._fn, self.tier = compiled(graph, [*self._held, *inputs]), "compiled"
        except (CaptureRefused, CompileFailed) as refusal:
            self.reason = str(refusal)
            if compile != "auto":
                raise ValueError(f"compile={compile!r} cannot be had, {refusal}; leave it out, or use 'eager'") from refusal


def estimate(fn: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], device: torch.device) -> tuple[float, str]:
    """Seconds of one eager call, estimated from what it does; or 0 and the reason, if there is too much to capture."""
    with keyed_rng(0, device), torch.no_grad(), _Meter() as meter:
        fn(*inputs)
    if meter.operations > _MOST_OPERATIONS:
        return 0.0, f"a unit makes {meter.operations} operations, too many to capture"
    return meter.seconds, ""


def compiled(graph: fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Sequence[Tensor]]:
    """The graph in the compiler's code, without the warnings that its parts give."""
    with warnings.catch_warnings():
        for kind in (DeprecationWarning, FutureWarning):  # torch's own, of parts that the compiler uses
            warnings.simplefilter("ignore", kind)
        return compile_graph(graph, inputs)


class _Meter(TorchDispatchMode):
    """Counts the operations of a function, the numbers that they write, and the FLOPs of its products."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0
        self.seconds = 0.0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Says that the compiler need not be imported to be told to look away: that takes longer than the counting."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        numbers = sum(t.numel() for t in tree_leaves(out) if isinstance(t, Tensor)) if func.is_view is False else 0
        flops = flop_registry.get(func._overloadpacket)
        products = 0 if flops is None else flops(*args, **(kwargs or {}), out_val=out)
        self.operations += 1
        self.seconds += _CALL + _NUMBER * numbers + _FLOP * products
        return out


class Deal:
    """Things dealt out evenly into units of one size: how many units, and how much each takes.

    Args:
        total: How many things.
        most: The largest size of a unit.

    Example:
        >>> deal = Deal(200, 64)
        >>> deal.size, deal.units, deal.kept(3)
        (50, 4, 50)
        >>> Deal(100, 33).kept(3)
        25
    """

    def __init__(self, total: int, most: int) -> None:
        self.total = total
        self.units = -(-total // most)
        self.size = -(-total // self.units)
        self.units = -(-total // self.size)

    def kept(self, unit: int) -> int:
        """How many of a unit were asked for; the rest fills up the last."""
        return min(self.size, self.total - unit * self.size)


def rows_of(batch: Batch, deal: Deal, unit: int) -> Batch:
    """The rows of a unit, the last one filled up with the last row; views of the batch where it is not."""
    start = unit * deal.size
    if deal.kept(unit) == deal.size:
        return tree_map_only(Tensor, lambda t: t[start : start + deal.size] if t.dim() else t, batch)
    last = batch_length(batch) - 1

    def filled(t: Tensor) -> Tensor:
        return t[torch.arange(start, start + deal.size, device=t.device).clamp(max=last)] if t.dim() else t

    return tree_map_only(Tensor, filled, batch)


def opened(batch: Batch) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], Batch]]:
    """The tensors of a batch, and the way back from such tensors to a batch."""
    leaves, spec = tree_flatten(batch)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def closed(tensors: Sequence[Tensor]) -> Batch:
        filled = list(leaves)
        for place, tensor in zip(places, tensors):
            filled[place] = tensor
        return tree_unflatten(filled, spec)

    return [leaves[i] for i in places], closed


def device_of(batch: Batch) -> torch.device:
    """The device of a batch's first tensor."""
    return next((leaf.device for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)), torch.device("cpu"))
