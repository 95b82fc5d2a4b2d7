r"""The training loop."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..contracts import Batch, DataSource, Run, check_choice, check_positive, spoken
from ..data.arrays import fingerprint, is_source, num_rows
from ..data.batches import Batches, key, step_keys
from ..data.stored import Feed
from ..programs import keyed_rng, rows_at, seed_generators
from .autopsy import ADVICE
from .callbacks import Callback
from .capture import BackgroundCompile, CaptureRefused, CompileFailed, compile_graph
from .checkpoint import ANY, Checkpoint, check_same, pack, unpack
from .converge import EVALUATIONS, Average, Converge
from .heap import heap_kept
from .interruption import Interruption, Stop
from .kernels import by_rule
from .optim import External, from_torch, internal
from .parallel import Workers
from .progress import Progress
from .schedule import Schedule, multiplier
from .step import CompiledStep, Player, Step, unchanged

__all__ = ["NonFinite", "Training", "augmented", "fit", "moves", "players"]

_TIERS = ("auto", "eager", "graph", "compiled")
_SAME = ("precision", "clip_norm", "ema", "early_stopping", "stop", "tolerance", "average")
"""Options that a resumed run must share with the run that it resumes."""
_PRECISIONS = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.float32}
BLOCK_SECONDS = 0.2
"""Target length of a block of steps between two looks at the device."""
CAPTURE_WORTH_SECONDS = 2.0
"""A fit whose remaining eager time is shorter than this is not worth capturing."""
COMPILE_WORTH_SECONDS = 20.0
"""A fit whose remaining graph time is shorter than this is not worth compiling."""
CHECKPOINT_SECONDS = 10.0
"""Time between checkpoints unless told otherwise; longer where writing one takes more than a twentieth of that."""
REUSE_WORTH_SECONDS = 3.0
"""The same, where an earlier run has left the compiled step in the compiler's cache."""
TRIAL_BLOCKS, SLOWER = 10, 1.05
"""Blocks that compiled steps are tried for under ``compile="auto"``, and what a step may take of the graph's before they are
left again: the fastest block of each counts."""
WORK_A_CALL = 200_000_000
"""Parameters times rows of the steps that share a call: what the call itself costs is then little beside them."""
MOST_STEPS_A_CALL = 64
RECOUNTED = 20
"""Batches over which batch normalisation's statistics are taken anew where parameters have been averaged."""


class NonFinite(FloatingPointError):
    """Training met non-finite losses or gradients several times in a row; parameters are those of the last good step.

    Attributes:
        run: The run up to there.
    """

    run: Run


@dataclass(frozen=True)
class Training:
    """How to train: what is neither the model, the objective nor the optimizer.

    Args:
        device: ``"auto"`` (a GPU if there is one), ``"cpu"``, ``"cuda"``, ``"cuda:1"``...
        precision: ``"float32"``, ``"float64"``, or ``"bfloat16"`` (autocast: float32 parameters, bfloat16 products).
        compile: ``"auto"`` starts at once and takes faster tiers as they become ready; ``"eager"``, ``"graph"`` and
            ``"compiled"`` settle the tier before the first step. Compiled steps that are slower are left again.
        deterministic: With ``compile="auto"``, settle the tier before the first step, so that runs agree to the bit; on
            several processes, add gradients in one order, so that runs on any number of them agree to the bit too.
        clip_norm: Largest Euclidean norm of the gradient.
        ema: Decay of an exponential moving average of the parameters, which the model holds after training. It rises to this
            value, min(ema, (1 + t) / (10 + t)) at step t, so that the average of a short fit is not that of its start.
        schedule: Of the learning rate; see ``training.schedule.multiplier``.
        early_stopping: Validations without a better bound before stopping; the best parameters are restored. None means 20
            where there are validation data, 0 never stops early.
        validate_every: Steps between validations; None for about 50 in all, never more often than once an epoch.
        max_nonfinite: Non-finite steps in a row before training stops.
        augment: A random function of each batch of x, drawn anew at every step: ``torch.bernoulli`` binarises grey images.
        stop: ``"steps"`` (when all are done), or ``"converged"``: the learning rate is halved whenever the iterates are
            stationary (split R-hat below 1.1), training ends when a halving no longer raises the bound, and the mean of the
            last iterates is kept. The steps are then the most that it may take.
        tolerance: What a halving must gain under ``stop="converged"``, nats a datum; None for 0.005, or 0.05 nats in all
            for a pair.
        average: Steps at the end whose iterates' mean is kept, unless it makes the bound worse.
        unroll: Most steps in one call of compiled code; they share the key of their noise. None to choose by size.
        checkpoint_every: Steps between checkpoints; None for one about every ten seconds, and rarer where writing one takes
            more than a twentieth of the time. The last state is always written, at Ctrl-C and SIGTERM too.
        micro_batches: Parts that a step's batch is cut into, each with noise of its own; several processes share them out.
            What is trained depends on it and not on the number of processes. None means one a process, or those of the
            checkpoint that is resumed.
        timeout: Seconds that one process waits for another before it gives up.
    """

    device: str = "auto"
    precision: str = "float32"
    compile: str = "auto"
    deterministic: bool = False
    clip_norm: float | None = None
    ema: float | None = None
    schedule: Schedule = None
    early_stopping: int | None = None
    validate_every: int | None = None
    max_nonfinite: int = 5
    augment: Callable[[Tensor], Tensor] | None = None
    stop: str = "steps"
    tolerance: float | None = None
    average: int | None = None
    unroll: int | None = None
    checkpoint_every: int | None = None
    micro_batches: int | None = None
    timeout: float = 600.0

    def __post_init__(self) -> None:
        check_choice("compile", self.compile, _TIERS)
        check_choice("precision", self.precision, tuple(_PRECISIONS))
        check_positive("clip_norm", self.clip_norm, allow_none=True, integer=False)
        check_positive("validate_every", self.validate_every, allow_none=True)
        check_positive("unroll", self.unroll, allow_none=True)
        check_positive("max_nonfinite", self.max_nonfinite)
        check_positive("checkpoint_every", self.checkpoint_every, allow_none=True)
        check_positive("micro_batches", self.micro_batches, allow_none=True)
        check_positive("timeout", self.timeout, integer=False)
        check_choice("stop", self.stop, ("steps", "converged"))
        check_positive("tolerance", self.tolerance, allow_none=True, integer=False)
        check_positive("average", self.average, allow_none=True)
        if self.average is not None and self.average < 16:
            raise ValueError(
                f"`average` is the number of last steps whose iterates are averaged, 16 or more, got {self.average}"
            )
        if self.stop == "converged" and self.schedule not in (None, "constant"):
            raise ValueError("stop='converged' lowers the learning rate by itself; leave `schedule` out")
        if self.ema is not None and (self.average is not None or self.stop == "converged"):
            raise ValueError(
                "`ema` is an average of iterates already; leave it out, or leave out `average` and stop='converged'"
            )
        if self.early_stopping is not None and self.early_stopping != 0:
            check_positive("early_stopping", self.early_stopping)
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"`ema` is a decay in (0, 1), such as 0.999, got {self.ema}")

    @property
    def dtype(self) -> torch.dtype:
        """Of parameters and floating-point data."""
        return _PRECISIONS[self.precision]

    def torch_device(self) -> torch.device:
        """The device that ``device`` names."""
        if self.device == "auto":
            return _own_gpu() if torch.cuda.is_available() else torch.device("cpu")
        try:
            device = torch.device(self.device)
        except RuntimeError as error:
            raise ValueError(f"`device` is {self.device!r}, which torch does not know; use 'auto', 'cpu' or 'cuda'") from error
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"`device` is {self.device!r}, but torch sees no GPU; use device='cpu' or 'auto'")
        return device if device.type != "cuda" or device.index is not None else _own_gpu()


