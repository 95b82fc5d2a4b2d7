r"""One training step, in three execution tiers that give the same numbers.

The step gathers a batch, evaluates the loss and its gradient, and updates parameters, optimizer state and moving average.
A step whose loss or gradient is not finite changes nothing and says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..programs import seed_generators
from .capture import CudaReplay, capture, compile_graph, retrace
from .optim import External

__all__ = ["Step"]

LossFunction = Callable[[list[Tensor], Tensor | None], tuple[Tensor, dict[str, Tensor]]]
"""From data leaves and row indices (None for all rows in order) to the loss and metrics."""


@contextmanager
def _unchanged(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Give tensors their values back afterwards."""
    before = [t.clone() for t in tensors]
    try:
        yield
    finally:
        for t, value in zip(tensors, before):
            t.copy_(value)


class Step:
    """The step of one fit.

    Args:
        loss: The loss as a function of the data leaves and row indices.
        params: Parameters to train.
        buffers: Buffers that the programs may change.
        optimizer: One of ours, or ``External``.
        leaves: The data, resident on the device.
        clip_norm: Largest norm of the gradient; None for no clipping.
        ema: Decay of the moving average of parameters; None for none.
    """

    def __init__(
        self,
        loss: LossFunction,
        params: list[nn.Parameter],
        buffers: list[Tensor],
        optimizer: Any,
        leaves: list[Tensor],
        *,
        clip_norm: float | None,
        ema: float | None,
    ) -> None:
        self.loss, self.params, self.buffers, self.leaves = loss, params, buffers, leaves
        self.optimizer, self.clip_norm, self.ema_decay = optimizer, clip_norm, ema
        self.values = [p.detach() for p in params]  # the same storage, outside autograd
        self.external = isinstance(optimizer, External)
        self.state = [] if self.external else optimizer.init(self.values)
        self.ema = [v.clone() for v in self.values] if ema is not None else []
        self.metric_names: list[str] = []
        self._graphs: dict[int, fx.GraphModule] = {}

    # -- the mathematics ----------------------------------------------------------------------------------------------

    def loss_and_grads(self, index: Tensor | None) -> list[Tensor]:
        """``[loss, *metrics, *gradients]`` by running the programs."""
        with torch.enable_grad():
            loss, metrics = self.loss(self.leaves, index)
            grads = torch.autograd.grad(loss, self.params, allow_unused=True)
        self.metric_names = list(metrics)
        filled = [torch.zeros_like(p) if g is None else g.contiguous() for p, g in zip(self.params, grads)]
        return [loss.detach(), *(m.detach() for m in metrics.values()), *filled]

    def _split(self, out: Sequence[Tensor]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        cut = 1 + len(self.metric_names)
        return out[0], list(out[1:cut]), list(out[cut:])

    def _clip(self, loss: Tensor, grads: list[Tensor]) -> tuple[list[Tensor], Tensor, Tensor]:
        norm = torch.stack([torch.linalg.vector_norm(g) for g in grads]).norm()
        skip = ~(torch.isfinite(loss) & torch.isfinite(norm))
        if self.clip_norm is not None:
            factor = (self.clip_norm / (norm + 1e-6)).clamp(max=1.0)
            grads = [g * factor.to(g.dtype) for g in grads]
        return grads, norm, skip

    def apply_(self, out: Sequence[Tensor], s: Tensor) -> list[Tensor]:
        """Update in place from ``loss_and_grads``' result; returns ``[loss, norm, skip, *metrics]``."""
        loss, metrics, grads = self._split(out)
        grads, norm, skip = self._clip(loss, grads)
        if self.external:
            if not bool(skip):
                self.optimizer.step(self.params, grads, float(s[0]))
        else:
            self.optimizer.update_(self.values, grads, self.state, s, skip)
        if self.ema:
            torch._foreach_lerp_(self.ema, self.values, 1 - self.ema_decay)  # type: ignore[operator]
        return [loss, norm, skip, *metrics]

    def _functional(self, graph: fx.GraphModule, index: Tensor | None, s: Tensor) -> list[Tensor]:
        """The same as plain arithmetic on new tensors, over ``len(s)`` steps, written back at the end."""
        params, state, ema, outputs = self.values, self.state, self.ema, []
        for i in range(len(s)):
            rows = [] if index is None else [index[i]]
            loss, metrics, grads = self._split(graph(*params, *self.buffers, *self.leaves, *rows))
            grads, norm, skip = self._clip(loss, grads)
            params, state = self.optimizer.update(params, grads, state, s[i], skip)
            ema = [e + (1 - self.ema_decay) * (p - e) for e, p in zip(ema, params)]  # type: ignore[operator]
            outputs.append([loss, norm, skip, *metrics])
        old = [*self.values, *(t for part in self.state for t in part), *self.ema]
        new = [*params, *(t for part in state for t in part), *ema]
        for into, value in zip(old, new):
            into.copy_(value)
        return [torch.stack(column) for column in zip(*outputs)]

    # -- tiers --------------------------------------------------------------------------------------------------------

    def eager(self, index: Tensor | None, s: Tensor) -> list[Tensor]:
        """Run the programs as written."""
        return self.apply_(self.loss_and_grads(index), s)

    def graph(self, index: Tensor | None, other: Tensor | None) -> Callable[[Tensor | None, Tensor], list[Tensor]]:
        """The step in the graph tier for batches of this length; raises CaptureRefused."""
        graph = self.captured(index, other)
        fixed = [*self.values, *self.buffers, *self.leaves]
        forward = graph.forward

        def run(index: Tensor | None, s: Tensor) -> list[Tensor]:
            return self.apply_(forward(*fixed, *([] if index is None else [index])), s)

        return run

    def captured(self, index: Tensor | None, other: Tensor | None) -> fx.GraphModule:
        """The graph of ``loss_and_grads``, captured on ``index`` and checked on ``other``."""
        length = -1 if index is None else len(index)
        if length not in self._graphs:
            fixed = [*self.params, *self.buffers, *self.leaves]

            def fn(*inputs: Tensor) -> list[Tensor]:
                return self.loss_and_grads(inputs[-1] if index is not None else None)

            rows = ([], []) if index is None else ([index], [other if other is not None else index])
            device = self.params[0].device
            with _unchanged(self.buffers):
                self._graphs[length] = capture(fn, fixed + rows[0], fixed + rows[1], lambda k: seed_generators(k, device))
        return self._graphs[length]

    def num_nodes(self) -> int:
        """Operations of the captured loss and gradient."""
        return max((len(graph.graph.nodes) for graph in self._graphs.values()), default=1)

    def compiled_inputs(self, index: Tensor | None, s: Tensor) -> list[Tensor]:
        """Inputs of the compiled step, in order; ``index`` ``(U, B)`` and ``s`` ``(U, scalars)`` for U unrolled steps."""
        return [*self.mutable(), *self.leaves, *([] if index is None else [index]), s]

    def mutable(self) -> list[Tensor]:
        """Everything that a step may change."""
        return [*self.values, *(t for part in self.state for t in part), *self.ema, *self.buffers]

    def traced(self, index: Tensor | None, s: Tensor) -> tuple[fx.GraphModule, list[Tensor]]:
        """The whole step (or U of them) as one graph and its inputs, ready to compile. Changes nothing."""
        graph = self._graphs[-1 if index is None else index.shape[-1]]
        inputs = self.compiled_inputs(index, s)

        def fn(*args: Tensor) -> list[Tensor]:
            return self._functional(graph, index, s)

        with torch.no_grad(), _unchanged(self.mutable()):
            return retrace(fn, inputs), inputs

    def bind(self, fn: Callable[..., Sequence[Tensor]]) -> Callable[[Tensor | None, Tensor], list[Tensor]]:
        """A compiled function as a step of (index, scalars)."""
        fixed = self.compiled_inputs(None, torch.zeros(()))[:-1]
        if self.params[0].is_cuda:
            fn = self._replayed(fn, len(fixed))

        def run(index: Tensor | None, s: Tensor) -> list[Tensor]:
            return list(fn(*fixed, s) if index is None else fn(*fixed, index, s))

        return run

    def _replayed(self, fn: Callable[..., Sequence[Tensor]], num_fixed: int) -> Callable[..., Sequence[Tensor]]:
        """``fn`` as a CUDA graph, captured at the first call; the warm-up's updates are undone."""
        replay: list[CudaReplay] = []

        def run(*args: Tensor) -> Sequence[Tensor]:
            if not replay:
                with _unchanged(self.mutable()):
                    replay.append(CudaReplay(fn, args, range(num_fixed, len(args))))
            return replay[0](*args)

        return run

    def compiled(self, index: Tensor | None, s: Tensor) -> Callable[[Tensor | None, Tensor], list[Tensor]]:
        """Compile now and wait for it."""
        graph, inputs = self.traced(index, s)
        return self.bind(compile_graph(graph, inputs))
