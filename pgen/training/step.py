r"""One training step, in three execution tiers that give the same numbers.

The step gathers a batch, evaluates the loss and its gradient, and updates parameters, optimizer state and moving average.
A step whose loss or gradient is not finite changes nothing and says so.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from ..programs import seed_generators
from .capture import CudaReplay, capture, retrace
from .native import NativeLoop, NotNative
from .noise import Noise, hoist_noise
from .optim import External

__all__ = ["CompiledStep", "Player", "Step", "Traced", "unchanged"]

LossFunction = Callable[[list[Tensor], Tensor | None, Tensor | None], tuple[Tensor, dict[str, Tensor]]]
"""From data leaves, row indices (None for all rows in order) and scheduled scalars to the loss and metrics."""


@contextmanager
def unchanged(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Give tensors their values back afterwards."""
    before = [t.clone() for t in tensors]
    try:
        yield
    finally:
        for t, value in zip(tensors, before):
            t.copy_(value)


@dataclass
class Player:
    """One loss over its own parameters, with an optimizer of its own. Most objectives have one; a game has several.

    Args:
        loss: The loss as a function of the data leaves, row indices and scheduled scalars.
        params: Parameters that it trains.
        optimizer: One of ours, or ``External``.
        name: Under which its metrics are reported; empty for the only player.
        moves: Updates a step, each on rows of its own.
    """

    loss: LossFunction
    params: list[nn.Parameter]
    optimizer: Any
    name: str = ""
    moves: int = 1

    def __post_init__(self) -> None:
        self.values = [p.detach() for p in self.params]  # the same storage, outside autograd
        self.external = isinstance(self.optimizer, External)
        self.state = [] if self.external else self.optimizer.init(self.values)
        self.num_scalars = 1 if self.external else self.optimizer.scalars(np.zeros(1), np.ones(1)).shape[1]
        self.metric_names: list[str] = []

    def loss_and_grads(self, leaves: list[Tensor], index: Tensor | None, scheduled: Tensor | None) -> list[Tensor]:
        """``[loss, *metrics, *gradients]`` by running the programs."""
        with torch.enable_grad():
            loss, metrics = self.loss(leaves, index, scheduled)
            grads = torch.autograd.grad(loss, self.params, allow_unused=True)
        self.metric_names = list(metrics)
        filled = [torch.zeros_like(p) if g is None else g.contiguous() for p, g in zip(self.params, grads)]
        return [loss.detach(), *(m.detach() for m in metrics.values()), *filled]

    def split(self, out: Sequence[Tensor]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Loss, metrics and gradients."""
        cut = 1 + len(self.metric_names)
        return out[0], list(out[1:cut]), list(out[cut:])


class Step:
    """The step of one fit: each player's updates in turn, from the parameters as the one before left them.

    Where a player moves several times, a batch is cut into as many shares, one a move; who moves less often takes the last.

    Args:
        players: In the order in which they move.
        buffers: Buffers that the programs may change.
        leaves: The data, resident on the device.
        scheduled: How many scheduled scalars the losses take.
        clip_norm: Largest norm of the gradient; None for no clipping.
        ema: Decay of the moving average of parameters, which it rises to; None for none.
    """

    def __init__(
        self,
        players: Sequence[Player],
        buffers: list[Tensor],
        leaves: list[Tensor],
        *,
        scheduled: int = 0,
        clip_norm: float | None = None,
        ema: float | None = None,
    ) -> None:
        self.players, self.buffers, self.leaves = list(players), buffers, leaves
        self.scheduled, self.clip_norm, self.ema_decay = scheduled, clip_norm, ema
        self.shares = max(player.moves for player in self.players)
        self.turns = [(i, self.shares - p.moves + k, k) for i, p in enumerate(self.players) for k in range(p.moves)]
        """Of each move in a step: the player, its share of the rows, and how many moves of its own came before."""
        self.params = list({id(p): p for player in players for p in player.params}.values())
        self.values = [p.detach() for p in self.params]
        place = {id(p): i for i, p in enumerate(self.params)}
        self._own = [[place[id(p)] for p in player.params] for player in players]
        self.external = any(player.external for player in players)
        self.ema = [v.clone() for v in self.values] if ema is not None else []
        self._graphs: dict[tuple[int, int], fx.GraphModule] = {}
        self._compiled: dict[tuple[int, int], Callable[..., Sequence[Tensor]]] = {}
        self._changing = buffers  # all of them, until a capture shows which
        self._changed: set[int] = set()

    @property
    def metric_names(self) -> list[str]:
        """Names of the metrics, in the order in which a step returns them."""
        names: list[str] = []
        for player in self.players:
            prefix = f"{player.name}_" if player.name else ""
            names += [f"{prefix}{name}" for name in (["loss", "grad_norm"] if prefix else []) + player.metric_names]
        return names

    # -- the mathematics ----------------------------------------------------------------------------------------------

    def split_scalars(self, s: Tensor) -> tuple[list[Tensor], Tensor | None]:
        """A step's scalars, split into each move's and the scheduled ones (None where there are none)."""
        sizes = [self.players[i].num_scalars for i, *_ in self.turns]
        *parts, scheduled, _ = torch.split(s, [*sizes, self.scheduled, len(s) - sum(sizes) - self.scheduled])
        return parts, scheduled if self.scheduled else None

    def share(self, index: Tensor | None, turn: int) -> Tensor | None:
        """The rows of a step that a move takes; None for all rows in order."""
        if index is None or self.shares == 1:
            return index
        return index.chunk(self.shares)[self.turns[turn][1]]

    def _clip(self, loss: Tensor, grads: list[Tensor]) -> tuple[list[Tensor], Tensor, Tensor]:
        norm = torch.stack([torch.linalg.vector_norm(g) for g in grads]).norm()
        skip = ~torch.isfinite(loss + norm)
        if self.clip_norm is not None:
            factor = (self.clip_norm / (norm + 1e-6)).clamp(max=1.0)
            grads = [g * factor.to(g.dtype) for g in grads]
        return grads, norm, skip

    def _apply(self, player: Player, out: Sequence[Tensor], s: Tensor) -> list[Tensor]:
        """One player's update in place from ``loss_and_grads``' result; returns ``[loss, norm, skip, *metrics]``."""
        loss, metrics, grads = player.split(out)
        grads, norm, skip = self._clip(loss, grads)
        if player.external:
            if not bool(skip):
                player.optimizer.step(player.params, grads, float(s[0]))
        else:
            player.optimizer.update_(player.values, grads, player.state, s, skip)
        return [loss, norm, skip, *metrics]

    def update(self, run: Callable[[int, Tensor | None], Sequence[Tensor]], s: Tensor) -> list[Tensor]:
        """All moves' updates in place, where ``run`` gives a move's loss and gradients; then the moving average."""
        scalars, scheduled = self.split_scalars(s)
        results = []
        for turn, (i, *_) in enumerate(self.turns):
            before = [b.clone() for b in self._changing]
            results.append(self._apply(self.players[i], run(turn, scheduled), scalars[turn]))
            skip = results[-1][2]
            if before and (skip.device.type != "cpu" or bool(skip)):  # on a GPU to ask would be to wait
                self._restore(before, skip)
        summary = self._summary(results)
        if self.ema:
            ahead = torch._foreach_sub(self.values, self.ema)
            torch._foreach_mul_(ahead, self._ema_weight(summary[2], s))
            torch._foreach_add_(self.ema, ahead)
        return summary

    def _ema_weight(self, skip: Tensor, s: Tensor) -> Tensor:
        """How far the average moves towards the parameters, the last of the scalars; nowhere where the step is skipped."""
        return (~skip).to(self.values[0].dtype) * s[-1]

    def averaging(self, steps: np.ndarray) -> np.ndarray:
        r"""How far the average moves in steps t = 0, 1, ..., ``(steps, 1)``; no columns without an average.

        One less the decay, which rises to the one asked for, as :math:`\min(d, (1 + t) / (10 + t))`: the average forgets where
        training began within a tenth of the steps that there have been.
        """
        if self.ema_decay is None:
            return np.zeros((len(steps), 0))
        return (1 - np.minimum(self.ema_decay, (1 + steps) / (10 + steps)))[:, None]

    def _restore(self, before: list[Tensor], skip: Tensor) -> None:
        """Give buffers their values back where the step is skipped."""
        for buffer, old in zip(self._changing, before):
            buffer.copy_(torch.where(skip, old, buffer))

    def _summary(self, results: list[list[Tensor]]) -> list[Tensor]:
        """``[loss, norm, skip, *metrics]`` of a step: with several players, their sum, and each one's among the metrics."""
        if not self.players[0].name:
            return results[0]
        results = [self._over_moves(results, i) for i in range(len(self.players))]
        loss, skip = (reduce(add, (r[i] for r in results)) for i, add in ((0, torch.add), (2, torch.logical_or)))
        norm = torch.stack([r[1] for r in results]).norm()
        return [loss, norm, skip, *(t for r in results for t in (r[0], r[1], *r[3:]))]

    def _over_moves(self, results: list[list[Tensor]], player: int) -> list[Tensor]:
        """A player's results: means over its moves, and whether any was skipped."""
        own = [result for result, (i, *_) in zip(results, self.turns) if i == player]
        if len(own) == 1:
            return own[0]
        loss, norm, skip, *metrics = (torch.stack(column) for column in zip(*own))
        return [loss.mean(), norm.mean(), skip.any(), *(m.mean() for m in metrics)]

    def _functional(self, length: int, index: Tensor | None, s: Tensor) -> list[Tensor]:
        """The same as plain arithmetic on new tensors, written back at the end."""
        params, results = list(self.values), []
        states = [player.state for player in self.players]
        scalars, scheduled = self.split_scalars(s)
        for turn, (j, *_) in enumerate(self.turns):
            player, share = self.players[j], self.share(index, turn)
            rows = [] if share is None else [share]
            before = [b.clone() for b in self._changing]
            inputs = [*params, *self.buffers, *self.leaves, *rows, *([] if scheduled is None else [scheduled])]
            loss, metrics, grads = player.split(self._graphs[j, length](*inputs))
            grads, norm, skip = self._clip(loss, grads)
            own, states[j] = player.optimizer.update([params[k] for k in self._own[j]], grads, states[j], scalars[turn], skip)
            for k, value in zip(self._own[j], own):
                params[k] = value
            self._restore(before, skip)
            results.append([loss, norm, skip, *metrics])
        summary = self._summary(results)
        ema = [e + self._ema_weight(summary[2], s) * (p - e) for e, p in zip(self.ema, params)]
        moments = [t for state in states for part in state for t in part]
        for into, value in zip(self.mutable(), [*params, *moments, *ema]):
            into.copy_(value)
        return summary

    # -- tiers --------------------------------------------------------------------------------------------------------

    def eager(self, index: Tensor | None, s: Tensor) -> list[Tensor]:
        """Run the programs as written."""

        def run(turn: int, scheduled: Tensor | None) -> list[Tensor]:
            return self.players[self.turns[turn][0]].loss_and_grads(self.leaves, self.share(index, turn), scheduled)

        return self.update(run, s)

    def graph(self, index: Tensor | None, other: Tensor | None) -> Callable[[Tensor | None, Tensor], list[Tensor]]:
        """The step in the graph tier for batches of this length; raises CaptureRefused."""
        forwards = [graph.forward for graph in self.captured(self.share(index, 0), self.share(other, 0))]
        fixed = [*self.values, *self.buffers, *self.leaves]

        def run(index: Tensor | None, s: Tensor) -> list[Tensor]:
            def move(turn: int, scheduled: Tensor | None) -> Sequence[Tensor]:
                share = self.share(index, turn)
                rows = [] if share is None else [share]
                return forwards[self.turns[turn][0]](*fixed, *rows, *([] if scheduled is None else [scheduled]))

            return self.update(move, s)

        return run

    def gradients(self, player: int, index: Tensor, scheduled: Tensor | None) -> list[Tensor]:
        """A player's ``[loss, *metrics, *gradients]`` on some rows, by the graph for as many rows if there is one."""
        known = player, len(index)
        if known not in self._graphs:
            return self.players[player].loss_and_grads(self.leaves, index, scheduled)
        run = self._compiled.get(known, self._graphs[known].forward)
        return list(run(*self._gradient_inputs(index, scheduled)))

    def _gradient_inputs(self, index: Tensor, scheduled: Tensor | None) -> list[Tensor]:
        return [*self.values, *self.buffers, *self.leaves, index, *([] if scheduled is None else [scheduled])]

    def traced_gradients(self, player: int, index: Tensor, s: Tensor) -> tuple[fx.GraphModule, list[Tensor]]:
        """A player's captured ``gradients``, ready to compile, and its inputs. Changes nothing."""
        inputs = self._gradient_inputs(index, self.split_scalars(s)[1])
        graph = self._graphs[player, len(index)]
        with torch.no_grad(), unchanged(self.buffers):
            return retrace(lambda *args: graph(*args), inputs), inputs

    def take_gradients(self, player: int, length: int, fn: Callable[..., Sequence[Tensor]]) -> None:
        """Use compiled code for the gradients of as many rows."""
        self._compiled[player, length] = fn

    def captured(self, index: Tensor | None, other: Tensor | None) -> list[fx.GraphModule]:
        """Each player's graph of ``loss_and_grads``, captured on the rows of a move and checked on ``other`` ones."""
        length = -1 if index is None else len(index)
        for i, player in enumerate(self.players):
            if (i, length) not in self._graphs:
                self._graphs[i, length] = self._capture(player, index, other)
        return [self._graphs[i, length] for i in range(len(self.players))]

    def _capture(self, player: Player, index: Tensor | None, other: Tensor | None) -> fx.GraphModule:
        device = self.params[0].device
        fixed = [*self.params, *self.buffers, *self.leaves]
        scheduled = [torch.ones(self.scheduled, dtype=self.params[0].dtype, device=device)] if self.scheduled else []
        rows = ([], []) if index is None else ([index], [other if other is not None else index])

        def fn(*inputs: Tensor) -> list[Tensor]:
            moving = inputs[len(fixed) :]
            return player.loss_and_grads(
                self.leaves, moving[0] if index is not None else None, moving[-1] if self.scheduled else None
            )

        with unchanged(self.buffers):
            before = [b.clone() for b in self.buffers]
            inputs, others = ([*fixed, *r, *scheduled] for r in rows)
            graph = capture(fn, inputs, others, lambda k: seed_generators(k, device))
            self._changed |= {i for i, (b, old) in enumerate(zip(self.buffers, before)) if not torch.equal(b, old)}
        self._changing = [self.buffers[i] for i in sorted(self._changed)]
        return graph

    def loss(self, index: Tensor | None) -> Tensor:
        """The only player's loss at the parameters as they are, ``()``, from its graph where there is one."""
        graph = self._graphs.get((0, -1 if index is None else len(index)))
        if graph is None:
            return self.players[0].loss(self.leaves, index, None)[0]
        return graph(*self.values, *self.buffers, *self.leaves, *([] if index is None else [index]))[0]

    def mutable(self) -> list[Tensor]:
        """Everything that a step may change."""
        return [*self.values, *(t for p in self.players for part in p.state for t in part), *self.ema, *self.buffers]

    def traced(self, index: Tensor | None, s: Tensor) -> Traced:
        """The whole step as one graph, ready to compile, from one step's rows and scalars. Changes nothing."""
        share = self.share(index, 0)
        length = -1 if share is None else len(share)
        inputs = [*self.mutable(), *self.leaves, *([] if index is None else [index]), s]

        def fn(*args: Tensor) -> list[Tensor]:
            return self._functional(length, index, s)

        with torch.no_grad(), unchanged(self.mutable()):
            graph = retrace(fn, inputs)
        hoisted = hoist_noise(graph)
        if hoisted is None:
            return Traced(graph, inputs, None)
        graph, noises = hoisted
        return Traced(graph, [*inputs, *(noise.draw(1)[0] for noise in noises)], noises)

    def marker(self) -> Path:
        """A file beside the compiler's cache that says that this step has been compiled there before."""
        from torch._inductor.runtime.cache_dir_utils import cache_dir

        tensors = [(tuple(t.shape), str(t.dtype), str(t.device)) for t in (*self.mutable(), *self.leaves)]
        parts = [graph.code for graph in self._graphs.values()] + [repr(player.optimizer) for player in self.players]
        text = repr((torch.__version__, torch.get_num_threads(), tensors, parts, self.clip_norm, self.ema_decay))
        return Path(cache_dir()) / "pgen-steps" / hashlib.sha256(text.encode()).hexdigest()

    def bind(self, fn: Callable[..., Sequence[Tensor]], traced: Traced) -> CompiledStep:
        """Compiled code as steps."""
        fixed = [*self.mutable(), *self.leaves]
        with torch.no_grad(), unchanged(self.mutable()):
            return CompiledStep(fn, fixed, traced.inputs[len(fixed) :], traced.noises, len(self.mutable()))


@dataclass(frozen=True)
class Traced:
    """A step ready to compile.

    Attributes:
        graph: From ``inputs`` to the step's outputs; changes the first inputs in place.
        inputs: What the step changes, the data, the rows (unless all), the scalars, and the noise.
        noises: How the noise is drawn; None where the step draws its own.
    """

    graph: fx.GraphModule
    inputs: list[Tensor]
    noises: list[Noise] | None


class CompiledStep:
    """Compiled code as steps: many to a call in a native loop where that is possible, else one by one.

    Args:
        fn: The compiled function.
        fixed: Its first inputs, which stay where they are.
        moving: Examples of the others.
        noises: How the noise among them is drawn; None where the code draws its own.
        num_mutable: How many of the first inputs a step changes.

    Attributes:
        reason: Why steps are called one by one; empty where they are not.
    """

    def __init__(
        self,
        fn: Callable[..., Sequence[Tensor]],
        fixed: list[Tensor],
        moving: list[Tensor],
        noises: list[Noise] | None,
        num_mutable: int,
    ) -> None:
        self.noises, self.reason = noises, ""
        self._fixed = fixed
        self._fn: Callable[..., Sequence[Tensor]] = fn
        self._native: NativeLoop | None = None
        if fixed[0].is_cuda:
            self._fn = CudaReplay(fn, [*fixed, *moving], range(len(fixed), len(fixed) + len(moving)))
        elif noises is None:
            self.reason = "one step a call, because the program draws random numbers that depend on data"
        else:
            try:
                self._native = self._checked(moving, fixed[:num_mutable])
            except NotNative as refusal:
                self.reason = f"one step a call, because {refusal}"

    def _checked(self, moving: list[Tensor], mutable: list[Tensor]) -> NativeLoop:
        """The native loop, once it has given the bits of the function that it repeats."""

        def inputs() -> list[Tensor]:
            """At the start of memory of their own, not slices of an epoch; a step may write to its noise."""
            return [*self._fixed, *(m.clone() for m in moving)]

        native = NativeLoop(self._fn, inputs(), len(moving))
        with unchanged(mutable):
            expected = [t.clone() for t in (*self._fn(*inputs()), *mutable)]
        with unchanged(mutable):
            found = [*native([m.clone()[None] for m in moving]), *mutable]
            same = all(torch.equal(a.nan_to_num(), b.reshape(a.shape).nan_to_num()) for a, b in zip(expected, found))
        if not same:
            raise NotNative("its native loop gave other numbers")
        return native

    def draw(self, steps: int) -> list[Tensor]:
        """Noise of so many steps, ``(steps, *shape)`` each, from the default generator."""
        return [noise.draw(steps) for noise in self.noises or ()]

    def __call__(self, index: Tensor | None, s: Tensor, noise: list[Tensor]) -> list[Tensor]:
        """As many steps as ``s`` has rows, with their row indices ``(steps, B)`` and noise; outputs ``(steps,)``."""
        moving = [*([] if index is None else [index]), s, *noise]
        if self._native is not None:
            return self._native(moving)
        outputs = [self._fn(*self._fixed, *(m[i] for m in moving)) for i in range(len(s))]
        return [torch.stack(column) for column in zip(*outputs)]