def _own_gpu() -> torch.device:
    """The GPU of this process: torchrun numbers the processes of a machine."""
    return torch.device("cuda", int(os.environ["LOCAL_RANK"])) if "LOCAL_RANK" in os.environ else torch.device("cuda")


class Trainable(Protocol):
    """What the loop needs of a model."""

    def trainable(self, player: str = "") -> list[nn.Parameter]: ...

    def changing(self) -> list[Tensor]: ...

    def loss(self, objective: Any, batch: Batch, scalars: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]: ...

    def bound_rows(self, objective: Any, batch: Batch, pause: Callable[[], None]) -> tuple[Tensor, Tensor]: ...

    def python_state(self) -> dict[str, str]: ...

    def autopsy(self, batch: Batch, index: Tensor | None) -> str: ...

    def identity(self) -> str: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def modules(self) -> Iterator[nn.Module]: ...


@dataclass
class _Plan:
    """How long and how often."""

    steps: int
    batches: int
    validate_every: int

    @classmethod
    def make(cls, batches: int, epochs: float | None, steps: int | None, training: Training) -> _Plan:
        total = steps if steps is not None else max(1, round((epochs or 1) * batches))
        every = training.validate_every or max(batches, math.ceil(total / 50 / batches) * batches)
        return cls(total, batches, every)


