r"""Noise as an input: random numbers that do not depend on data are drawn before a compiled step, not inside it.

In their own order and from the same generator, so that a step alone sees the bits that the programs would have drawn; and
for many steps at once where many steps share a call.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

__all__ = ["Noise", "hoist_noise"]

_aten = torch.ops.aten
_FILLS = (
    _aten.normal_.default, _aten.uniform_.default, _aten.exponential_.default, _aten.cauchy_.default,
    _aten.bernoulli_.float, _aten.log_normal_.default, _aten.geometric_.default,
)  # fmt: skip
_MAKES = {
    _aten.randn.default: _aten.normal_.default,
    _aten.randn_like.default: _aten.normal_.default,
    _aten.rand.default: _aten.uniform_.default,
    _aten.rand_like.default: _aten.uniform_.default,
}


@dataclass(frozen=True)
class Noise:
    """One tensor of noise a step.

    Attributes:
        fill: The in-place operation that draws it.
        args: The operation's own arguments.
        example: A tensor of its shape, dtype and device.
    """

    fill: Any
    args: tuple[Any, ...]
    example: Tensor

    def draw(self, steps: int) -> Tensor:
        """The noise of some steps, ``(steps, *shape)``, from the default generator."""
        return self.fill(self.example.new_empty((steps, *self.example.shape)), *self.args)


def hoist_noise(graph: fx.GraphModule) -> tuple[fx.GraphModule, list[Noise]] | None:
    """The graph with its random numbers as further inputs, in order; None where some depend on what the step computes."""
    graph = copy.copy(graph)
    graph.graph = copy.deepcopy(graph.graph)
    noises: list[Noise] = []
    last = [node for node in graph.graph.nodes if node.op == "placeholder"][-1]
    for node in list(graph.graph.nodes):
        found = _noise(node)
        if found is None:
            continue
        with graph.graph.inserting_after(last):
            last = graph.graph.placeholder(f"noise_{len(noises)}")
        last.meta = dict(node.meta)
        noises.append(found)
        empty = node.args[0] if node.target in _FILLS else None
        node.replace_all_uses_with(last)
        graph.graph.erase_node(node)
        if isinstance(empty, fx.Node):
            empty.replace_all_uses_with(last)
            graph.graph.erase_node(empty)
    if any(node.op == "call_function" and _chance(node.target) for node in graph.graph.nodes):
        return None
    graph.recompile()
    return graph, noises


def _chance(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in target.tags


def _noise(node: fx.Node) -> Noise | None:
    """The noise that a node draws, if it draws it without looking at data."""
    value = node.meta.get("val", node.meta.get("tensor_meta"))
    if node.target not in (*_FILLS, *_MAKES) or value is None or not _contiguous(value):
        return None
    if node.target in _MAKES:
        return Noise(_MAKES[node.target], (), _example(value))
    empty = node.args[0] if node.target in _FILLS else None
    if not isinstance(empty, fx.Node) or empty.target not in (_aten.empty.memory_format, _aten.empty_like.default):
        return None
    return Noise(node.target, tuple(node.args[1:]), _example(value))


def _contiguous(value: Any) -> bool:
    dense, strides = 1, []
    for size in reversed(value.shape):
        strides.append(dense)
        dense *= max(1, size)
    given = value.stride() if callable(value.stride) else value.stride
    return all(s == t or n == 1 for s, t, n in zip(given, reversed(strides), value.shape))


def _example(value: Any) -> Tensor:
    return torch.empty(tuple(value.shape), dtype=value.dtype, device=getattr(value, "device", "cpu"))