def _mean(values: np.ndarray) -> float:
    """Mean of the finite values; NaN if there are none."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else math.nan


@dataclass
class _Log:
    """Columns of the history, and the validation table."""

    columns: dict[str, list[np.ndarray]] = field(default_factory=dict)
    validation: dict[str, list[float]] = field(default_factory=lambda: {"step": [], "bound": [], "std_error": []})

    def add(self, **columns: np.ndarray) -> None:
        for name, values in columns.items():
            self.columns.setdefault(name, []).append(np.atleast_1d(values))

    def history(self) -> dict[str, np.ndarray]:
        return {name: np.concatenate(parts) for name, parts in self.columns.items()}

    def trend(self) -> float:
        """Change of the bound a thousand steps, over the last half of a window of blocks."""
        loss = np.concatenate(self.columns["loss"][-10:])
        if len(loss) < 4:
            return 0.0
        half = len(loss) // 2
        return (_mean(loss[:half]) - _mean(loss[half:])) / half * 1000


def _kind_of_bits(training: Training) -> str:
    """Tiers that give the same bits: eager and graph do; a tier chosen by the clock promises none."""
    if training.compile == "auto" and not training.deterministic:
        return ANY
    return "compiled" if training.compile in ("auto", "compiled") else "eager or graph"


def _bernoulli(x: Tensor) -> Tensor:
    """``torch.bernoulli`` from uniform numbers, which compiled steps can take as an input."""
    return (torch.rand_like(x) < x).to(x.dtype)


def augmented(batch: Batch, augment: Callable[[Tensor], Tensor] | None) -> Batch:
    """The batch with its first tensor (``"x"`` of a dict that has one) replaced by a random function of it."""
    if augment is None:
        return batch
    augment = _bernoulli if augment is torch.bernoulli else augment
    if isinstance(batch, dict):
        name = "x" if "x" in batch else next(iter(batch))
        return {**batch, name: augment(batch[name])}
    return (augment(batch[0]), *batch[1:]) if isinstance(batch, tuple) else augment(batch)


def _trained(state: nn.Module | None) -> list[nn.Parameter]:
    """Parameters of an objective's own state, trained beside the model's."""
    return [] if state is None else [p for p in state.parameters() if p.requires_grad]


def players(objective: Any) -> dict[str, Any]:
    """The objective of each player by name; one without a name where it has none."""
    return dict(getattr(objective, "players", {})) or {"": objective}


def moves(objective: Any) -> int:
    """How often a player moves in a step; of an objective with several, the one that moves most often."""
    return max(int(getattr(part, "moves", 1)) for part in players(objective).values())


def takes_whole_batches(objective: Any) -> bool:
    """Whether what is left of an epoch once no batch can be filled is left out."""
    return bool(getattr(objective, "whole_batches", False)) or moves(objective) > 1


def _buffers(objective: Any) -> list[Tensor]:
    state = getattr(objective, "state", None)
    return [] if state is None else list(state.buffers())


class _Loop:
    """State of one fit."""

    def __init__(
        self,
        target: Trainable,
        data: Batch | DataSource,
        objective: Any,
        optimizer: Any,
        training: Training,
        workers: Workers,
        *,
        batch_size: int,
        total: int,
        seed: int,
    ) -> None:
        self.workers = workers
        self.target, self.objective, self.training, self.seed = target, objective, training, seed
        self.device = training.torch_device()
        self.data = data
        self.feed = None
        whole = takes_whole_batches(objective)
        if is_source(data) and workers.world > 1 and moves(objective) > 1:
            raise ValueError("a player that moves several times a step needs data in memory where several processes train")
        if is_source(data):
            share = workers.share if workers.world > 1 else None
            self.feed = Feed(data, batch_size, seed, device=self.device, dtype=training.dtype, share=share, whole=whole)
        self.leaves, self.spec = tree_flatten(data if self.feed is None else self.feed.resident)
        self.sliced = [i for i, leaf in enumerate(self.leaves) if isinstance(leaf, Tensor) and leaf.dim() > 0]
        self.resident_rows = len(self.leaves[self.sliced[0]])
        self.num_data = self.resident_rows if self.feed is None else len(self.feed.source)
        self.batch_size = batch_size
        self.full = batch_size >= self.num_data and workers.micro_batches == 1
        self.batches = self.feed or Batches(self.num_data, batch_size, seed=seed, device=self.device, whole=whole)
        self.schedules: dict[str, Callable[[int, int], float]] = dict(getattr(objective, "schedules", {}))
        self.total = total
        for tensor in (*target.trainable(), *target.changing()):
            if not tensor.is_contiguous():  # fused kernels walk memory row after row
                tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)
        found = self._players(objective, optimizer)
        self.optimizer = found[0].optimizer
        self.rates = [multiplier(training.schedule, player.optimizer.lr, total) for player in found]
        self.step = Step(
            found, target.changing() + _buffers(objective), self.tensors(), scheduled=len(self.schedules),
            clip_norm=training.clip_norm, ema=training.ema,
        )  # fmt: skip
        self.noise_key, self.block_key = key(seed, "noise"), key(seed, "noise of blocks")
        self.runners: dict[int, Callable[[Tensor | None, Tensor], list[Tensor]]] = {}
        self.tier, self.reason = "eager", ""
        self.interruption = Interruption(alone=workers.world == 1)

    def _players(self, objective: Any, optimizer: Any) -> list[Player]:
        """The objective's players, each with its own parameters and optimizer; one without a name if it has none."""
        games = players(objective)
        optimizers = optimizer if isinstance(optimizer, dict) else dict.fromkeys(games, optimizer)
        if set(optimizers) != set(games) or ("" in optimizers and isinstance(optimizer, dict)):
            raise ValueError(
                f"`optimizer` has {', '.join(map(repr, optimizers)) or 'nothing'}, but the objective's players are "
                f"{', '.join(map(repr, games)) if '' not in games else 'one, without a name: give one optimizer'}"
            )
        found = []
        for name, part in games.items():
            params = self.target.trainable(name) + _trained(getattr(part, "state", None))
            own = from_torch(optimizers[name])
            if isinstance(own, External):
                own.bind(params)
                own = internal(own, params)
            found.append(Player(functools.partial(self._loss, part), params, own, name, moves(part)))
        return found

    # -- pieces of a step ---------------------------------------------------------------------------------------------

    def tensors(self) -> list[Tensor]:
        """What a step gathers its rows from; of a source, the rows at hand and their numbers."""
        return [self.leaves[i] for i in self.sliced] + ([] if self.feed is None else [self.feed.numbers])

    def load(self, step: int, count: int) -> None:
        """Have the rows of some steps at hand."""
        if self.feed is not None:
            self.feed.load(step, count)

    def rows(self, tensors: Sequence[Tensor], index: Tensor | None) -> Tensor | None:
        """Numbers of the rows of a batch in the data; None for all rows in order."""
        return index if self.feed is None or index is None else tensors[-1].index_select(0, index)

    @cached_property
    def fingerprint(self) -> str:
        """Of the data."""
        return fingerprint(self.data)

    def batch(self, tensors: Sequence[Tensor], index: Tensor | None) -> Batch:
        """The rows at ``index`` in the data's own structure, augmented."""
        leaves = list(self.leaves)
        for i, tensor in zip(self.sliced, tensors):
            leaves[i] = tensor if index is None else tensor.index_select(0, index)
            if index is None and self.training.augment is not None:
                leaves[i] = tensor.clone()  # an augmentation may write to what it is given
        return augmented(tree_unflatten(leaves, self.spec), self.training.augment)

    def _loss(
        self, objective: Any, tensors: list[Tensor], index: Tensor | None, scheduled: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        scalars: dict[str, Any] = {"num_data": float(self.num_data)}
        if scheduled is not None:
            scalars |= zip(self.schedules, scheduled.unbind())
        with rows_at(self.rows(tensors, index)), self._autocast():
            return self.target.loss(objective, self.batch(tensors, index), scalars)

    def _autocast(self) -> Any:
        enabled = self.training.precision == "bfloat16"
        if not enabled and not torch.is_autocast_enabled(self.device.type):
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled)

    def index(self, step: int) -> Tensor | None:
        """Row indices of a step; None for all rows in order."""
        return None if self.full else self.batches.indices(step)

    def indices(self, step: int, count: int) -> Tensor:
        """Row indices of up to ``count`` steps with whole batches, all of one epoch, ``(steps, batch_size)``."""
        position = step % len(self.batches)
        last = min(position + count, len(self.batches))
        rows = [self.index(step + i) for i in range(last - position)]
        whole = [r for r in rows if r is not None and len(r) == self.batch_size]
        return torch.stack(whole) if whole else torch.empty(0, self.batch_size, dtype=torch.int64)

    def scalars(self, start: int, count: int) -> Tensor:
        """What depends on the step alone, ``(count, scalars)``: each player's, the scheduled ones, the average's."""
        steps = np.arange(start, start + count)
        columns = []
        for number, _, before in self.step.turns:
            player = self.step.players[number]
            lr = player.optimizer.lr * self.rates[number](steps)
            taken = steps * player.moves + before  # updates of its own
            columns.append(lr[:, None] if player.external else player.optimizer.scalars(taken, lr))
        for schedule in self.schedules.values():
            columns.append(np.array([[float(schedule(int(t), self.total))] for t in steps]))
        columns.append(self.step.averaging(steps))
        return torch.from_numpy(np.concatenate(columns, 1)).to(self.training.dtype).to(self.device)

    def watch(self) -> Average | None:
        """What looks at the iterates, where that is asked for."""
        training = self.training
        if training.stop == "steps" and training.average is None:
            return None
        if len(self.step.players) > 1 or self.schedules:
            raise ValueError("`stop='converged'` and `average` need one loss that does not change from step to step")
        if self.workers.micro_batches > 1:
            raise ValueError("`stop='converged'` and `average` need one process and one micro-batch")
        if training.stop == "steps":
            return Average(self.step.values, self.fixed_losses, self.total, cast(int, training.average))
        monitor = Converge(self.step.values, self.fixed_losses, training.tolerance or 0.005)
        self.rates = [lambda steps: np.full(len(steps), monitor.rate)]
        return monitor

    def fixed_losses(self) -> Tensor:
        """Losses at the parameters as they are, on batches and draws that are always the same, ``(M,)``, nats a datum."""
        losses = []
        with torch.no_grad(), unchanged(self.step.buffers):
            for number in range(EVALUATIONS):
                batch = number % max(1, self.num_data // self.batch_size)
                self.load(batch, 1)
                seed_generators(key(self.seed, "fixed", number), self.device)
                losses.append(self.step.loss(self.index(batch)))
        return torch.stack(losses)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Hold the parameters that would be kept if training ended now, with statistics of their own."""
        step = self.step
        if not step.ema:
            yield
            return
        with unchanged(step.buffers), _swapped(step.values, step.ema):
            self.recount()
            yield

    def recount(self) -> None:
        """Take batch normalisation's statistics anew: those at hand belong to parameters of other steps."""
        norms = [m for m in self.target.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
        statistics = [b for m in norms for b in m.buffers()]
        momenta, own, kept = [m.momentum for m in norms], set(map(id, statistics)), [b.clone() for b in statistics]
        for m in norms:
            m.reset_running_stats()
            m.momentum = None  # a plain mean over batches
        try:
            with keyed_rng(0, self.device), unchanged([b for b in self.step.buffers if id(b) not in own]), torch.enable_grad():
                for number in range(RECOUNTED if norms else 0):
                    before = [b.clone() for b in statistics]
                    self._loss_at(number % len(self.batches), key(self.seed, "recount", number))
                    if not all(bool(torch.isfinite(b).all()) for b in statistics):  # the batch of a step that was skipped
                        _copy(statistics, before)
            if norms and not any(int(cast(Tensor, m.num_batches_tracked)) for m in norms):
                _copy(statistics, kept)
        finally:
            for m, momentum in zip(norms, momenta):
                m.momentum = momentum

    def _loss_at(self, step: int, noise: int) -> None:
        """Run every player's loss on the rows of a step, for what that leaves behind in buffers."""
        self.load(step, 1)
        scheduled = self.step.split_scalars(self.scalars(step, 1)[0])[1]
        for player in self.step.players:
            seed_generators(noise, self.device)
            player.loss(self.step.leaves, self.step.share(self.index(step), 0), scheduled)

    def learning_rates(self, steps: np.ndarray) -> np.ndarray:
        """The first player's learning rate at some steps (from 0)."""
        return self.optimizer.lr * self.rates[0](steps)

    # -- tiers --------------------------------------------------------------------------------------------------------

    def runner(self, index: Tensor | None, step: int) -> Callable[[Tensor | None, Tensor], list[Tensor]]:
        """The step for batches of this length in the tier at hand."""
        if self.workers.micro_batches > 1:
            return functools.partial(self._divided, step)
        if self.tier == "eager":
            return self.step.eager
        length = -1 if index is None else len(index)
        if length not in self.runners:
            with keyed_rng(0, self.device):  # capturing seeds the generators: give the step its own noise back
                self.runners[length] = self.step.graph(index, self._other(index))
        return self.runners[length]

    def _divided(self, step: int, index: Tensor | None, s: Tensor) -> list[Tensor]:
        """The step in micro-batches: this process's own, added to those of the others between gradient and update."""
        assert index is not None
        noise = step_keys(self.noise_key, step, 1)[0]

        def run(turn: int, scheduled: Tensor | None) -> list[Tensor]:
            return self.workers.gradients(
                lambda part: self.step.gradients(self.step.turns[turn][0], part, scheduled),
                cast(Tensor, self.step.share(index, turn)),
                lambda number: seed_generators(key(noise, turn, number), self.device),
                self.step.buffers,
            )

        return self.step.update(run, s)

    def pieces(self, step: int) -> list[tuple[int, Tensor | None]]:
        """What this process runs in a step: keys of the noise (of the first move) and rows."""
        noise, index = step_keys(self.noise_key, step, 1)[0], self.index(step)
        shares = [self.step.share(index, turn) for turn in range(self.step.shares)]
        if index is None or self.workers.micro_batches == 1:
            return [(noise, share) for share in shares]
        parts = [(number, self.workers.rows(cast(Tensor, share), number)) for share in shares for number in self.workers.own]
        return [(key(noise, 0, number), rows) for number, rows in parts]

    def _capture(self, step: int) -> None:
        """Capture what a step's batch needs: the whole step, or its gradient for each length of a micro-batch."""
        index = self.index(step)
        if self.workers.micro_batches == 1:
            self.runner(index, step)
            return
        for _, part in self.pieces(step):
            with keyed_rng(0, self.device):
                self.step.captured(part, self._other(part))

    def _other(self, index: Tensor | None) -> Tensor | None:
        """Indices of another batch of the same length, to capture on a second time."""
        if index is None:
            return None
        rows = torch.arange(len(index), device=index.device)
        return (index + 1 + rows) % self.resident_rows

    def close(self) -> None:
        """Fetch no more rows."""
        if self.feed is not None:
            self.feed.close()

    def raise_to_graph(self, step: int) -> bool:
        """Capture, for the ragged last batch too; on refusal stay eager and remember why."""
        first = step // len(self.batches) * len(self.batches)
        before = self.target.python_state()
        try:
            self.tier = "graph"
            for number in (first, first + len(self.batches) - 1):
                self.interruption.check()
                self._capture(number)
            after = self.target.python_state()
            changed = sorted(name for name in before if before[name] != after.get(name))
            if changed:
                raise CaptureRefused(
                    f"the programs change the Python value {changed[0]!r} as they run, which a graph would freeze; "
                    "what depends on the step alone can be a schedule of the objective"
                )
            return True
        except CaptureRefused as refusal:
            self.tier, self.reason = "eager", str(refusal)
            return False


class _Compilation:
    """The compiled tier, made beside training or waited for.

    Where the noise of a step is an input, up to ``unroll`` steps share a call and the key of their noise: step t is row
    t mod ``unroll`` of block t div ``unroll``, wherever calls begin and end.
    """

    def __init__(self, loop: _Loop, step: int, unroll: int, wait: bool) -> None:
        self._loop = loop
        first = step // len(loop.batches) * len(loop.batches)  # of its epoch, and therefore a whole batch
        self._traced = loop.step.traced(loop.index(first), loop.scalars(step, 1)[0])
        self.unroll = 1 if self._traced.noises is None else unroll
        self._block, self._noise = -1, list[Tensor]()
        self._step: CompiledStep | None = None
        self._work: BackgroundCompile | None = None
        if not wait:
            self._work = BackgroundCompile(self._traced.graph, self._traced.inputs)
            return
        try:
            with loop.interruption.cutting():
                compiled = compile_graph(self._traced.graph, self._traced.inputs)
            self._take(compiled)
        except CompileFailed as failure:
            loop.reason = str(failure)

    def _take(self, fn: Callable[..., Sequence[Tensor]]) -> None:
        self._step = self._loop.step.bind(fn, self._traced)
        self._loop.tier, self._loop.reason = "compiled", self._step.reason
        with contextlib.suppress(OSError):  # a cache that cannot be written only costs time at the next run
            marker = self._loop.step.marker()
            marker.parent.mkdir(parents=True, exist_ok=True)
            marker.touch()

    def poll(self) -> None:
        """Take the compiled step over if it is ready."""
        if self._work is None:
            return
        fn, reason = self._work.result(), self._work.reason
        if fn is not None or reason:
            self._loop.reason, self._work = reason, None
        if fn is not None:
            self._take(fn)

    def run(self, step: int, limit: int, table: Tensor) -> tuple[int, list[Tensor]] | None:
        """As many steps from ``step`` on as one call takes, at most ``limit``, with their outputs; None if there are none.

        Args:
            step: The first step.
            limit: Most steps to take.
            table: Scalars of the steps from ``step`` on.
        """
        loop, at = self._loop, step % self.unroll
        if self._step is None:
            return None
        limit = limit if loop.feed is None else min(limit, loop.feed.span)
        index = None if loop.full else loop.indices(step, min(limit, self.unroll - at))
        count = min(limit, self.unroll - at) if index is None else len(index)
        if count == 0:
            return None
        loop.load(step, count)
        noise = [n[at : at + count] for n in self._noise_of(step // self.unroll)]
        return count, self._step(index, table[:count], noise)

    def _noise_of(self, block: int) -> list[Tensor]:
        """The noise of a block of steps, and the generator seeded with its key."""
        if block != self._block or not self._noise:
            loop = self._loop
            own = loop.noise_key if self.unroll == 1 else loop.block_key  # a block is no step
            seed_generators(step_keys(own, block, 1)[0], loop.device)
            self._block, self._noise = block, self._step.draw(self.unroll)  # type: ignore[union-attr]
        return self._noise

    def cancel(self) -> None:
        """Nobody waits for it any more."""
        if self._work is not None:
            self._work.cancel()


class _GradientCompilation:
    """The compiled tier of a step in micro-batches: of their gradients. Adding them up, and the update, stay outside."""

    def __init__(self, loop: _Loop, step: int, wait: bool) -> None:
        self._loop = loop
        self._works: dict[tuple[int, int], BackgroundCompile] = {}
        s = loop.scalars(step, 1)[0]
        parts = {len(part): part for _, part in loop.pieces(step) if part is not None}
        try:
            for player, (length, part) in itertools.product(range(len(loop.step.players)), parts.items()):
                traced = loop.step.traced_gradients(player, part, s)
                if wait:
                    with loop.interruption.cutting():
                        loop.step.take_gradients(player, length, compile_graph(*traced))
                else:
                    self._works[player, length] = BackgroundCompile(*traced)
        except CompileFailed as failure:
            loop.reason = str(failure)
            return
        if wait:
            loop.tier = "compiled"

    def poll(self) -> None:
        """Take over what is ready."""
        for known, work in list(self._works.items()):
            fn, reason = work.result(), work.reason
            if fn is not None:
                self._loop.step.take_gradients(*known, fn)
            if fn is not None or reason:
                self._loop.reason = self._loop.reason or reason
                del self._works[known]
                self._loop.tier = "graph" if self._works or self._loop.reason else "compiled"

    def run(self, step: int, limit: int, table: Tensor) -> None:
        """No whole step is compiled."""

    def cancel(self) -> None:
        """Nobody waits for it any more."""
        for work in self._works.values():
            work.cancel()


def fit(
    target: Trainable,
    data: Batch | DataSource,
    *,
    validation: Batch | None,
    objective: Any,
    optimizer: Any,
    training: Training,
    epochs: float | None,
    steps: int | None,
    batch_size: int,
    seed: int,
    callbacks: Sequence[Callback],
    progress: bool,
    run: Run,
    checkpoint: Checkpoint | None = None,
    workers: Workers | None = None,
) -> None:
    """Train ``target`` and write into ``run``; see ``GenerativeModel.fit`` for the arguments, which are checked there."""
    num_data = num_rows(data)
    batches = num_data // batch_size if takes_whole_batches(objective) else math.ceil(num_data / batch_size)
    plan = _Plan.make(batches, epochs, steps, training)
    loop = _Loop(
        target, data, objective, optimizer, training, workers or Workers(), batch_size=batch_size, total=plan.steps, seed=seed
    )
    run.num_data, run.seed = num_data, seed
    trainer = _Trainer(loop, plan, validation, callbacks, progress, checkpoint, run)
    with (
        keyed_rng(key(seed, "fit"), loop.device),
        by_rule(training.deterministic),
        heap_kept(loop.device),
        trainer.interruption,
    ):
        try:
            trainer.train()
        finally:
            loop.close()
    where = "" if checkpoint is None else f"; the same call goes on from {checkpoint.folder}"
    trainer.interruption.deliver(f"fit ended after step {run.steps} of {plan.steps}: {run.stopped}{where}")


class _Trainer:
    """Runs blocks of steps between looks at the device, validations and tier changes."""

    def __init__(
        self,
        loop: _Loop,
        plan: _Plan,
        validation: Batch | None,
        callbacks: Sequence[Callback],
        progress: bool,
        checkpoint: Checkpoint | None,
        run: Run,
    ) -> None:
        self.checkpoint, self.run, self.interruption = checkpoint, run, loop.interruption
        self.loop, self.plan, self.validation, self.workers = loop, plan, validation, loop.workers
        self.callbacks = callbacks if self.workers.leads else ()
        self.log, self.bar = _Log(), Progress(plan.steps, progress and self.workers.leads)
        self.done, self.skipped, self.skipped_in_row = 0, 0, 0
        self._measure_anew()
        self.graph_seconds = math.inf
        self.compilation: _Compilation | _GradientCompilation | None = None
        self.best: tuple[float, list[Tensor]] | None = None
        self.stopped = ""
        self.bad_validations = 0
        self.warned, self.looked = set[str](), 0
        self.saved = (0, -1, "")
        self.start = self.saved_time = time.perf_counter()
        self.write_seconds = 0.0
        self.monitor = loop.watch()
        patience = loop.training.early_stopping
        usual = 20 if validation is not None and self.monitor is None and getattr(loop.objective, "selects", True) else 0
        self.patience = usual if patience is None else patience

    def train(self) -> None:
        """The whole fit."""
        for callback in self.callbacks:
            callback.on_start(self.run)
        try:
            with torch.no_grad():
                self._resume()
                self._steps()
                self._save_last()
                if self.monitor is not None and self.best is None:
                    self.run.stopped += self.monitor.finish()
                self.workers.largest(0)  # nobody leaves before everything is written
        finally:
            self.bar.close()
            self._finish()
            self._show_last()
            for callback in self.callbacks:
                callback.on_end(self.run)

    def _steps(self) -> None:
        """Blocks, validations and checkpoints until the end or a signal."""
        try:
            if not self.stopped and self._left():
                self._settle()
            while not self.stopped and self._left():
                self._agree()
                self.interruption.check()
                if self._validation_due():
                    self.stopped = self._judge(self._validate())
                else:
                    self._advance()
                    if self.monitor is not None:
                        self.stopped = self.monitor.look(self.done, self.log.history()["loss"])
                self._save()
        except Stop:
            pass
        words = f"interrupted ({self.interruption.name})" if self._left() else f"all {self.plan.steps} steps done"
        self.run.stopped = self.stopped or words

    def _agree(self) -> None:
        """Have a signal that one process noted stop all of them before the same step."""
        if self.workers.world > 1:
            self.interruption.take(*self.workers.largest(self.interruption.noted or 0))

    def _left(self) -> bool:
        return self.done < self.plan.steps or self._validation_due()

    # -- checkpoints --------------------------------------------------------------------------------------------------

    @cached_property
    def _configuration(self) -> dict[str, Any]:
        """What must be the same for a resumed run to be the same run."""
        from .. import __version__

        loop, training = self.loop, self.loop.training
        schedule = training.schedule if isinstance(training.schedule, (str, type(None))) else "own"
        augment = training.augment
        return {
            "model": loop.target.identity(),
            "objective": repr(loop.objective) if "object at" not in repr(loop.objective) else type(loop.objective).__name__,
            "optimizer": " ".join(repr(player.optimizer) for player in loop.step.players),
            "batch_size": loop.batch_size,
            "seed": loop.seed,
            "schedule": schedule,
            "steps": self.plan.steps if schedule not in (None, "constant") or loop.schedules or training.average else ANY,
            **{name: getattr(training, name) for name in _SAME},
            "validate_every": self.plan.validate_every if self.validation is not None else ANY,
            "augment": None if augment is None else getattr(augment, "__qualname__", type(augment).__name__),
            "compile": _kind_of_bits(training),
            "unroll": training.unroll or self._unroll() if _kind_of_bits(training) == "compiled" else ANY,
            "device": loop.device.type,
            "micro_batches": loop.workers.micro_batches,
            "data": loop.fingerprint,
            "validation": None if self.validation is None else fingerprint(self.validation),
            "pgen": __version__,
            "torch": str(torch.__version__),
        }

    def _save(self) -> None:
        """Write a checkpoint where one is due; where it cannot be written, say so and train on."""
        if self.checkpoint is None or not self.workers.leads or not self._save_due():
            return
        self._check_parameters()
        self.saved, self.saved_time = (self.done, -1, ""), time.perf_counter()
        try:
            self._write(self.checkpoint)
        except OSError as error:
            words = "what was saved before is intact; training goes on and will try again"
            warnings.warn(f"no checkpoint at step {self.done}: {error}; {words}", stacklevel=2)

    def _save_due(self) -> bool:
        """Every ``checkpoint_every`` steps; by default by the clock, at a twentieth of the time at most."""
        if self.stopped or not self._left():
            return False
        every = self.loop.training.checkpoint_every
        if every is not None:
            return self.done - self.saved[0] >= every
        return time.perf_counter() - self.saved_time > max(CHECKPOINT_SECONDS, 20 * self.write_seconds)

    def _save_last(self) -> None:
        """The state at the end, or at a signal: where it cannot be written the fit ends with the error."""
        self._check_parameters()
        if self.checkpoint is not None and self.workers.leads and self.saved != self._moment():
            self._write(self.checkpoint)

    def _moment(self) -> tuple[int, int, str]:
        return self.done, len(self.log.validation["step"]), self.stopped

    def _write(self, checkpoint: Checkpoint) -> None:
        began, step = time.perf_counter(), self.loop.step
        tensors = {f"step.{i}": t for i, t in enumerate(step.mutable())}
        if self.best is not None:
            tensors |= {f"best.{i}": t for i, t in enumerate(self.best[1])}
        external = [pack(player.optimizer.state_dict(), "optimizer", tensors) for player in step.players if player.external]
        watched: tuple[dict[str, Tensor], dict[str, Any]] = ({}, {}) if self.monitor is None else self.monitor.state()
        tensors |= {f"monitor.{name}": t for name, t in watched[0].items()}
        counters = {
            "done": self.done,
            "skipped": self.skipped,
            "skipped_in_row": self.skipped_in_row,
            "bad": self.bad_validations,
            "seconds": began - self.start,
        }
        metadata = {
            "configuration": self._configuration, "counters": counters, "stopped": self.stopped, "external": external,
            "validation": {n: [v if math.isfinite(v) else None for v in c] for n, c in self.log.validation.items()},
            "monitor": watched[1],
            "best": None if self.best is None else self.best[0], "metrics": [player.metric_names for player in step.players],
        }  # fmt: skip
        checkpoint.write(tensors, self.log.history(), metadata)
        self.saved, self.write_seconds = self._moment(), time.perf_counter() - began

    def _resume(self) -> None:
        """Take up the checkpoint, if there is one of the same configuration and data."""
        self._take_up()
        self.workers.align({"step": str(self.done)}, [])

    def _take_up(self) -> None:
        found = None if self.checkpoint is None else self.checkpoint.read()
        if found is None or self.checkpoint is None:
            return
        tensors, history, metadata = found
        check_same(metadata["configuration"], self._configuration, self.checkpoint.path)
        for i, tensor in enumerate(self.loop.step.mutable()):
            tensor.copy_(tensors[f"step.{i}"])
        for player, state in zip((p for p in self.loop.step.players if p.external), metadata["external"]):
            player.optimizer.load_state_dict(unpack(state, tensors))
        if metadata["best"] is not None:
            self.best = metadata["best"], [tensors[f"best.{i}"].to(v) for i, v in enumerate(self._current())]
        if self.monitor is not None:
            found_state = {n.removeprefix("monitor."): t for n, t in tensors.items() if n.startswith("monitor.")}
            self.monitor.restore(found_state, metadata["monitor"])
        counters = metadata["counters"]
        self.done, self.skipped, self.skipped_in_row = counters["done"], counters["skipped"], counters["skipped_in_row"]
        self.bad_validations, self.start = counters["bad"], self.start - counters["seconds"]
        self.log.validation = {n: [math.nan if v is None else v for v in c] for n, c in metadata["validation"].items()}
        self.stopped, self.run.resumed = metadata["stopped"], self.done
        self.saved = self._moment()
        self.log.add(**history)
        for player, names in zip(self.loop.step.players, metadata["metrics"]):
            player.metric_names = names

    # -- tiers --------------------------------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Choose the tier before the first step, where that is asked for."""
        training, loop = self.loop.training, self.loop
        wanted = "compiled" if training.deterministic and training.compile == "auto" else training.compile
        if wanted == "eager":
            loop.reason = "as asked"
        if wanted in ("graph", "compiled") and not loop.raise_to_graph(0) and training.compile != "auto":
            raise ValueError(f"compile={wanted!r} is not possible: {loop.reason}; compile='auto' falls back to eager")
        if wanted == "graph":
            loop.reason = "as asked"
        if wanted == "compiled" and loop.tier == "graph":
            if not self.compiled_before:
                self.bar.quiet = 0.0
                self.bar.at(self.done, "compiling the step, which takes some seconds the first time")
            self._start_compilation(wait=True)

    def _improve(self) -> None:
        """With ``compile="auto"``: capture, then compile beside training, where the time left is worth it."""
        training, loop = self.loop.training, self.loop
        if training.compile != "auto" or training.deterministic or self.done < 3:
            return
        left = (self.plan.steps - self.done) * self.fastest
        if loop.tier == "eager" and not loop.reason:
            if left > CAPTURE_WORTH_SECONDS:
                loop.raise_to_graph(self.done)
                self._measure_anew()
        elif loop.tier == "graph" and self.compilation is None and self.blocks > 2 and not loop.reason:  # first calls are slow
            if left > COMPILE_WORTH_SECONDS or (left > REUSE_WORTH_SECONDS and self.compiled_before):
                self._start_compilation(wait=False)
        elif loop.tier == "graph" and self.compilation is not None:
            self.compilation.poll()
            if loop.tier == "compiled":
                self.graph_seconds = self.fastest
                self._measure_anew()
        elif loop.tier == "compiled" and self.blocks == TRIAL_BLOCKS and self.fastest > SLOWER * self.graph_seconds:
            self._leave_compiled()

    def _leave_compiled(self) -> None:
        """Go back to the graph, which was faster."""
        if isinstance(self.compilation, _Compilation):
            times = f"{1e3 * self.fastest:.3g} ms a step, the graph {1e3 * self.graph_seconds:.3g}"
            self.compilation, self.loop.tier, self.loop.reason = None, "graph", f"compiled code took {times}"
            self._measure_anew()

    def _measure_anew(self) -> None:
        """Another tier, another speed: begin with short blocks."""
        self.block, self.blocks, self.fastest = 1, 0, math.inf

    @cached_property
    def compiled_before(self) -> bool:
        """Whether an earlier process left this step in the compiler's cache."""
        return self.loop.step.marker().exists()

    def _start_compilation(self, wait: bool) -> None:
        for player in self.loop.step.players:
            if player.external:
                self.loop.reason = f"{type(player.optimizer.optimizer).__name__} steps outside the graph"
                return
        unroll = self.loop.training.unroll or self._unroll()
        try:
            if self.workers.micro_batches > 1:
                self.compilation = _GradientCompilation(self.loop, self.done, wait)
            else:
                self.compilation = _Compilation(self.loop, self.done, unroll, wait)
        except CaptureRefused as refusal:
            self.loop.reason = str(refusal)
        if wait and self.loop.tier != "compiled" and self.loop.training.compile == "compiled":
            raise ValueError(f"compile='compiled' is not possible: {self.loop.reason}; compile='auto' takes the graph tier")

    def _unroll(self) -> int:
        """Steps worth putting into one call: many where a step is all overhead. A rule of sizes, not of the clock."""
        work = sum(v.numel() for v in self.loop.step.values) * min(self.loop.batch_size, self.loop.num_data)
        return max(1, min(MOST_STEPS_A_CALL, WORK_A_CALL // max(1, work)))

    # -- blocks -------------------------------------------------------------------------------------------------------

    def _advance(self) -> None:
        """Run a block of steps and write them into the history."""
        self._improve()
        until_validation = self.plan.validate_every - self.done % self.plan.validate_every
        left = self.plan.steps - self.done
        left = left if self.monitor is None else min(left, self.monitor.until_look(self.done))
        count = min(self._until_save(), left, until_validation if self.validation is not None else left, self._until_shown())
        count = -self.workers.largest(-count)[0]  # clocks differ, blocks must not
        began = time.perf_counter()
        count, columns = self._run(count)
        host = torch.stack([torch.cat(c).double() for c in columns]).cpu().numpy()
        now = time.perf_counter()
        step_seconds = (now - began) / count
        self.blocks, self.fastest = self.blocks + 1, min(self.fastest, step_seconds)
        self.block = max(1, min(int(BLOCK_SECONDS / step_seconds), self.block * 4, 20_000))
        self._record(count, host, now - self.start)
        self._check_losses(host[2] > 0.5)
        self._warn()
        self._show()

    def _warn(self) -> None:
        """Say what the objective says is wrong, each thing once; look about fifty times."""
        if self.done < self.looked or not hasattr(self.loop.objective, "concerns") or not self.workers.leads:
            return
        self.looked = self.done + max(100, self.plan.steps // 50)
        for name, line in self.loop.objective.concerns(self.log.history()).items():
            if name not in self.warned:
                self.warned.add(name)
                warnings.warn(f"step {self.done}: {line}", stacklevel=2)

    def _until_shown(self) -> int:
        """Steps until the next callback that looks at the model."""
        return min((c.every - self.done % c.every for c in self.callbacks if c.every), default=self.plan.steps)

    def _show(self) -> None:
        """Let callbacks look at the model as it would be kept; nothing of the training depends on it."""
        due = [c for c in self.callbacks if c.every and (self.done % c.every == 0 or self.done == self.plan.steps)]
        if due:
            with self.loop.kept(), torch.no_grad():
                for callback in due:
                    callback.on_state(self.done)

    def _show_last(self) -> None:
        """Where training stopped before its last step, let callbacks look at what was kept."""
        if self.stopped and self.done < self.plan.steps:
            with torch.no_grad():
                for callback in self.callbacks:
                    if callback.every and self.done % callback.every:
                        callback.on_state(self.done)

    def _until_save(self) -> int:
        """Steps of a block, or until the next checkpoint."""
        every = self.loop.training.checkpoint_every
        saves = every is not None and self.checkpoint is not None and self.workers.leads
        return min(self.block, self.saved[0] + every - self.done) if saves else self.block  # type: ignore[operator]

    def _run(self, count: int) -> tuple[int, list[list[Tensor]]]:
        """Up to ``count`` steps, fewer where a signal comes: how many, and their outputs."""
        loop, done = self.loop, self.done
        table, keys = loop.scalars(done, count), step_keys(loop.noise_key, done, count)
        columns: list[list[Tensor]] = []
        i = 0
        while i < count and not (i and self.interruption.received):
            most = count - i if self.monitor is None else min(count - i, self.monitor.until_iterate(done + i))
            taken, out = self._call(done + i, most, table[i:], keys[i])
            columns = columns or [[] for _ in out]
            for column, value in zip(columns, out):
                column.append(value)
            i += taken
            if self.monitor is not None:
                self.monitor.observe(done + i)
        return i, columns

    def _call(self, step: int, limit: int, table: Tensor, noise_key: int) -> tuple[int, list[Tensor]]:
        """One call of the tier at hand: the steps it took, and its outputs ``(steps,)``."""
        loop = self.loop
        several = None if self.compilation is None else self.compilation.run(step, limit, table)
        if several is not None:
            return several
        index = loop.index(step)
        loop.load(step, 1)
        runner = loop.runner(index, step)
        seed_generators(noise_key, loop.device)
        return 1, [o.reshape(1) for o in runner(index, table[0])]

    def _record(self, count: int, host: np.ndarray, seconds: float) -> None:
        loss, norm, skip = host[0], host[1], host[2] > 0.5
        steps = np.arange(self.done + 1, self.done + count + 1)
        lr = self.loop.learning_rates(steps - 1)
        metrics = dict(zip(self.loop.step.metric_names, host[3:]))
        epoch = steps / self.plan.batches
        self.log.add(step=steps, epoch=epoch, loss=loss, grad_norm=norm, lr=lr, seconds=np.full(count, seconds), **metrics)
        self.done += count
        self.skipped += int(skip.sum())
        means = {name: _mean(v) for name, v in {"loss": loss, "grad_norm": norm, **metrics}.items()}
        for callback in self.callbacks:
            callback.on_log(self.done, {**means, "lr": float(lr[-1]), "seconds": seconds})
        self.bar.update(self.done, self.run.word, means["loss"], self.log.trend(), f"{self.loop.tier}{self._held_out()}")

    def _held_out(self) -> str:
        """The last validation, as the bar tells it."""
        if not self.log.validation["bound"]:
            return ""
        (name, sign, unit), value = spoken(self.run.word), self.log.validation["bound"][-1]
        return f" · held out {'' if unit else f'{name} '}{sign * value:.3f}"

    def _check_losses(self, skip: np.ndarray) -> None:
        """Stop at ``max_nonfinite`` skipped steps in a row, wherever in the block they lie."""
        first = self.done - len(skip)
        for i, skipped in enumerate(skip.tolist() if skip.any() else []):
            self.skipped_in_row = self.skipped_in_row + 1 if skipped else 0
            if self.skipped_in_row == self.loop.training.max_nonfinite:
                raise self._nonfinite(f"{self.skipped_in_row} non-finite steps in a row up to step {first + i + 1}", first + i)
        if not skip.any():
            self.skipped_in_row = 0

    def _check_parameters(self) -> None:
        """No fit ends, and no checkpoint is written, with a parameter that is not finite."""
        values = [*self.loop.step.values, *self.loop.step.ema]
        if not all(bool(torch.isfinite(value).all()) for value in values):
            raise self._nonfinite(f"a parameter is not finite after step {self.done}", max(self.done - 1, 0))

    def _nonfinite(self, words: str, step: int) -> NonFinite:
        self.run.stopped = words
        error = NonFinite(f"{words}: {self._autopsy(step)}")
        error.run = self.run
        return error

    def _validation_due(self) -> bool:
        due = self.done % self.plan.validate_every == 0 or self.done == self.plan.steps
        return self.validation is not None and due and self.done > 0 and self.log.validation["step"][-1:] != [self.done]

    def _validate(self) -> float:
        """Compute the validation bound, tell it and return it."""
        bound, std_error = self.workers.first(*self._bound())
        for name, value in zip(("step", "bound", "std_error"), (self.done, bound, std_error)):
            self.log.validation[name].append(float(value))
        for callback in self.callbacks:
            callback.on_validation(self.done, bound, std_error)
        return bound

    def _judge(self, bound: float) -> str:
        if not self.patience:
            return ""
        if math.isfinite(bound) and (self.best is None or bound > self.best[0]):
            self.best = bound, [v.clone() for v in self._current()]
            self.bad_validations = 0
            return ""
        self.bad_validations += 1
        if self.bad_validations < self.patience:
            return ""
        return f"validation {spoken(self.run.word)[0]} did not improve in {self.patience} validations; best parameters restored"

    def _current(self) -> list[Tensor]:
        return self.loop.step.ema or self.loop.step.values

    def _bound(self) -> tuple[float, float]:
        """Mean bound and its standard error, with the same noise every time."""
        loop = self.loop
        with loop.kept(), keyed_rng(key(loop.seed, "validation"), loop.device):
            local, outside = self.loop.target.bound_rows(
                loop.objective, self.validation, self.interruption.check,  # type: ignore[arg-type]
            )  # fmt: skip
        rows = local + outside / loop.num_data if len(local) else outside.reshape(1) / loop.num_data
        error = float(rows.std() / math.sqrt(len(rows))) if len(rows) > 1 else math.nan
        return float(rows.mean()), error

    def _autopsy(self, step: int) -> str:
        """Replay a step eagerly, with its own rows and noise, and name what went wrong."""
        loop, tensors = self.loop, self.loop.tensors()
        loop.load(step, 1)
        for noise, index in loop.pieces(step):
            seed_generators(noise, loop.device)
            rows = loop.rows(tensors, index)
            with rows_at(rows), unchanged(loop.step.buffers):
                words = loop.target.autopsy(loop.batch(tensors, index), rows) or self._bad_gradient(step, noise, index)
            if words:
                return words
        return "replayed with the parameters as they are now, it is finite" + (" here" if self.workers.world > 1 else "")

    def _bad_gradient(self, step: int, noise: int, index: Tensor | None) -> str:
        """Every site was finite: whether the loss or a gradient is not; nothing if all are."""
        loop, names = self.loop, {id(p): name for name, p in self.loop.target.named_parameters()}
        seed_generators(noise, loop.device)
        scheduled = loop.step.split_scalars(loop.scalars(step, 1)[0])[1]
        for player, part in zip(loop.step.players, players(loop.objective).values()):
            loss, metrics, grads = player.split(player.loss_and_grads(loop.step.leaves, index, scheduled))
            if not bool(torch.isfinite(loss)):
                told = {name: float(value) for name, value in zip(player.metric_names, metrics)}
                words = getattr(part, "explain", lambda told: "")(told)
                return words or f"the loss is not finite though every site is; {ADVICE}"
            for parameter, grad in zip(player.params, grads):
                if not bool(torch.isfinite(grad).all()):
                    return f"the gradient of {names.get(id(parameter))!r} is not finite though the loss is; {ADVICE}"
        return ""

    def _finish(self) -> None:
        loop, run = self.loop, self.run
        if self.compilation is not None:
            self.compilation.cancel()
        final = self.best[1] if self.best is not None else loop.step.ema
        if self.best is not None and not run.stopped.startswith("validation"):
            run.stopped += "; best validated parameters restored"
        run.restored = None if self.best is None else self.best[0]
        for value, better in zip(loop.step.values, final):
            value.copy_(better)
        if final:
            with torch.no_grad():
                loop.recount()
        run.history = self.log.history()
        run.warnings = list(getattr(loop.objective, "concerns", lambda history: {})(run.history).values())
        run.validation = {name: np.array(values) for name, values in self.log.validation.items() if values}
        run.tier, run.tier_reason = loop.tier, self._why_not_faster()
        run.steps, run.epochs, run.skipped = self.done, self.done / self.plan.batches, self.skipped
        run.seconds = time.perf_counter() - self.start

    def _why_not_faster(self) -> str:
        loop = self.loop
        if loop.tier == "compiled" or loop.reason:
            return loop.reason
        if self.compilation is not None:
            return "training ended before compilation did"
        return "too short to be worth " + ("capturing" if loop.tier == "eager" else "compiling")


def _copy(into: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Give tensors other values."""
    with torch.no_grad():
        for tensor, value in zip(into, values):
            tensor.copy_(value)


@contextmanager
def _swapped(values: list[Tensor], others: list[Tensor]) -> Iterator[None]:
    """Hold ``others`` in ``values`` for a while."""
    if not others:
        yield
        return
    before = [v.clone() for v in values]
    try:
        for value, other in zip(values, others):
            value.copy_(other)
        yield
    finally:
        for value, old in zip(values, before):
            value.copy_(old)
