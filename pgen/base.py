r"""The contract that every family and every user's pair fulfils, bound to training, evaluation and diagnostics."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import inspect
import math
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

import numpy as np
import pyro
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from . import files
from .contracts import (
    Batch,
    DataSource,
    Draws,
    Measure,
    NotAvailable,
    Run,
    Score,
    Seed,
    as_seed,
    check_choice,
    check_event_shape,
    check_positive,
    nearest,
)
from .data.arrays import as_batch, check_finite, fingerprint, is_source
from .data.batches import key
from .data.stored import Checked, look_rows
from .data.transforms import Compose, Dequantize, Standardize, Transform, from_settings
from .distributions.autoregressive import stepping
from .distributions.energy import Unnormalised
from .distributions.observation import LEVELS
from .evaluation.annealing import AIS, Sandwich, anneal, bidirectional, log_mean, simulate
from .evaluation.likelihood import UNIT_ROWS, At, importance_bound, take
from .evaluation.ood import regret
from .evaluation.posterior import by_rows, draw_posterior, draw_predictive, many
from .evaluation.steps import Steps
from .evaluation.units import TIERS
from .guides.automatic import AUTOMATIC, Flow, Latent
from .ladder import Ladder, climb
from .objectives import ELBO
from .programs import (
    DATA_PLATE,
    ParameterHome,
    PlateSize,
    Term,
    Traces,
    batch_length,
    call,
    check_pair,
    check_support,
    closure_modules,
    innermost,
    isolated,
    keyed_rng,
    localize,
    measure_of,
    python_state,
    rows_at,
    run_distributions,
    run_latents,
    run_pair,
    run_program,
    run_values,
    vectorize,
)
from .training.autopsy import autopsy
from .training.callbacks import Callback
from .training.checkpoint import Checkpoint, recorded
from .training.fit import Training, augmented, moves, players
from .training.fit import fit as fit_loop
from .training.optim import Adam
from .training.parallel import together
from .training.step import unchanged

if TYPE_CHECKING:
    import xarray

__all__ = ["GenerativeModel", "Pair", "load"]

FAMILIES: dict[str, type[GenerativeModel]] = {}
"""The closed registry of families that a saved file may name."""

COMPOSITES: dict[str, Callable[[dict[str, Any], dict[str, Tensor], Any], Any]] = {}
"""What a saved file may hold that is made of families: its loader, from metadata, tensors and path."""

SAMPLE_ROWS = 1024
"""Most data that ``sample`` generates at a time; part of what keys the noise."""
ENCODE_ROWS = 256
"""Most data that ``encode`` takes at a time."""


MAX_FULL = 1000
"""Latents up to which a ladder tries guides with a full matrix."""

MOST_STEPS = 50_000
"""Steps of a fit that stops when converged, unless it is told otherwise."""


class _Questions(nn.Module):
    """What a pair and a family have in common."""

    preprocess: Transform | None
    last_run: Run | None
    home: ParameterHome
    primed: bool
    """Whether parameters have been started at the data (or loaded), so that a further fit goes on from where they are."""
    num_rows: int = 0
    """Rows of the data that ``prime`` is part of a fit to; of a source it is shown some only. 0 outside a fit."""

    default_batch_size: ClassVar[int | None] = None
    default_epochs: ClassVar[float | None] = None
    default_steps: ClassVar[int | None] = None

    def programs(self) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """The model and the guide, as the engine calls them."""
        raise NotImplementedError

    def _asked(self, seed: Seed, compile: str, progress: bool) -> dict[str, Any]:
        """What every question passes on to the units that answer it."""
        check_choice("compile", compile, TIERS)
        held = [*self.parameters(), *self.buffers()]
        return {"seed": as_seed(seed), "held": held, "compile": compile, "progress": progress}

    # -- what the training loop asks for ------------------------------------------------------------------------------

    def _batch(self, argument: str, data: Any) -> Batch:
        """What a question is asked of, checked."""
        raise NotImplementedError

    def _ready(self, batch: Batch, *, any_rows: bool = False) -> None:
        """Whatever a question needs first."""

    def gradients(
        self, data: Any, objective: Any = None, *, num_repeats: int = 1, seed: Seed = 0
    ) -> Iterator[dict[str, Tensor]]:
        """Gradients of the loss on all of ``data`` by parameter, one dict a repeat, under independent noise.

        Of a game each player's own loss gives the gradients of its own parameters.

        Args:
            data: What ``fit`` takes; with a context, a dict of x and context.
            objective: An objective (scheduled numbers have their last value); the default one if None.
            num_repeats: How many.
            seed: Keys the noise.
        """
        batch = self._batch("data", data)
        self._ready(batch)
        named = {name: p for name, p in self.named_parameters() if p.requires_grad}
        first = next(iter(named.values()))
        objective = self._begun(objective or self.default_objective(), batch, as_seed(seed), first.device, first.dtype)
        last = {name: first.new_tensor(schedule(1, 1)) for name, schedule in getattr(objective, "schedules", {}).items()}
        scalars = {"num_data": float(batch_length(batch)), **last}
        for number in range(num_repeats):
            found: dict[str, Tensor] = {}
            with keyed_rng(key(as_seed(seed), "gradients", number), first.device), rows_at(None), torch.enable_grad():
                for player, part in players(objective).items():
                    own = {name: p for name, p in named.items() if not player or player in name.split(".")}
                    loss, _ = self.loss(part, batch, scalars)
                    found |= zip(own, torch.autograd.grad(loss, list(own.values()), allow_unused=True))
            yield {name: torch.zeros_like(p) if found.get(name) is None else found[name] for name, p in named.items()}

    def trainable(self, player: str = "") -> list[nn.Parameter]:
        """Parameters to train: all, or those that have ``player`` as a part of their dotted name."""
        found = [p for name, p in self.named_parameters() if p.requires_grad and (not player or player in name.split("."))]
        if not found and player:
            parts = ", ".join(sorted({name.split(".")[0] for name, _ in self.named_parameters()}))
            raise ValueError(f"player {player!r} of the objective has no parameters here: name a part of the model ({parts})")
        if not found:
            raise ValueError("there is nothing to train: neither model nor guide has a parameter")
        return found

    def python_state(self) -> dict[str, str]:
        """The plain Python values that the programs may read and change, as text."""
        model, guide = self.programs()
        return {**python_state(model), **python_state(guide)}

    def changing(self) -> list[Tensor]:
        """Buffers that the programs may change."""
        return list(self.buffers())

    def prepare(self, batch: Batch) -> Batch:
        """The batch as the programs see it."""
        return batch

    def _prepared(self, batch: Batch) -> tuple[Batch, Tensor | None]:
        """The same, and log |dy/dx| of each datum where x was preprocessed."""
        return batch, None

    def loss(self, objective: Any, batch: Batch, scalars: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of one batch, in nats a datum."""
        with isolated(self.home):
            return objective(*self.programs(), self.prepare(batch), scalars)

    def bound_rows(self, objective: Any, batch: Batch, pause: Callable[[], None]) -> tuple[Tensor, Tensor]:
        """Bound of each datum, ``(N,)``, and the part that all share, ``()``; ``pause`` is called between units of rows."""
        local, outside = [], []
        with isolated(self.home), torch.no_grad(), rows_at(None), _evaluating(self):
            parts = [take(batch, rows) for _, rows in _validation_units(batch)] if self._divisible(batch) else [batch]
            for part in parts:
                pause()
                prepared, log_det = self._prepared(part)
                rows, shared = objective.rows(*self.programs(), prepared)
                density = objective.kind != "unnormalised" or getattr(objective, "exact", False)
                local.append(rows if log_det is None or not density else rows + log_det)
                outside.append(shared)
        return torch.cat(local), torch.stack(outside).mean()

    def _divisible(self, batch: Batch) -> bool:
        return True

    def autopsy(self, batch: Batch, index: Tensor | None) -> str:
        """Name the first thing that is not finite when the programs run on ``batch``, rows ``index``; nothing if all is."""
        with isolated(self.home), torch.no_grad():
            return autopsy(self.named_parameters(), self.programs(), self.prepare(batch), index)

    def identity(self) -> str:
        """Tells this model from others in a checkpoint: what it is, and a digest of its tensors' names and shapes."""
        outline = repr([(name, tuple(tensor.shape)) for name, tensor in self.state_dict().items()])
        preprocess = None if self.preprocess is None else self.preprocess.settings()
        return f"{self._kind()}, preprocess {preprocess}, tensors {hashlib.sha256(outline.encode()).hexdigest()[:12]}"

    def _kind(self) -> str:
        return type(self).__name__

    # -- fitting ------------------------------------------------------------------------------------------------------

    def _opened(
        self, data: Any, batch_size: int | None, convert: Callable[[Any, Tensor | None], Batch]
    ) -> tuple[Batch, Checked | None]:
        """Data as a batch; of a source that is larger than a batch a look at it, and the source, checked as it is read."""
        if not is_source(data):
            return convert(data, None), None
        check_positive("batch_size", batch_size, allow_none=True)
        size = batch_size or self.default_batch_size
        if size is None:
            raise ValueError("`batch_size` is needed to fit a data source: how many of its rows a step takes, such as 1000")
        if len(data) == 0:
            raise ValueError("`data` has no rows")
        source = Checked(data, convert)
        if size >= len(source):
            return source.rows(torch.arange(len(source))), None
        source.looked = look_rows(data, size)
        return source.rows(source.looked), source

    def _fit(
        self,
        data: Batch,
        validation: Batch | None,
        *,
        source: Checked | None = None,
        objective: Any,
        optimizer: Any,
        epochs: float | None,
        steps: int | None,
        batch_size: int | None,
        seed: Seed,
        checkpoint: str | Path | None,
        callbacks: Sequence[Callback],
        progress: bool,
        training: Training | None,
        options: dict[str, Any],
    ) -> Run:
        settings = _training(training, options)
        seed = as_seed(seed)
        check_positive("epochs", epochs, allow_none=True, integer=False)
        check_positive("steps", steps, allow_none=True)
        check_positive("batch_size", batch_size, allow_none=True)
        if epochs is not None and steps is not None:
            raise ValueError(f"give either `epochs` or `steps`, not both (got {epochs} and {steps})")
        steps, batch_size = (None if n is None else int(n) for n in (steps, batch_size))
        device = settings.torch_device()
        num_data = batch_length(data) if source is None else len(source)
        objective = _objective(objective) or self.default_objective()
        size = _rows_of_a_step(batch_size or self._default_batch(num_data) or num_data, num_data, moves(objective))
        if epochs is None and steps is None:
            epochs, steps = (None, self.default_steps) if self.default_steps else (self.default_epochs or 100, None)
            epochs, steps = (None, MOST_STEPS) if settings.stop == "converged" else (epochs, steps)
        parts = settings.micro_batches or (None if checkpoint is None else recorded(Path(checkpoint), "micro_batches"))
        run = Run()
        with together(parts, exact=settings.deterministic, timeout=settings.timeout, device=device) as workers:
            if workers.micro_batches > 1 and not getattr(objective, "divisible", True):
                raise ValueError(
                    f"{type(objective).__name__} moves its chains as a whole, so that a step cannot be cut into "
                    f"{workers.micro_batches} micro-batches; train in one process, or with chains that begin at the data"
                )
            if size < workers.micro_batches:
                raise ValueError(f"a batch of {size} rows cannot be cut into {workers.micro_batches} micro-batches")
            self.to(device=device, dtype=settings.dtype)
            data = place(data, device, settings.dtype)
            validation = None if validation is None else place(validation, device, settings.dtype)
            if not self.primed:
                with keyed_rng(key(seed, "prime"), device):
                    self.num_rows = num_data
                    self.prime(data)
                self.primed = True
            objective = self._begun(objective, data, seed, device, settings.dtype)
            latent = self._first_look(data, size, seed, settings, objective, source, workers.micro_batches)
            run.word = self._word(objective, latent)
            if settings.stop == "converged" and settings.tolerance is None:
                settings = replace(settings, tolerance=self._tolerance(num_data))
            if optimizer is None:
                optimizer, settings = self._default_optimizer(settings)
            self.to(device=device, dtype=settings.dtype)
            if checkpoint is not None and Path(checkpoint).is_file():
                raise ValueError(f"`checkpoint` should be a folder, got the file {str(checkpoint)!r}")
            with contextlib.nullcontext() if checkpoint is None else Checkpoint(Path(checkpoint), workers.leads) as store:
                if workers.world > 1:
                    workers.align(self._facts(data, num_data, size, seed, settings), [*self.parameters(), *self.buffers()])
                try:
                    fit_loop(
                        self, data if source is None else source, validation=validation, objective=objective,
                        optimizer=optimizer, training=settings, epochs=epochs, steps=steps, batch_size=size, seed=seed,
                        callbacks=callbacks, progress=progress, checkpoint=store, run=run, workers=workers,
                    )  # fmt: skip
                finally:
                    if run.steps:
                        self.last_run = run
                        self._fitted_to(data if source is None else source)
                        self._ended(objective)
        return run

    def _facts(self, data: Batch, num_data: int, batch_size: int, seed: int, settings: Training) -> dict[str, str]:
        """What must be the same on every process."""
        held = [("parameter", self.named_parameters()), ("buffer", self.named_buffers())]
        tensors = {f"{kind} {n}": f"{tuple(t.shape)} {t.dtype}" for kind, named in held for n, t in named}
        sample = take(data, torch.linspace(0, batch_length(data) - 1, 64).long().to(_device(data)))
        plain = {f.name: value for f in fields(settings) if not callable(value := getattr(settings, f.name))}
        shared = {**plain, "num_data": num_data, "batch_size": batch_size, "seed": seed, "data": fingerprint(sample)}
        return {**tensors, **{name: str(value) for name, value in shared.items() if name != "device"}}

    def _fitted_to(self, data: Batch | DataSource) -> None:
        """Told of the training data after a fit."""

    def default_objective(self) -> Any:
        """What ``fit`` minimises unless told otherwise."""
        return ELBO()

    def _begun(self, objective: Any, data: Batch, seed: int, device: torch.device, dtype: torch.dtype) -> Any:
        """The objective with a state of its own for these data."""
        if hasattr(objective, "begin"):
            with isolated(self.home), keyed_rng(key(seed, "begin"), device), torch.no_grad():
                objective = objective.begin(*self.programs(), self.prepare(data))
        return _with_own_state(objective, device, dtype)

    def _ended(self, objective: Any) -> None:
        """Give the model what the objective's state has for it."""
        if hasattr(objective, "end"):
            with torch.no_grad():
                objective.end(*self.programs())

    def _default_batch(self, num_data: int) -> int | None:
        """Data a step, unless told otherwise; None for all."""
        return self.default_batch_size

    def _default_optimizer(self, settings: Training) -> tuple[Adam, Training]:
        return Adam(1e-3), settings

    def _tolerance(self, num_data: int) -> float:
        """Gain of the bound, nats a datum, below which a fit that stops when converged has converged."""
        return 0.005

    def _first_look(
        self,
        data: Batch,
        batch_size: int,
        seed: int,
        settings: Training,
        objective: Any,
        source: Checked | None,
        micro_batches: int,
    ) -> bool:
        """Create lazy parameters, then run both programs strictly on the first rows; whether the guide draws latents."""
        num_data = batch_length(data) if source is None else len(source)
        whole = batch_size == num_data and micro_batches > 1
        batch_size = -(-batch_size // micro_batches)  # what the programs see at a time
        first = take(data, slice(0, batch_size))
        device = _device(data)
        with keyed_rng(key(seed, "init"), device), torch.no_grad():
            first = augmented(tree_map_only(Tensor, torch.clone, first) if settings.augment else first, settings.augment)
            self.materialize(first, num_data, minibatch=batch_size < num_data)
            if whole:
                self._check_divisible(micro_batches)
            index = None if batch_size >= num_data else torch.arange(batch_size, device=device)
            with keyed_rng(key(seed, "check"), device), rows_at(index), _evaluating(self):
                with isolated(self.home, validate=True):
                    traces = self._strict(self.prepare(first), num_data, data if self.preprocess is None else None)
                    _check_normalised(objective, traces)
                self._check_owned(objective, first, num_data)
        if settings.augment is None:
            watch = self._check_support(data, None if source is None else source.looked)
            if source is not None:
                source.check = watch
        return traces is not None and bool(traces.guide)

    def _word(self, objective: Any, latent: bool) -> str:
        """What the objective maximises here: its own word, or whether it is the log-likelihood itself or a bound."""
        if own := getattr(objective, "word", ""):
            return str(own)
        if getattr(objective, "kind", "") == "unnormalised":
            return "unnormalised log-density"
        return "bound" if latent else "log-likelihood"

    def _check_support(self, batch: Batch, numbers: Tensor | None = None) -> Callable[[Batch, Tensor], None] | None:
        """Refuse values outside the likelihood's support, in any row; returns a check for rows that are still to come."""

    def _check_owned(self, objective: Any, batch: Batch, num_data: int) -> None:
        """Refuse programs that use a parameter which nobody would train."""
        scalars = {"num_data": float(num_data), **dict.fromkeys(getattr(objective, "schedules", {}), torch.ones(()))}
        games = players(objective)
        state = getattr(objective, "state", None) or nn.Module()
        with unchanged(list(state.buffers())), torch.enable_grad():
            losses = [self.loss(part, batch, scalars)[0] for part in games.values()]
        trained = [p for name in games if name for p in self.trainable(name)] or list(self.parameters())
        frozen = [p for p in self.parameters() if not p.requires_grad]
        owned = {id(p) for p in (*trained, *frozen, *state.parameters())}
        strays = [weakref.ref(leaf) for loss in losses for leaf in _leaves(loss) if id(leaf) not in owned]
        del losses  # and with them what a loss made for itself: data that it takes gradients along
        for leaf in (stray() for stray in strays):
            if leaf is not None:
                raise ValueError(
                    f"the programs use a parameter of shape {tuple(leaf.shape)} that "
                    + (
                        "no player trains: name"
                        if "" not in games
                        else "the pair does not own, so it would not be trained: add "
                    )
                    + (" a player for it" if "" not in games else "pyro.module('name', network) to the program")
                    + ", or freeze it with requires_grad_(False)"
                )

    def _strict(self, batch: Batch, num_data: int, whole: Batch | None = None) -> Traces | None:
        """Run both programs with validation on; None where a family has no sites. Advice looks at all data that are here."""
        try:
            traces = check_pair(*self.programs(), batch, num_data)
        except (ValueError, RuntimeError) as error:
            raise _one_line(error, self._advice(error, batch if whole is None else whole)) from error
        rows = batch_length(batch)
        if 0 < rows < num_data and not any(term.local for term in traces.model.values()):
            raise ValueError(
                f'a batch of {rows} of {num_data} rows needs the plate that holds the rows to be called "{DATA_PLATE}": '
                f'write `with pyro.plate("{DATA_PLATE}", len(x))`, or leave batch_size out'
            )
        return traces

    def _advice(self, error: Exception, batch: Batch) -> str:
        """What to do about an error that a first look at the data brought up."""
        return ""

    def materialize(self, batch: Batch, num_data: int, *, minibatch: bool) -> None:
        """Run the programs once, so that parameters made on the way exist; later ones are refused."""

    def _check_divisible(self, micro_batches: int) -> None:
        """Refuse what means something else where a step does not see all rows at once."""

    def prime(self, data: Batch) -> None:
        """Start parameters at simple statistics of the training data, before the first fit."""

    # -- files --------------------------------------------------------------------------------------------------------

    def _write(self, path: str | Path, metadata: dict[str, Any]) -> None:
        from . import __version__

        preprocess = None if self.preprocess is None else self.preprocess.settings()
        files.write(path, self.state_dict(), {**metadata, "preprocess": preprocess, "pgen_version": __version__})


def _check_normalised(objective: Any, traces: Traces | None) -> None:
    """Refuse an objective that takes log-densities at their word where one has no normaliser."""
    for term in () if traces is None else traces.model.values():
        if isinstance(innermost(term.fn), Unnormalised) and getattr(objective, "kind", "unnormalised") != "unnormalised":
            raise ValueError(
                f"`objective` {type(objective).__name__} would raise the density of site {term.name!r} without end, as it has "
                "no normaliser; use pgen.objectives.PersistentContrastiveDivergence(), DenoisingScoreMatching() or "
                "NoiseContrastive(noise)"
            )


def _refuse_source(argument: str, data: Any) -> None:
    if is_source(data):
        raise TypeError(f"`{argument}` is a data source, which only fit reads; give some of its rows: source.rows(indices)")


def _rows_of_a_step(batch_size: int, num_data: int, moves: int) -> int:
    """``batch_size`` rows for each move, as far as the data go; all of them where a move takes them all."""
    return num_data if batch_size >= num_data else min(batch_size, num_data // moves) * moves


def _with_own_state(objective: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """The objective with a copy of its state, so that each fit starts from what was given."""
    if getattr(objective, "state", None) is None:
        return objective
    objective = copy.deepcopy(objective)
    objective.state.to(device, dtype)
    return objective


def _objective(objective: Any) -> Any:
    """``objective`` if it can be one."""
    if objective is None or (callable(objective) and not isinstance(objective, type) and hasattr(objective, "kind")):
        return objective
    if hasattr(objective, "players"):
        return objective
    name = objective if isinstance(objective, str) else getattr(objective, "__name__", type(objective).__name__)
    raise TypeError(
        f"`objective` should be an objective such as pgen.ELBO(), pgen.IWAE(5) or pgen.objectives.DReG(5), got {name!r}"
        + (" of Pyro, whose objectives synchronise at every site" if type(objective).__module__.startswith("pyro") else "")
        + (": call it, with brackets" if isinstance(objective, type) else "")
    )


def _leaves(loss: Tensor) -> list[Tensor]:
    """The leaf tensors that a loss depends on and that require gradients."""
    found, seen, stack = [], set(), [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        stack.extend(parent for parent, _ in node.next_functions)
    return found


_FIT_ARGUMENTS = (
    "validation", "context", "objective", "optimizer", "epochs", "steps", "batch_size", "seed", "checkpoint", "callbacks",
    "progress",
)  # fmt: skip


def _parted(batch: dict[str, Tensor], share: float, seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """The rows to fit and those to hold out, chosen by the seed; none where the share is less than a row."""
    rows = batch_length(batch)
    held = round(share * rows)
    if not held:
        return batch, None
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(key(seed, "hold out"))).to(_device(batch))
    train, test = (cast(dict[str, Tensor], take(batch, part)) for part in (order[held:].sort().values, order[:held]))
    return train, test


def _training(training: Training | None, options: dict[str, Any]) -> Training:
    names = [f.name for f in fields(Training)]
    for name in options:
        if name not in names:
            raise TypeError(f"fit() got an unknown option {name!r}{nearest(name, [*_FIT_ARGUMENTS, *names])}")
    return replace(training or Training(), **options)


def _one_line(error: Exception, advice: str = "") -> ValueError:
    text = " ".join(str(error).split()).partition(", but found invalid values:")[0]
    if "Shape mismatch inside plate" in text:
        text += "; check the sizes of the plates against the data"
    return ValueError(text[:400] + advice)


def _device(batch: Batch) -> torch.device:
    return next(leaf.device for leaf in tree_leaves(batch) if isinstance(leaf, Tensor))


def place(batch: Batch, device: torch.device, dtype: torch.dtype) -> Batch:
    """A batch on the device, floating-point tensors in ``dtype``."""
    return tree_map_only(Tensor, lambda t: t.to(device, dtype if t.is_floating_point() else None), batch)


class _evaluating:
    """Dropout off and batch statistics frozen, for a while."""

    def __init__(self, module: nn.Module) -> None:
        self._modules = [(m, m.training) for m in module.modules()]

    def __enter__(self) -> None:
        for module, _ in self._modules:
            module.training = False

    def __exit__(self, *args: object) -> None:
        for module, training in self._modules:
            module.training = training


VALIDATION_ROWS = 512


def _validation_units(batch: Batch) -> list[tuple[int, slice]]:
    total = batch_length(batch)
    return [(i, slice(s, min(s + VALIDATION_ROWS, total))) for i, s in enumerate(range(0, total, VALIDATION_ROWS))]


class GenerativeModel(_Questions, PyroModule):
    r"""A family: a model p(x, z | c) and a guide q(z | x, c) as Pyro programs over one observed site ``"x"``.

    A family implements ``model(x=None, context=None)`` and ``guide(x=None, context=None)``, with the batch axis in
    ``self.plate(x, context)`` and every other axis declared by ``to_event``, and ``settings()``. This class gives fitting,
    sampling, scoring and the rest.

    Args:
        event_shape: Shape of one datum.
        preprocess: Invertible preprocessing of x, fitted to the training data and applied everywhere: what goes in and
            comes out is in the user's units.
        context_dim: Size of the context vector of each datum; 0 for none.
    """

    family: ClassVar[str] = ""
    also: ClassVar[tuple[str, ...]] = ()
    """Further arguments of both programs, one entry a datum, that are given with x in a dict: ``{"x": x, "lengths": n}``.

    A family that takes ``"observed"`` knows missing entries: NaN in x becomes 0 there, and False in ``observed``.
    """
    nan_advice: ClassVar[str] = ""
    """What more to say where x holds NaN, which the family does not know."""
    stepwise: ClassVar[bool] = False
    """Whether x is an ``Autoregressive`` site: then it is one step that is captured when sampling, not the whole program."""
    sequential: ClassVar[bool] = False
    """Whether the first axis of x is time."""
    columns_of_context: ClassVar[bool] = False
    """Whether the setting ``columns`` goes on to say what each number of the context holds."""
    has_density: ClassVar[bool] = True
    """Whether there is a ``log_prob`` at all."""
    has_posterior: ClassVar[bool] = True
    """Whether latents (which may be none) can be drawn given data; else a model is judged by its samples alone."""
    real_likelihood: ClassVar[str] = "gaussian"
    """The likelihood that ``suggest`` takes for real data."""
    unit_rows: ClassVar[int] = UNIT_ROWS
    """Most rows that ``log_prob`` evaluates at a time. A family whose distribution bounds its own memory takes more, and its
    program is then run as written unless a tier is asked for."""
    refuses_one_context: ClassVar[bool] = False
    """Whether ``fit`` refuses data that all have the same context, of which other families warn."""
    holds_out: ClassVar[float] = 0.0
    """Share of the rows that ``fit`` holds out, to stop in time, if it is told neither held-out data nor how long to train."""
    default_batch_size = 100
    default_epochs = 100

    def __new__(cls, *args: Any, **settings: Any) -> Self:
        """Name the nearest setting where one is unknown."""
        accepted = inspect.signature(cls.__init__).parameters
        if not any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
            for name in settings:
                if name not in accepted:
                    raise TypeError(f"{cls.__name__} has no setting {name!r}{nearest(name, list(accepted)[1:])}")
        if args or settings:  # a copy is made without any
            _check_complete(cls, list(accepted.values())[1:], args, settings)
        return super().__new__(cls)

    def __init__(self, event_shape: Sequence[int], *, preprocess: Transform | None = None, context_dim: int = 0) -> None:
        super().__init__()
        if not isinstance(event_shape, Sequence):
            raise TypeError(f"`event_shape` should be a tuple of sizes such as (2,) or (28, 28), got {event_shape!r:.60}")
        self.event_shape = tuple(int(n) for n in event_shape)
        if not self.event_shape or any(n < 1 for n in self.event_shape):
            raise ValueError(f"`event_shape` should be positive sizes such as (28, 28), got {tuple(event_shape)}")
        if context_dim < 0:
            raise ValueError(f"`context_dim` should be 0 (no context) or the length of a context vector, got {context_dim}")
        self.context_dim = context_dim
        self.preprocess = preprocess
        self.last_run = None
        self.primed = False
        self.home = ParameterHome()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if vars(cls).get("family"):  # a subclass does not take its parent's place
            FAMILIES[cls.family] = cls

    @classmethod
    def for_data(cls, x: Any, *, seed: Seed = 0, **settings: Any) -> Self:
        """A model for data like x, not fitted yet: what ``settings`` leave out, ``suggest`` finds in the data.

        Args:
            x: Data, ``(N, *event_shape)``.
            seed: Keys the initial weights.
            **settings: Arguments of the constructor, but for the event shape.

        Example:
            >>> from pgen.models import Gaussian
            >>> Gaussian.for_data(torch.tensor([[0.0, 1.0], [3.0, 1.0]])).preprocess  # counts: a density that bounds their mass
            Compose(
              (parts): ModuleList(
                (0): Dequantize(levels=4)
                (1): Standardize()
              )
            )
        """
        x = as_batch(x, name="x")
        if not isinstance(x, Tensor) or x.dim() < 2:
            raise TypeError(f"`x` should be one array of data, (N, *event_shape), got {type(x).__name__}")
        made: Any = cls
        weights = {"seed": seed} if "seed" in inspect.signature(cls).parameters else {}
        return made(tuple(x.shape[1:]), **{**cls.suggest(x, settings), **settings}, **weights)

    @classmethod
    def suggest(cls, x: Tensor, given: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of the constructor that the data decide; a family whose constructor needs more refines this.

        Nothing where ``columns`` says what the numbers are. Else by the arguments' names: ``likelihood`` (zeros and ones are
        Bernoulli, whole numbers up to 255 categorical, all else Gaussian), ``num_classes`` (the highest number and one),
        ``preprocess`` (real tables are standardised; where the family has densities alone, whole numbers are dequantised
        first, which gives a bound of their mass).

        Args:
            x: Data, ``(N, *event_shape)``.
            given: Arguments that are decided already; ``likelihood`` counts where the constructor has none, too: ``"gaussian"``
                says that whole numbers are real ones.
        """
        found: dict[str, Any] = {}
        accepted = inspect.signature(cls).parameters
        if given.get("columns") is not None:
            return found
        discrete = "likelihood" in accepted or "num_classes" in accepted
        there = x[~torch.isnan(x)] if discrete and "observed" in cls.also else x
        there = there if len(there) else x
        whole = bool((there == there.round()).all()) and 0 <= float(there.min()) and float(there.max()) <= 255
        top = max(int(there.max()), 1) + 1 if whole else 0
        likelihood = given.get("likelihood", ("bernoulli" if top == 2 else "categorical") if whole else cls.real_likelihood)
        if "likelihood" in accepted:
            found["likelihood"] = likelihood
        if "num_classes" in accepted and (likelihood in LEVELS or ("likelihood" not in accepted and whole)):
            found["num_classes"] = top
        real = not whole or likelihood in ("gaussian", "gaussian_mixture") or not cls.has_density
        if "preprocess" in accepted and not real and not discrete:
            found["preprocess"] = Compose([Dequantize(top), Standardize()])
        elif "preprocess" in accepted and real and x.dim() == 2:
            found["preprocess"] = Standardize()
        return found

    def model(self, x: Tensor | None = None, context: Tensor | None = None) -> Any:
        """The generative program."""
        raise NotImplementedError

    def guide(self, x: Tensor | None = None, context: Tensor | None = None) -> Any:
        """The inference program; a family without latents leaves it empty."""

    def marginal(self, x: Tensor | None = None, context: Tensor | None = None) -> Any:
        """p(x | c) with the latents integrated out, for a family where that has a closed form: ``log_prob`` is then exact.

        The guide of such a family is the posterior itself, with which the bound is the log-likelihood.
        """
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments as plain JSON values."""
        raise NotImplementedError

    @staticmethod
    def initial_weights(seed: Seed) -> AbstractContextManager[None]:
        """Draw networks inside this context: their initial weights are a function of ``seed`` alone."""
        return keyed_rng(key(as_seed(seed), "weights"))

    def plate(self, x: Tensor | None, context: Tensor | None) -> pyro.plate:
        """The plate of the batch axis: as long as x, else as the context, else as many data as are being sampled."""
        size = len(x) if x is not None else len(context) if context is not None else PlateSize.size or 1
        return pyro.plate(DATA_PLATE, size, dim=-1)

    def programs(self) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """``model`` and ``guide``."""
        return self.model, self.guide

    def prepare(self, batch: Batch) -> Batch:
        """x as the programs see it: preprocessed."""
        return self._prepared(batch)[0]

    def _prepared(self, batch: Batch) -> tuple[dict[str, Any], Tensor | None]:
        """The preprocessed batch, and log |dy/dx| of each datum."""
        batch = cast(dict[str, Any], batch)
        if self.preprocess is None:
            return batch, None
        x, log_det = self.preprocess.forward_with_log_det(batch["x"], **self._seen(batch))
        return {**batch, "x": x}, log_det

    def _seen(self, batch: dict[str, Any]) -> dict[str, Any]:
        """What preprocessing number by number needs to know of missing entries."""
        by_number = isinstance(self.preprocess, Standardize) and "observed" in batch
        return {"observed": batch["observed"]} if by_number else {}

    def loss(self, objective: Any, batch: Batch, scalars: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of one batch; a bound is in the units of the data."""
        with isolated(self.home):
            prepared, log_det = self._prepared(batch)
            loss, metrics = objective(*self.programs(), prepared, scalars)
        density = log_det is not None and objective.kind != "unnormalised"
        return (loss - log_det.mean() if density else loss), metrics  # type: ignore[union-attr]

    def _kind(self) -> str:
        return f"{self.family} {self.settings()}" if self.family else super()._kind()

    # -- fitting ------------------------------------------------------------------------------------------------------

    def fit(
        self,
        data: Any,
        *,
        validation: Any = None,
        context: Any = None,
        validation_context: Any = None,
        objective: Any = None,
        optimizer: Any = None,
        epochs: float | None = None,
        steps: int | None = None,
        batch_size: int | None = None,
        seed: Seed = 0,
        checkpoint: str | Path | None = None,
        callbacks: Sequence[Callback] = (),
        progress: bool = True,
        training: Training | None = None,
        **options: Any,
    ) -> Run:
        r"""Fit by stochastic variational inference (maximum likelihood where there are no latents).

        Args:
            data: x, shape ``(N, *event_shape)``: a tensor, an array, or a source of rows larger than memory, such as
                ``pgen.data.MemoryMapped("x.npy")``, or any object with ``len`` and ``rows(indices)``. Of a source some 4096
                rows are looked at first (preprocessing is fitted to them); every row is checked when it is read.
            validation: Held-out x, for its log-likelihood or bound while training, and early stopping; or the share of the data
                to hold out, such as 0.1 (0 for none). By default none, but for families that overfit small data (``Flow``,
                ``MADE``): told neither ``validation`` nor ``epochs`` nor ``steps``, they hold out a tenth, and the run says so.
            context: Context of each datum, shape ``(N, context_dim)``.
            validation_context: Context of each validation datum.
            objective: ``pgen.ELBO()`` by default, ``pgen.IWAE(k)``, or any function (model, guide, batch, scalars).
            optimizer: A learning rate, ``pgen.training.Adam(...)``, a torch optimizer or a function of the parameters that
                makes one. Default: Adam at 1e-3.
            epochs: Passes over the data (default 100).
            steps: Optimizer steps, instead of epochs.
            batch_size: Data a step (default 100).
            seed: Keys order and noise (a family's constructor takes the seed of its initial weights); the global random
                state is left as it was.
            checkpoint: A folder to save progress in and to resume from.
            callbacks: Objects told of progress, such as ``pgen.training.JsonLines(path)``.
            progress: Whether to show a progress bar on fits that take longer than a moment.
            training: Grouped options; ``options`` override its fields by name.
            **options: Fields of ``pgen.Training``: ``device``, ``precision``, ``compile``, ``clip_norm``, ``ema``,
                ``schedule``, ``early_stopping``, ``augment`` and the others.

        Returns:
            A Run: history, log-likelihood (or bound) of the validation data, reason for stopping, tier.

        Raises:
            ValueError: On bad data or arguments, in one line.
        """
        if is_source(data) and context is not None:
            raise ValueError("`context` goes with arrays; a data source gives it in its rows: {'x': ..., 'context': ...}")
        settings, seed = _training(training, options), as_seed(seed)
        self.to(dtype=settings.dtype)  # before data are read in it
        batch, source = self._opened(data, batch_size, lambda x, numbers: self._checked("data", x, context, numbers))
        batch = self._placed(batch)
        concern = self._concern_of_context(batch) if source is None else ""  # of a source a part alone is here
        share = self._share(validation, source, epochs is None and steps is None and settings.stop != "converged")
        held_out = self._batch("validation", validation, validation_context) if share is None else None
        if share:
            if self.preprocess is None and settings.augment is None:
                self._check_support(batch)  # while rows have the numbers that the user knows
            batch, held_out = _parted(batch, share, seed)
        if self.preprocess is not None and not self.primed:
            self.preprocess.fit(batch["x"], **self._seen(batch))
        asked = (source, objective, optimizer, epochs, steps, batch_size, training)
        changed = {name for name, value in options.items() if value != getattr(Training, name, ...)}
        plain = all(option is None for option in asked) and changed <= {"device", "precision"}
        run = self._solved(batch, held_out, seed, settings) if plain and self.solvable else None
        run = run or self._fit(
            batch, held_out, source=source, objective=objective, optimizer=optimizer, epochs=epochs, steps=steps,
            batch_size=batch_size, seed=seed, checkpoint=checkpoint, callbacks=callbacks, progress=progress, training=training,
            options=options,
        )  # fmt: skip
        run.held_out = batch_length(held_out) if share and held_out is not None else 0
        run.warnings += [concern] if concern else []
        return run

    def _concern_of_context(self, batch: dict[str, Tensor]) -> str:
        """Name a context in which nothing varies: answers are right under it, and under any other there is nothing to go by."""
        context = batch.get("context")
        if context is None or len(context) < 2 or not bool((context == context[0]).all()):
            return ""
        concern = "every datum has the same context, from which nothing is learnt: leave `context` out of model and fit"
        if self.refuses_one_context:
            raise ValueError(concern)
        concern += ", or ask of no other context"
        warnings.warn(concern, stacklevel=3)
        return concern

    def _share(self, validation: Any, source: Checked | None, unsaid: bool) -> float | None:
        """The share of the data to hold out; None where held-out data are given."""
        if validation is None:
            return self.holds_out if unsaid and source is None else 0.0
        if not isinstance(validation, (int, float)):
            return None
        if not 0 <= validation < 1:
            raise ValueError(f"`validation` should be held-out data, or the share of the data to hold out, got {validation}")
        if validation and source is not None:
            raise ValueError("`validation` is a share, and a data source is not divided; give some of its rows")
        return float(validation)

    def solve(self, batch: dict[str, Tensor]) -> str:
        """Set the parameters to those of maximum likelihood in closed form, and say how; where there is none, say nothing.

        ``fit`` asks for it unless an objective, an optimizer, epochs, steps or other ways of training are given. It is done
        at once, so there is nothing to resume: a checkpoint folder stays empty.

        Args:
            batch: All data, preprocessed, with ``"context"`` and the arguments in ``also``, on the device of the parameters.
        """
        return ""

    @property
    def solvable(self) -> bool:
        """Whether the family may know a closed form: then ``fit`` asks ``solve`` first."""
        return type(self).solve is not GenerativeModel.solve

    def _solved(
        self, batch: dict[str, Tensor], validation: dict[str, Tensor] | None, seed: int, settings: Training
    ) -> Run | None:
        """A fit in closed form, if the family has one."""
        began, device = time.perf_counter(), settings.torch_device()
        self.to(device=device, dtype=settings.dtype)
        batch = self._placed(batch)
        self._check_support(batch)
        with isolated(self.home), keyed_rng(key(seed, "solve"), device), torch.no_grad():
            how = self.solve(cast(dict[str, Tensor], self.prepare(batch)))
        if not how:
            return None
        self.primed = True
        with keyed_rng(key(seed, "word"), device):
            latent = self._draws_latents(batch)
        word = self._word(self.default_objective(), latent)
        run = Run(stopped=how, num_data=len(batch["x"]), seed=seed, epochs=1.0, word=word)
        held_out = None if validation is None else self._placed(validation)
        for name, data in (("training", self._rows_to_tell(batch)), ("validation", held_out)):
            if data is None:
                continue
            with keyed_rng(key(seed, name), device):
                rows, _ = self.bound_rows(self.default_objective(), data, lambda: None)
            mean, error = float(rows.double().mean()), float(rows.double().std() / math.sqrt(len(rows)))
            if not math.isfinite(mean) and (advice := _of_overflow(data["x"])):
                raise ValueError(f"`{'data' if name == 'training' else name}` has a log-density of {mean}{advice}")
            if name == "training":
                run.history = {"step": np.zeros(1), "epoch": np.ones(1), "loss": np.array([-mean])}
            else:
                run.validation = {"step": np.zeros(1), "bound": np.array([mean]), "std_error": np.array([error])}
        run.seconds = time.perf_counter() - began
        self.last_run = run
        return run

    def _rows_to_tell(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The training data whose likelihood a fit in closed form tells: all, unless that is dear."""
        return batch

    def _batch(self, argument: str, x: Any, context: Any = None) -> dict[str, Tensor]:
        """Checked x and context, in the model's dtype and on its device."""
        return self._placed(self._checked(argument, x, context))

    def _placed(self, batch: Any) -> dict[str, Tensor]:
        reference = next(self.parameters())
        return cast(dict[str, Tensor], place(batch, reference.device, reference.dtype))

    def _checked(self, argument: str, x: Any, context: Any, numbers: Tensor | None = None) -> dict[str, Tensor]:
        """Checked x and context, in the model's dtype, where they are; ``numbers`` are those of the rows of a source."""
        given: dict[str, Any] = {}
        if isinstance(x, dict):
            given, x, context = x, self._named(argument, x), x.get("context", context)
        x = as_batch(x, name=argument)
        _refuse_source(argument, x)
        if not isinstance(x, Tensor):
            raise TypeError(f"`{argument}` should be one tensor or array of x, got {type(x).__name__}")
        check_event_shape(argument, x, self.event_shape, self._shape_advice(argument, x))
        if x.is_complex():
            raise TypeError(
                f"`{argument}` should hold real numbers, got {x.dtype}; give real and imaginary parts as two numbers"
            )
        if len(x) == 0:
            raise ValueError(f"`{argument}` is empty: shape {tuple(x.shape)}")
        dtype = next(self.parameters()).dtype
        further = self._further(x, {name: given[name] for name in self.also if given.get(name) is not None})
        x = torch.where(further["observed"], x, torch.zeros_like(x)) if "observed" in further else x
        try:
            check_finite(x, argument, numbers)
        except ValueError as error:
            raise ValueError(f"{error}{self.nan_advice if ' is nan' in str(error) else ''}") from None
        if self.preprocess is not None:
            self.preprocess.check(x, argument, numbers)
        batch = {"x": x.to(dtype), **further}
        if context is not None or self.context_dim:
            batch["context"] = self._context(context, len(x)).to(dtype)
        return batch

    def _shape_advice(self, argument: str, x: Tensor) -> str:
        """What to do about x whose shape is none of ``(N, *event_shape)``; a family that knows refines it."""
        return ""

    def _named(self, argument: str, given: dict[str, Any]) -> Any:
        if "x" not in given:
            raise ValueError(f"`{argument}` has no array 'x' (it has {', '.join(map(str, given)) or 'none'})")
        known = ("x", "context", *self.also)
        for name in given:
            if name not in known:
                raise ValueError(
                    f"`{argument}` has {name!r}, which {type(self).__name__} does not take{nearest(str(name), known)}"
                )
        return given["x"]

    def _further(self, x: Tensor, given: dict[str, Any]) -> dict[str, Tensor]:
        """The arguments in ``also``, checked, one entry a datum; a family with such arguments refines it."""
        found = {name: torch.as_tensor(as_batch(value)) for name, value in given.items()}
        for name, value in found.items():
            if len(value) != len(x):
                raise ValueError(f"`{name}` has {len(value)} entries for {len(x)} data; give one a datum")
        if "observed" in self.also:
            found["observed"] = self._entries(x, found.get("observed"))
        return found

    def _entries(self, x: Tensor, given: Tensor | None) -> Tensor:
        """Which entries of x are observed, ``(N, *event_shape)``: those that are not NaN, and not False in ``given``."""
        if given is not None:
            check_event_shape("observed", given, self.event_shape)
        observed = ~torch.isnan(x) if given is None else given.bool() & ~torch.isnan(x)
        if self.preprocess is not None and not isinstance(self.preprocess, Standardize) and not bool(observed.all()):
            own = type(self.preprocess).__name__
            raise ValueError(f"x has missing entries (NaN), which {own} would count as data; take Standardize() or prepare x")
        return observed

    def _context(self, context: Any, length: int) -> Tensor:
        if context is None:
            raise ValueError(
                f"this model was made with context_dim={self.context_dim}; give `context`, shape (N, {self.context_dim})"
            )
        if not self.context_dim:
            raise ValueError("this model was made without context; make it with context_dim=... to condition on one")
        context = torch.as_tensor(as_batch(context, name="context"))
        if context.dim() == 1 and len(context) == length and self.context_dim > 1:
            raise ValueError(
                f"`context` should have shape (N, {self.context_dim}), got {tuple(context.shape)}; classes? "
                f"give torch.nn.functional.one_hot(classes, {self.context_dim})"
            )
        check_event_shape("context", context, (self.context_dim,))
        if len(context) != length and len(context) != 1:
            raise ValueError(f"`context` has {len(context)} rows for {length} data; give one row a datum, or one for all")
        check_finite(context, "context")
        return context.expand(length, -1)

    def _where(self, context: Any, rows: int | None = None) -> Tensor | None:
        """The context checked, one row for each of ``rows`` (None: as many as there are); nothing where there is none."""
        if context is None and not self.context_dim:
            return None
        rows = (1 if context is None else len(context)) if rows is None else rows
        return self._like(self._context(context, rows))

    def _like(self, x: Tensor) -> Tensor:
        reference = next(self.parameters())
        return x.to(reference.device, reference.dtype)

    def _observed(self, batch: Batch) -> tuple[Batch, Any]:
        """The preprocessed batch, and the distribution of x at its first row."""
        with isolated(self.home), keyed_rng(0, _device(batch)), _evaluating(self), torch.no_grad():
            prepared = self.prepare(batch)
            return prepared, run_distributions(*self.programs(), take(prepared, slice(0, 1))).get("x")

    @property
    def _closed(self) -> bool:
        """Whether the latents are integrated out in closed form."""
        return type(self).marginal is not GenerativeModel.marginal

    @property
    def _mass_bound(self) -> bool:
        """Whether preprocessing makes a density of a mass, of which it is a bound."""
        return self.preprocess is not None and self.preprocess.kind == "lower_bound"

    def _draws_latents(self, batch: Batch) -> bool:
        """Whether the guide draws anything."""
        with isolated(self.home), _evaluating(self), torch.no_grad():
            return bool(run_program(self.guide, take(cast(dict[str, Any], self.prepare(batch)), slice(0, 1))))

    def _word(self, objective: Any, latent: bool) -> str:
        return super()._word(objective, (latent and not self._closed) or self._mass_bound)

    def _measure(self, batch: Batch) -> Measure:
        """Whether this family gives these data a density or a mass."""
        if self._mass_bound:
            return "mass"
        return measure_of(self._observed(take(batch, slice(0, 1)))[1])

    def _advice(self, error: Exception, batch: Batch) -> str:
        """The likelihood or number of classes that the data ask for, where they lie outside the support of what was chosen."""
        x = cast(dict[str, Any], batch)["x"]
        if "has a log-density of" in str(error):
            return _of_overflow(x)
        if "outside the support" not in str(error) or (settings := self.settings()).get("columns"):
            return ""
        top, classes = float(x.max()), settings.get("num_classes")
        if classes is not None and top >= classes and bool(((x >= 0) & (x == x.round())).all()):
            return f": the largest value is {top:g}, for which num_classes={int(top) + 1} would do"
        if settings.get("likelihood") is None:
            return ""
        found = self.suggest(x, {})
        words = ", ".join(f"{name}={found[name]!r}" for name in ("likelihood", "num_classes") if name in found)
        return f": for such data {words}" if found.get("likelihood") != settings["likelihood"] else ""

    def _check_support(self, batch: Batch, numbers: Tensor | None = None) -> Callable[[Batch, Tensor], None] | None:
        prepared, fn = self._observed(batch)
        if fn is None:
            return None
        where = "model site 'x'"
        try:
            check_support(where, fn, cast(dict[str, Any], prepared)["x"], numbers=numbers)
        except ValueError as error:
            raise ValueError(f"{error}{self._advice(error, prepared)}") from None
        if self.preprocess is not None:  # it may draw noise, which a thread beside training must not
            return None
        return lambda rows, numbers: check_support(where, fn, cast(dict[str, Any], rows)["x"], numbers=numbers)

    # -- questions ----------------------------------------------------------------------------------------------------

    def sample(
        self, n: int = 1, context: Any = None, *, seed: Seed = 0, compile: str = "auto", progress: bool = True
    ) -> Tensor:
        """Draw x from the model.

        Args:
            n: How many.
            context: One context for all, shape ``(1, context_dim)``, or one for each.
            seed: Keys the draws.
            compile: The tier; ``"auto"`` goes by the amount of work.
            progress: Whether to show a bar on what takes more than two seconds.

        Returns:
            Shape ``(n, *event_shape)``, in the units of the data.
        """
        check_positive("n", n)
        told = self._where(context, int(n))
        return self._sampled(int(n), {} if told is None else {"context": told}, seed, compile, progress)

    def _sampled(self, n: int, where: dict[str, Tensor], seed: Seed, compile: str, progress: bool) -> Tensor:
        """Draws of x given the arguments ``where``, checked."""

        def generated(batch: Batch, count: int) -> Tensor:
            with PlateSize(count):
                return cast(Tensor, run_values(self.model, cast(dict[str, Any], batch))["x"])

        with isolated(self.home), _evaluating(self), torch.no_grad(), self._stepping(compile, progress):
            options = self._asked(seed, "eager" if self.stepwise else compile, progress)
            if not where:
                device = next(self.parameters()).device
                x = many(generated, {"context": None}, n, SAMPLE_ROWS, name="sample", device=device, **options)
            else:
                x = by_rows(lambda b: generated(b, batch_length(b)), where, SAMPLE_ROWS, name="sample", **options)
        return x if self.preprocess is None else self.preprocess.inverse(x)

    def _event_size(self, batch: dict[str, Tensor]) -> float:
        """How many numbers one datum has, on average; those that are missing are not counted."""
        seen = batch["observed"].flatten(1).sum(1).double().mean() if "observed" in batch else 0.0
        return float(seen) or math.prod(self.event_shape)

    def _stepping(self, compile: str, progress: bool) -> AbstractContextManager[None]:
        """Inside, the steps of autoregressive sites run in the tier asked for."""
        check_choice("compile", compile, TIERS)
        return stepping(Steps([*self.parameters(), *self.buffers()], compile=compile, progress=progress))

    def log_prob(
        self,
        x: Any,
        context: Any = None,
        *,
        method: str = "importance",
        num_samples: int = 100,
        seed: Seed = 0,
        batch_size: int | None = None,
        compile: str = "auto",
        progress: bool = True,
        **options: Any,
    ) -> Score:
        r"""Log-density (or mass) of each datum, in nats, in the units of the data.

        Exact for families without latents; otherwise a lower bound with its Monte Carlo error: the multi-sample bound of Burda
        et al. (2016), :math:`\log \frac{1}{K} \sum_k p(x, z_k) / q(z_k \mid x)`, or annealed importance sampling (Neal 2001),
        which needs no good guide but more time.

        Args:
            x: Data, shape ``(N, *event_shape)``.
            context: Context of each datum.
            method: ``"importance"`` or ``"ais"``.
            num_samples: K of the multi-sample bound. Memory does not grow with it.
            seed: Keys the draws.
            batch_size: Rows whose likelihood is evaluated at a time: memory, not results, depends on it.
            compile: ``"eager"``, ``"graph"`` or ``"compiled"``; ``"auto"`` goes by the amount of work, so that equal calls
                give equal bits. The tiers see the same noise and agree to rounding.
            progress: Whether to show a bar on what takes more than two seconds.
            **options: Fields of ``pgen.evaluation.AIS``: ``num_temps``, ``num_chains``, ``leapfrog``...

        Returns:
            A Score of kind ``exact`` or ``lower_bound``.
        """
        check_positive("num_samples", num_samples)
        check_positive("batch_size", batch_size, allow_none=True)
        settings = AIS.of(method, options)
        batch = self._batch("x", x, context)
        self._check_support(batch)
        measure = self._measure(batch)
        size = self._event_size(batch)
        asked = self._asked(seed, compile, progress)
        device = next(self.parameters()).device
        with isolated(self.home), _evaluating(self), torch.no_grad(), keyed_rng(key(asked["seed"], "log_prob"), device):
            prepared, change = self._prepared(batch)
            log_det = 0.0 if change is None else change.double()
            model, guide = (self.marginal, _Empty()) if self._closed and settings is None else self.programs()
            latents = run_program(guide, take(prepared, slice(0, 1)))
            estimated = _estimated(latents, settings)
            if settings is not None:
                found = anneal(*self.programs(), prepared, settings, **asked)
                chains = settings.num_chains
                return Score(found.value + log_det, "lower_bound", size, found.error, chains, measure)
            draws = int(num_samples) if latents else 1
            if self.unit_rows > UNIT_ROWS and compile == "auto":
                asked["compile"] = "eager"
            value, error = importance_bound(
                model, guide, prepared, draws, batch_size=batch_size, unit_rows=self.unit_rows, estimated=estimated, **asked
            )
        if not latents:
            return Score(value + log_det, "lower_bound" if self._mass_bound else "exact", size, measure=measure)
        return Score(value + log_det, "lower_bound", size, error, num_samples, measure)

    def likelihood_regret(
        self,
        x: Any,
        context: Any = None,
        *,
        steps: int = 100,
        learning_rate: float = 0.05,
        num_samples: int = 64,
        seed: Seed = 0,
        progress: bool = True,
    ) -> Score:
        r"""How much each datum's bound gains when a Gaussian guide is optimised for it alone, in nats.

        .. math:: \operatorname{LR}(x) = \max_q \mathcal{L}(x; q) - \mathcal{L}(x; q_\phi(\cdot \mid x))

        Small where the encoder knows its way, large for data unlike those that it was trained on: a score of strangeness for
        VAEs, where the density alone fails. It also shows how much an amortized guide loses (the amortization gap).

        Args:
            x: Data, shape ``(N, *event_shape)``.
            context: Context of each datum.
            steps: Of Adam, from the encoder's answer.
            learning_rate: Of Adam.
            num_samples: Draws on which the two bounds are compared.
            seed: Keys the noise.
            progress: Whether to show a bar on what takes more than two seconds.

        Returns:
            A Score of kind ``estimate``.

        Raises:
            NotAvailable: If the guide is not a Gaussian with independent coordinates.

        References:
            Xiao, Yan, Amit (2020), Likelihood regret, arXiv:2003.02977, eq. 6; Cremer, Li, Duvenaud (2018), arXiv:1801.03558.
        """
        check_positive("steps", steps)
        check_positive("num_samples", num_samples)
        check_positive("learning_rate", learning_rate, integer=False)
        batch = self._batch("x", x, context)
        self._check_support(batch)
        seed = as_seed(seed)
        with isolated(self.home), _evaluating(self), keyed_rng(key(seed, "prepare"), _device(batch)):
            with torch.no_grad():
                prepared = self.prepare(batch)
            gain, error = regret(
                *self.programs(), prepared, steps=int(steps), learning_rate=learning_rate, num_samples=int(num_samples),
                seed=seed, progress=progress,
            )  # fmt: skip
        return Score(gain, "estimate", math.prod(self.event_shape), error, int(num_samples), "ratio")

    def bdmc(
        self,
        n: int = 64,
        context: Any = None,
        *,
        seed: Seed = 0,
        compile: str = "auto",
        progress: bool = True,
        **options: Any,
    ) -> Sandwich:
        """How exact annealing is for this model: bounds of log p(x) from both sides on ``n`` data that it generates itself.

        A gap below 0.1 nats says that ``log_prob(x, method="ais")`` with the same options is accurate on such data; real data
        may be harder. Densities are those of preprocessed data.

        Args:
            n: Data to simulate.
            context: One context for all, or one for each.
            seed: Keys all noise.
            compile: The tier; ``"auto"`` goes by the amount of work.
            progress: Whether to show a bar on what takes more than two seconds.
            **options: Fields of ``pgen.evaluation.AIS``.

        References:
            Grosse et al. (2015), arXiv:1511.02543; Wu et al. (2017), arXiv:1611.04273, section 4.
        """
        check_positive("n", n)
        settings = AIS.of("ais", options)
        where = {} if context is None and not self.context_dim else {"context": self._context(context, n)}
        asked = self._asked(seed, compile, progress)
        with isolated(self.home), _evaluating(self), torch.no_grad():
            with keyed_rng(key(asked["seed"], "simulate"), next(self.parameters()).device), PlateSize(int(n)):
                drawn = {name: term.value for name, term in run_program(self.model, {"context": None, **where}).items()}
            batch = {"x": drawn.pop("x"), **where}
            return bidirectional(
                *self.programs(), batch, drawn, cast(AIS, settings), event_size=math.prod(self.event_shape), **asked
            )

    def draw(
        self,
        data: Any,
        num_samples: int = 1000,
        seed: Seed = 0,
        context: Any = None,
        *,
        compile: str = "auto",
        progress: bool = True,
    ) -> Draws:
        """Draws of the latents of ``data`` from the guide, with the log-densities that weigh them."""
        check_positive("num_samples", num_samples)
        batch = self._batch("data", data, context)
        self._check_support(batch)
        options = self._asked(seed, compile, progress)
        with isolated(self.home), _evaluating(self), torch.no_grad():
            with keyed_rng(key(options["seed"], "prepare"), _device(batch)):
                prepared, log_det = self._prepared(batch)
            draws = draw_posterior(*self.programs(), prepared, int(num_samples), **options)
        return draws if log_det is None else _in_user_units(draws, batch["x"], log_det.double())

    def posterior(
        self,
        x: Any,
        num_samples: int = 1000,
        *,
        context: Any = None,
        seed: Seed = 0,
        compile: str = "auto",
        progress: bool = True,
    ) -> xarray.DataTree:
        """Draws of the latents given x as a DataTree, dims ``(chain=1, draw, data, ...)``."""
        from .diagnostics.convert import to_datatree

        draws = self.draw(x, num_samples, seed, context, compile=compile, progress=progress)
        if not draws.values:
            raise self._without_latents("posterior")
        return to_datatree(draws, run=self.last_run)

    def predict(
        self,
        data: Any,
        num_samples: int = 100,
        seed: Seed = 0,
        context: Any = None,
        *,
        compile: str = "auto",
        progress: bool = True,
    ) -> dict[str, Tensor]:
        """Replicated data x_rep ~ p(x | z), z ~ q(z | x): ``{"x": (S, N, *event_shape)}`` in the units of the data."""
        check_positive("num_samples", num_samples)
        batch = self._batch("data", data, context)
        options = self._asked(seed, "eager" if self.stepwise else compile, progress)
        with isolated(self.home), _evaluating(self), torch.no_grad(), self._stepping(compile, progress):
            with keyed_rng(key(options["seed"], "prepare"), _device(batch)):
                prepared = cast(dict[str, Any], self.prepare(batch))
                latents = run_program(self.guide, take(prepared, slice(0, 1))) if self.stepwise else {}
            beside = self.stepwise and all(term.local for term in latents.values())
            out = draw_predictive(*self.programs(), prepared, int(num_samples), beside=beside, **options)
        if self.preprocess is not None:
            shape = out["x"].shape
            out["x"] = self.preprocess.inverse(out["x"].reshape(-1, *shape[2:])).reshape(shape)
        return out

    def _generated(
        self, data: Any, num_samples: int, seed: Seed, context: Any, *, most: Callable[[int], int] | None = None, **options: Any
    ) -> dict[str, Tensor]:
        """Draws of x, each given the context of a datum: replicates of a model whose draws depend on nothing else.

        ``most`` gives for N data how many draws there are to be at most; more repeat them. With a context each datum has as
        many draws of its own, ``most(N) // N``, and its replicates repeat these.
        """
        check_positive("num_samples", num_samples)
        batch = cast(dict[str, Any], self._batch("data", data, context))
        wanted, rows = int(num_samples), len(batch["x"])
        drawn = wanted * rows if most is None else min(wanted * rows, most(rows))
        own, where = wanted, None  # draws of each datum's own context
        if "context" in batch:
            own = max(drawn // rows, 1)
            drawn, where = own * rows, batch["context"].repeat(own, 1)
        x = self.sample(drawn, where, seed=seed, **options)
        if drawn < wanted * rows:
            with keyed_rng(key(as_seed(seed), "replicates"), x.device):
                if where is None:
                    chosen = torch.randint(drawn, (wanted * rows,), device=x.device)
                else:
                    chosen = torch.randint(own, (wanted, rows), device=x.device) * rows + torch.arange(rows, device=x.device)
                x = x[chosen.flatten()]
        return {"x": x.reshape(wanted, rows, *self.event_shape)}

    def encode(self, x: Any, context: Any = None, *, seed: Seed = 0, progress: bool = True) -> Tensor:
        """Posterior means of the latents under the guide, ``(N, latent size)``."""

        def encoded(batch: Batch) -> Tensor:
            means = self._means(batch)
            if not means:
                raise self._without_latents("encode")
            return torch.cat([v.reshape(len(v), -1) for v in means.values()], -1)

        return self._rows(encoded, "encode", self._batch("x", x, context), seed, progress)

    def _without_latents(self, question: str) -> NotAvailable:
        """What to say to a question about latents where there are none, or where all are summed out."""
        return NotAvailable(
            f"{type(self).__name__} has no latent variables, so there is no {question}; ask for log_prob(x), or a VAE"
        )

    def _rows(
        self,
        fn: Callable[[Batch], Tensor],
        name: str,
        batch: dict[str, Tensor],
        seed: Seed,
        progress: bool,
        compile: str = "auto",
    ) -> Tensor:
        """``fn`` of preprocessed rows, some at a time."""
        options = self._asked(seed, compile, progress)
        with isolated(self.home), _evaluating(self), torch.no_grad():
            with keyed_rng(key(options["seed"], "encode"), _device(batch)):
                prepared = self.prepare(batch)
            return by_rows(fn, prepared, ENCODE_ROWS, name=name, **options)

    def _means(self, batch: Batch) -> dict[str, Tensor]:
        terms = run_program(self.guide, batch)
        return {name: _mean(term) for name, term in terms.items() if not term.auxiliary}

    def reconstruct(self, x: Any, context: Any = None, *, seed: Seed = 0, progress: bool = True) -> Tensor:
        """Mean of p(x | z) at the posterior mean of z, in the units of the data, ``(N, *event_shape)``."""

        def reconstructed(batch: Batch) -> Tensor:
            means = self._means(batch)
            if not means:
                raise self._without_latents("reconstruct")
            with PlateSize(batch_length(batch)), At(means):
                return _mean(run_program(self.model, {**cast(dict[str, Any], batch), "x": None})["x"])

        out = self._rows(reconstructed, "reconstruct", self._batch("x", x, context), seed, progress)
        return out if self.preprocess is None else self.preprocess.inverse(out)

    # -- files --------------------------------------------------------------------------------------------------------

    def _check_savable(self) -> None:
        """Refuse what no file can hold; a family that takes modules of one's own refines it."""

    def save(self, path: str | Path) -> None:
        """Write settings, parameters and preprocessing to one file that executes nothing when read.

        Raises:
            ValueError: If the class has no ``family`` of its own under which ``pgen.load`` would find it again.
        """
        _check_savable(self)
        dtype = str(next(self.parameters()).dtype).removeprefix("torch.")
        self._write(path, {"family": self.family, "settings": self.settings(), "dtype": dtype})


def _check_complete(
    cls: type[GenerativeModel], accepted: Sequence[inspect.Parameter], args: tuple[Any, ...], settings: dict[str, Any]
) -> None:
    """Name the arguments without a default that were not given."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    by_place = [p.name for p in accepted if p.kind in kinds][: len(args)]
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [p.name for p in accepted if p.default is p.empty and p.kind not in variable]
    if missing := [name for name in needed if name not in by_place and name not in settings]:
        found = f", or let {cls.__name__}.for_data(x) choose" if "event_shape" in needed else ""
        lacks = ", ".join(f"`{name}`" for name in missing)
        raise TypeError(f"{cls.__name__}({', '.join(needed)}, ...) is missing {lacks}: give it{found}")


def _of_overflow(x: Tensor) -> str:
    """What to do about numbers whose squares their dtype does not hold; nothing where it does."""
    largest = float(x.abs().max())
    if largest**2 < torch.finfo(x.dtype).max:
        return ""
    dtype = str(x.dtype).removeprefix("torch.")
    return f": x reaches {largest:.2g}, whose square {dtype} does not hold; use preprocess=pgen.data.Standardize() or rescale x"


def fewer_draws(num_data: int) -> int:
    """Draws of a sampler that takes its time, from which any number of replicates of N data is drawn: ``max(2000, 10 N)``.

    Means of replicates then have a standard deviation of 1.05 times what they have where every datum is a draw of its own.
    """
    return max(2000, 10 * num_data)


def _mean(term: Term) -> Tensor:
    """Mean of a site's distribution; of categories, the mean of their numbers 0, 1, ..."""
    base = innermost(term.fn)
    if isinstance(base, torch.distributions.Categorical):
        return base.probs @ torch.arange(base.probs.shape[-1]).to(base.probs)
    return term.fn.mean


def _in_user_units(draws: Draws, x: Tensor, log_det: Tensor) -> Draws:
    """Densities of x itself instead of preprocessed x."""
    rows = draws.log_p_rows
    return replace(
        draws,
        observed={**draws.observed, "x": x},
        log_p=draws.log_p + log_det.sum(),
        log_p_rows=None if rows is None else rows + log_det,
        log_likelihood={**draws.log_likelihood, "x": draws.log_likelihood["x"] + log_det},
    )


def _unweighable(draws: Draws) -> str:
    """Why joint draws of a guide have no importance weights; empty where they have."""
    if draws.no_density:
        return f"the guide puts all mass on one point at {draws.no_density[0]!r}"
    return "a plate is subsampled" if draws.subsampled else ""


def _without_latents(*args: Any, **kwargs: Any) -> None:
    """A guide of nothing."""


class Pair(_Questions):
    r"""Any two Pyro programs, with the questions of ``GenerativeModel`` that make sense for them.

    Args:
        model: A function or module that makes ``pyro.sample`` statements. Rows of data that are to be subsampled lie in
            ``pyro.plate("data", len(y))``.
        guide: A program with the same arguments; one of Pyro's autoguides; or the name of an automatic guide:
            ``"mean_field"`` (the default), ``"low_rank"``, ``"full_rank"``, ``"flow"``; or ``"ladder"``, with which the first
            fit climbs these in turn until importance weights can repair one, and ``pair.ladder`` says what it found.

    Example:
        >>> import pyro.distributions as dist
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> pair = Pair(model)
        >>> y = torch.tensor([1.0, 2.0, 3.0])
        >>> run = pair.fit(y, steps=1000, progress=False)
        >>> round(float(pair.posterior(y)["posterior"]["mu"].mean()), 0)
        2.0
    """

    default_steps = 2000

    def __init__(self, model: Callable[..., Any], guide: Callable[..., Any] | str | None = None) -> None:
        super().__init__()
        if not callable(model):
            raise TypeError(f"`model` should be a Pyro program (a function or a module), got {type(model).__name__}")
        self.preprocess, self.last_run, self.primed = None, None, False
        self.home = ParameterHome()
        self.ladder: Ladder | None = None
        self.prior_draws = 25  # whose median an automatic guide starts at
        self._before: list[nn.Module] = []  # the rung that the next one starts from
        self.guide_name = "mean_field" if guide is None else guide if isinstance(guide, str) else ""
        if self.guide_name:
            check_choice("guide", self.guide_name, (*AUTOMATIC, "ladder"))
        elif not callable(guide):
            raise TypeError(f"`guide` should be a Pyro program or one of {', '.join(AUTOMATIC)}, got {type(guide).__name__}")
        self._model = model
        self._guide: Callable[..., Any] | None = None if self.guide_name else cast(Callable[..., Any], guide)
        for program in (model, guide):
            if callable(program):
                self.home.adopt(closure_modules(program))
            if isinstance(program, nn.Module):
                localize(program)
        localize(self.home)
        self._pending: tuple[dict[str, Tensor], dict[str, Any]] | None = None
        self._shapes: dict[str, Any] = {}
        self._beginning = False

    def programs(self) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """The two programs."""
        if self._guide is None and self._beginning:  # what begins at the data asks the model alone
            return self._model, _without_latents
        if self._guide is None:
            raise ValueError("this pair has not seen data yet; call fit first")
        return self._model, self._guide

    def _begun(self, objective: Any, *args: Any) -> Any:
        self._beginning = True
        try:
            return super()._begun(objective, *args)
        finally:
            self._beginning = False

    def _default_optimizer(self, settings: Training) -> tuple[Adam, Training]:
        converge = settings.stop == "converged"
        schedule = "cosine" if settings.schedule is None and not converge else settings.schedule
        written = set(self._guide.modules()) if self.guide_name and isinstance(self._guide, nn.Module) else set()
        found = (getattr(module, "weight", None) for module in self.modules() if module not in written)
        weights = sum(weight.numel() for weight in found if isinstance(weight, Tensor))
        if weights > 1000:  # networks: a rate for a handful of variational parameters would blow them up
            return Adam(1e-3), settings
        bent = isinstance(self._guide, Flow) and len(self._guide.shared) > 0
        return Adam((0.01 if bent else 0.02) * ((2 if bent else 5) if converge else 1)), replace(settings, schedule=schedule)

    def _tolerance(self, num_data: int) -> float:
        return 0.05 / num_data

    def default_objective(self) -> ELBO:
        """The ELBO; guides with many parameters get several draws a step."""
        return ELBO(8 if self.guide_name in ("low_rank", "full_rank", "flow") else 1)

    def _divisible(self, batch: Batch) -> bool:
        return False

    def fit(
        self,
        data: Any = (),
        *,
        validation: Any = None,
        objective: Any = None,
        optimizer: Any = None,
        epochs: float | None = None,
        steps: int | None = None,
        batch_size: int | None = None,
        seed: Seed = 0,
        checkpoint: str | Path | None = None,
        callbacks: Sequence[Callback] = (),
        progress: bool = True,
        training: Training | None = None,
        **options: Any,
    ) -> Run:
        """Fit the guide (and the model's own parameters) by stochastic variational inference.

        Args:
            data: The programs' arguments: a tensor, a tuple (by position) or a dict (by name) of arrays of equal length; or a
                source of them larger than memory, see ``GenerativeModel.fit``.
            validation: Held-out arguments.
            objective: ``pgen.ELBO()`` by default (8 draws a step for automatic guides other than mean-field), or
                ``pgen.IWAE(k)``.
            optimizer: As for ``GenerativeModel.fit``. Default: Adam at 0.02 (0.01 for the flow guide) with a cosine
                schedule to zero; where programs of your own have networks of more than 1000 weights,
                Adam at 1e-3.
            epochs: Passes over the data.
            steps: Optimizer steps (default 2000).
            batch_size: Data a step; the plate ``"data"`` is rescaled to the whole data set. Default: all.
            seed: Keys initial values, order and noise.
            checkpoint: A folder to save progress in and to resume from.
            callbacks: Objects told of progress.
            progress: Whether to show a progress bar on fits that take longer than a moment.
            training: Grouped options; ``options`` override its fields by name.
            **options: Fields of ``pgen.Training``.

        Returns:
            A Run. The bound (the log-likelihood where there are no latents) is in nats a datum; ``print(run)`` shows the
            total too. With ``guide="ladder"`` it is that of the rung that is kept; each rung is trained until it has converged,
            or for as many steps as are given.
        """
        batch, source = self._opened(data, batch_size, lambda rows, numbers: self._checked("data", rows, numbers))
        batch = self._placed(batch)
        held_out = None if validation is None else self._batch("validation", validation)
        arguments: dict[str, Any] = {
            "objective": objective, "optimizer": optimizer, "epochs": epochs, "steps": steps, "batch_size": batch_size,
            "seed": seed, "checkpoint": checkpoint, "callbacks": callbacks, "progress": progress, "training": training,
            "options": options, "source": source,
        }  # fmt: skip
        if self.guide_name == "ladder":
            return self._climb(batch, held_out, arguments)
        return self._fit(batch, held_out, **arguments)

    def _climb(self, batch: Batch, validation: Batch | None, arguments: dict[str, Any]) -> Run:
        """Fit one rung after another, each from where the one before ended; keep the guide that the ladder chooses."""
        if arguments["source"] is not None:
            raise ValueError("guide='ladder' weighs draws on all data at once, so it needs them as arrays, not as a source")
        if arguments["epochs"] is None and arguments["steps"] is None and arguments["training"] is None:
            arguments["options"] = {"stop": "converged", **arguments["options"]}
        folder, kept = arguments["checkpoint"], {}

        def train(name: str) -> Run:
            self._before = [guide for guide in (self._guide,) if isinstance(guide, nn.Module)]
            self.guide_name, self._guide, self._shapes, self.home.open = name, None, {}, True
            where = {} if folder is None else {"checkpoint": Path(folder) / name}
            run = self._fit(batch, validation, **{**arguments, **where})
            models = {key: value.clone() for key, value in self.state_dict().items() if not key.startswith("_guide.")}
            kept[name] = self._guide, self._shapes, run, models
            return run

        try:
            self.ladder = climb(tuple(AUTOMATIC), train, lambda n: self.draw(batch, n, arguments["seed"]), self._needless)
        finally:
            self._before = []
        self.guide_name = self.ladder.chosen
        self._guide, self._shapes, self.last_run, models = kept[self.guide_name]
        self.load_state_dict(models, strict=False)
        return cast(Run, self.last_run)

    def _needless(self, name: str) -> str:
        """Why a rung after the first need not, or cannot, be tried."""
        size = getattr(self._guide, "size", 0)
        if size == 0:
            return "no latent is shared between data, so every guide is the same"
        if name in ("full_rank", "flow") and size > MAX_FULL:
            return f"its matrix for {size} latents would be too large"
        return "one latent has no correlation" if size == 1 and name != "flow" else ""

    def _batch(self, argument: str, data: Any) -> Batch:
        return self._placed(self._checked(argument, data))

    def _checked(self, argument: str, data: Any, numbers: Tensor | None = None) -> Batch:
        batch = as_batch(data)
        _refuse_source(argument, batch)
        if batch_length(batch) == 0:
            raise ValueError(f"`{argument}` is empty; give the programs' arguments as a tensor, a tuple or a dict of arrays")
        check_finite(batch, argument, numbers)
        return batch

    def _placed(self, batch: Batch) -> Batch:
        reference: Tensor | None = next(self.parameters(), None)
        if reference is None and self._pending is not None:
            reference = next((t for t in self._pending[0].values() if t.is_floating_point()), None)
        return batch if reference is None else place(batch, reference.device, reference.dtype)

    def materialize(self, batch: Batch, num_data: int, *, minibatch: bool) -> None:
        """Make the automatic guide where one was asked for, run both programs once, and take in a loaded state."""
        if self._shapes:
            return
        with isolated(self.home):
            if self._guide is None:
                self._guide = self._automatic(batch, num_data, minibatch)
            index = torch.arange(batch_length(batch), device=_device(batch)) if minibatch else None
            try:
                with rows_at(index):
                    call(self._guide, batch)
                    call(self._model, batch)
            except (ValueError, RuntimeError) as error:
                raise _one_line(error) from error
        self.home.open = False
        self._shapes = {"num_data": num_data, "minibatch": minibatch}
        if getattr(self._guide, "bound_to_rows", False):
            self._shapes["rows"] = self._pending[1]["shapes"].get("rows", "") if self._pending is not None else ""
        if self._pending is not None:
            self._restore(*self._pending)

    def _automatic(self, batch: Batch, num_data: int, minibatch: bool) -> nn.Module:
        try:
            latents = list(run_latents(self._model, batch).values())
        except (ValueError, RuntimeError) as error:
            raise _one_line(error) from error
        if not latents:
            return _Empty()
        draws = vectorize(lambda: {n: t.value for n, t in run_latents(self._model, batch).items()}, self.prior_draws)
        made = [Latent.from_term(term, draws[term.name], minibatch) for term in latents]
        guide = AUTOMATIC[self.guide_name](made, num_data)
        for before in self._before:
            guide.start_at(cast(Any, before))
        return cast(nn.Module, guide)

    def _check_divisible(self, micro_batches: int) -> None:
        if self.guide_name not in ("", "mean_field") and len(getattr(self._guide, "tables", [])) > 0:
            raise ValueError(
                f"`guide` {self.guide_name!r} joins the latents of all rows, which {micro_batches} micro-batches tear apart: "
                f"fit it in one process, or take 'mean_field'"
            )

    def _fitted_to(self, data: Batch | DataSource) -> None:
        if getattr(self._guide, "bound_to_rows", False):
            self._shapes["rows"] = fingerprint(data)

    def _knows(self, batch: Batch) -> bool:
        """Whether the guide can say something of these rows: all but one with parameters of each training row can."""
        return self._shapes.get("rows", "") in ("", fingerprint(batch))

    def _ready(self, batch: Batch, *, any_rows: bool = False) -> None:
        """Take in a loaded state at the first question; a guide with parameters of each row answers for those rows alone."""
        if not self._shapes and self._pending is not None:
            shapes = self._pending[1]["shapes"]
            with keyed_rng(0), torch.no_grad():
                self.materialize(batch, shapes["num_data"], minibatch=shapes["minibatch"])
        self.programs()
        if not any_rows and not self._knows(batch):
            raise NotAvailable(
                "the automatic guide has latents of its own for each training row and does not know these rows; "
                "an amortized guide (a function of the data) can answer for new data"
            )

    # -- questions ----------------------------------------------------------------------------------------------------

    def draw(
        self, data: Any, num_samples: int = 1000, seed: Seed = 0, *, compile: str = "auto", progress: bool = True
    ) -> Draws:
        """Draws of the latents given ``data`` from the guide, with the log-densities that weigh them."""
        check_positive("num_samples", num_samples)
        batch = self._batch("data", data)
        self._ready(batch)
        options = self._asked(seed, compile, progress)
        with isolated(self.home), _evaluating(self), torch.no_grad():
            return draw_posterior(*self.programs(), batch, int(num_samples), **options)

    def posterior(
        self, data: Any, num_samples: int = 1000, *, seed: Seed = 0, compile: str = "auto", progress: bool = True
    ) -> xarray.DataTree:
        """Draws of the latents given ``data`` as a DataTree, dims ``(chain=1, draw, ...)``."""
        from .diagnostics.convert import to_datatree

        draws = self.draw(data, num_samples, seed, compile=compile, progress=progress)
        if not draws.values:
            raise NotAvailable("this pair has no latent variables, so there is no posterior; ask for log_prob(data)")
        return to_datatree(draws, run=self.last_run)

    def predict(
        self, data: Any, num_samples: int = 1000, seed: Seed = 0, *, compile: str = "auto", progress: bool = True
    ) -> dict[str, Tensor]:
        """Posterior predictive draws of each observed site, ``(S, *shape)``, in chunks of bounded memory.

        The observed argument may be left out where the program allows it: ``predict({"x": x_new})`` for ``model(x, y=None)``.
        An automatic guide with latents of its own for each training row knows nothing of the latents of other rows: those are
        drawn from the model, given the latents that all data share.
        """
        check_positive("num_samples", num_samples)
        batch = self._batch("data", data)
        self._ready(batch, any_rows=True)
        guide, local = self.programs()[1], ()
        if not self._knows(batch):
            guide, local = cast(Any, guide).shared_alone, cast(Any, guide).local_names
        options = self._asked(seed, compile, progress)
        with isolated(self.home), _evaluating(self), torch.no_grad():
            return draw_predictive(self._model, guide, batch, int(num_samples), local=local, **options)

    def sample(self, n: int, data: Any, *, seed: Seed = 0, compile: str = "auto", progress: bool = True) -> dict[str, Tensor]:
        """Draws of each observed site with the latents from the *prior*, given the programs' arguments: ``(n, *shape)``."""
        check_positive("n", n)
        batch = self._batch("data", data)
        self._ready(batch)
        options = self._asked(seed, compile, progress)
        with isolated(self.home), _evaluating(self), torch.no_grad():
            with keyed_rng(key(options["seed"], "names"), _device(batch)), rows_at(None):
                latents = run_program(self.programs()[1], batch)
            return draw_predictive(self._model, _Empty(), batch, int(n), local=latents, **options)

    def log_prob(
        self,
        data: Any,
        *,
        method: str = "importance",
        num_samples: int = 100,
        seed: Seed = 0,
        batch_size: int | None = None,
        compile: str = "auto",
        progress: bool = True,
        **options: Any,
    ) -> Score:
        """Each datum's log-density by a lower bound, where every latent lies in the data plate.

        The arguments are those of ``GenerativeModel.log_prob``.

        Raises:
            NotAvailable: If data share a latent: then the question to ask is the posterior's.
        """
        check_positive("num_samples", num_samples)
        check_positive("batch_size", batch_size, allow_none=True)
        settings = AIS.of(method, options)
        batch = self._batch("data", data)
        self._ready(batch)
        asked = self._asked(seed, compile, progress)
        with isolated(self.home), _evaluating(self), torch.no_grad():
            with keyed_rng(key(asked["seed"], "log_prob"), _device(batch)):
                traces = run_pair(*self.programs(), batch)
            shared = [name for name, term in {**traces.model, **traces.guide}.items() if not term.local]
            if shared:
                raise NotAvailable(f"data share {shared[0]!r}, so no datum has a density of its own; ask for posterior(data)")
            size = sum(math.prod(t.fn.event_shape) for t in traces.likelihoods.values())
            measures = {term.measure for term in traces.likelihoods.values()}
            measure: Measure = measures.pop() if len(measures) == 1 else ""
            estimated = _estimated({**traces.model, **traces.guide}, settings)
            if settings is not None:
                found = anneal(*self.programs(), batch, settings, **asked)
                return Score(found.value, "lower_bound", size, found.error, settings.num_chains, measure)
            value, error = importance_bound(
                *self.programs(), batch, int(num_samples) if traces.guide else 1, batch_size=batch_size,
                unit_rows=batch_length(batch) if self._shapes.get("rows") else UNIT_ROWS, estimated=estimated, **asked,
            )  # fmt: skip
        if not traces.guide:
            return Score(value, "exact", size, measure=measure)
        return Score(value, "lower_bound", size, error, num_samples, measure)

    def log_evidence(
        self,
        data: Any,
        *,
        method: str = "ais",
        num_samples: int = 1000,
        seed: Seed = 0,
        compile: str = "auto",
        progress: bool = True,
        **options: Any,
    ) -> Score:
        r"""log p(data), all latents integrated out: one number for the whole data set, a lower bound in expectation.

        Args:
            data: The programs' arguments.
            method: ``"ais"``, or ``"importance"``: the multi-sample bound with draws of the guide.
            num_samples: Draws of the guide for ``"importance"``.
            seed: Keys all noise.
            compile: The tier; ``"auto"`` goes by the amount of work.
            progress: Whether to show a bar on what takes more than two seconds.
            **options: Fields of ``pgen.evaluation.AIS``.

        References:
            Neal (2001), Statistics and Computing 11:125; Burda et al. (2016), arXiv:1509.00519, eq. 8.
        """
        check_positive("num_samples", num_samples)
        settings = AIS.of(method, options)
        if settings is None:
            draws = self.draw(data, num_samples, seed, compile=compile, progress=progress)
            if reason := _unweighable(draws):
                raise NotAvailable(f"{reason}, so its draws have no importance weights; use method='ais'")
            size = sum(value.numel() for value in draws.observed.values())
            value, error = log_mean(draws.log_weight[:, None])
            return Score(value, "lower_bound", size, error, num_samples)
        batch = self._batch("data", data)
        self._ready(batch, any_rows=settings.initial == "prior")
        with isolated(self.home), _evaluating(self), torch.no_grad():
            found = anneal(*self.programs(), batch, settings, by_rows=False, **self._asked(seed, compile, progress))
            size = self._observed_size(batch)
        return Score(found.value, "lower_bound", size, found.error, settings.num_chains)

    def _observed_size(self, batch: Batch) -> int:
        with keyed_rng(0, _device(batch)), rows_at(None):
            return sum(term.value.numel() for term in run_program(self._model, batch).values() if term.observed)

    def bdmc(self, data: Any, *, seed: Seed = 0, compile: str = "auto", progress: bool = True, **options: Any) -> Sandwich:
        """How exact annealing is for this model: bounds from both sides on data that it generates itself.

        Of each datum where every latent lies in the data plate, else of the whole data set. See ``GenerativeModel.bdmc``.

        Args:
            data: The programs' arguments; what the model observes is replaced by a simulation.
            seed: Keys all noise.
            compile: The tier; ``"auto"`` goes by the amount of work.
            progress: Whether to show a bar on what takes more than two seconds.
            **options: Fields of ``pgen.evaluation.AIS``.
        """
        settings = cast(AIS, AIS.of("ais", options))
        batch = self._batch("data", data)
        self._ready(batch, any_rows=settings.initial == "prior")
        asked = self._asked(seed, compile, progress)
        with isolated(self.home), _evaluating(self), torch.no_grad():
            with keyed_rng(key(asked["seed"], "simulate"), _device(batch)), rows_at(None):
                terms = run_program(self._model, batch).values()
                batch, latents = simulate(self._model, batch)
            by_rows = all(term.local for term in terms)
            size = self._observed_size(batch) // (batch_length(batch) if by_rows else 1)
            return bidirectional(*self.programs(), batch, latents, settings, by_rows=by_rows, event_size=size, **asked)

    # -- files --------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write the state of both programs; it is loaded into the same code by ``Pair(model, guide).load(path)``."""
        if not self._shapes:
            raise ValueError("this pair has not been fitted yet; there is nothing to save")
        self._write(path, {"family": "pair", "guide": self.guide_name, "shapes": self._shapes})

    def load(self, path: str | Path) -> Pair:
        """Take in the state that ``save`` wrote; returns the pair itself.

        The state is checked against the programs at once if they have run, else at the first question.
        """
        tensors, metadata = files.read(path)
        if metadata.get("family") != "pair":
            raise ValueError(f"{path} holds the family {metadata.get('family')!r}; use pgen.load(path)")
        if self.guide_name == "ladder" and metadata["guide"] in AUTOMATIC:
            self.guide_name = metadata["guide"]
        if metadata["guide"] != self.guide_name:
            raise ValueError(
                f"{path} was saved with the guide {metadata['guide'] or 'of your own'!r}, this pair has {self.guide_name!r}"
            )
        self._pending = tensors, metadata
        self.to(next((t.dtype for t in tensors.values() if t.is_floating_point()), torch.float32))
        if self._shapes:
            self._restore(*self._pending)
        return self

    def _restore(self, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        self.to(next((t.dtype for t in tensors.values() if t.is_floating_point()), torch.float32))
        load_state(self, tensors, "the file")
        self._pending, self.primed = None, True


def _estimated(terms: Mapping[str, Term], settings: AIS | None) -> bool:
    """Whether log-weights are unbiased estimates, whose mean is a bound; annealing needs them exactly."""
    found = next((name for name, term in terms.items() if term.estimated), None)
    if found is not None and settings is not None:
        raise NotAvailable(f"site {found!r} estimates its log-density, so there is nothing to anneal; leave method='ais' out")
    return found is not None


class _Empty(nn.Module):
    """A guide without latents."""

    def forward(self, *args: Any, **kwargs: Any) -> None:
        """No statement."""


def load_state(module: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Copy tensors into a module, names and shapes checked first."""
    state = module.state_dict()
    missing, unknown = sorted(state.keys() - tensors.keys()), sorted(tensors.keys() - state.keys())
    if missing or unknown:
        what = f"lacks {missing[0]!r}" if missing else f"has {unknown[0]!r}, which the model has not"
        raise ValueError(f"{source} does not fit this model: it {what} ({len(missing)} missing, {len(unknown)} unknown)")
    for name, tensor in state.items():
        if tensor.shape != tensors[name].shape:
            raise ValueError(f"{source} has {name!r} of shape {tuple(tensors[name].shape)}, the model {tuple(tensor.shape)}")
    module.load_state_dict(tensors)


_MAX_SETTING = 2**31


def _check_settings(path: Any, value: Any, depth: int = 0) -> None:
    """Settings are plain, bounded values: nothing is built from anything else."""
    if isinstance(value, bool) or value is None:
        return
    if isinstance(value, (int, float)) and abs(value) <= _MAX_SETTING:
        return
    if isinstance(value, str) and len(value) <= 100:
        return
    if isinstance(value, (list, dict)) and len(value) <= 1000 and depth < 8:
        for item in value.values() if isinstance(value, dict) else value:
            _check_settings(path, item, depth + 1)
        return
    raise ValueError(f"{path}: a setting is out of bounds: {str(value)[:40]!r}")


def load(path: str | Path) -> GenerativeModel:
    """Load a model that ``save`` wrote. Nothing that the file brings is executed.

    Args:
        path: The file.

    Returns:
        The model, on the CPU.

    Raises:
        ValueError: If the file is damaged, hostile, or of an unknown family; in one line.
    """
    metadata = files.read_metadata(path)
    if metadata.get("family") == "pair":
        raise ValueError(f"{path} holds the state of a pair of your own; load it with pgen.Pair(model, guide).load(path)")
    _check_settings(path, metadata.get("settings", {}))
    load_composite = COMPOSITES.get(str(metadata.get("family")))
    if load_composite is None:
        _check_family(metadata, path)
        return built(metadata, files.read(path)[0], path)
    try:
        return load_composite(metadata, files.read(path)[0], path)
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: settings do not fit a {metadata['family']}: {str(error)[:80]}") from error


def description(model: GenerativeModel) -> dict[str, Any]:
    """What ``built`` needs of a model beside its tensors: family, settings and preprocessing, as plain JSON."""
    _check_savable(model)
    preprocess = None if model.preprocess is None else model.preprocess.settings()
    return {"family": model.family, "settings": model.settings(), "preprocess": preprocess}


def _check_savable(model: nn.Module) -> None:
    """Refuse a model of which a part is one that no file can hold."""
    for part in model.modules():
        if isinstance(part, GenerativeModel):
            if not vars(type(part)).get("family"):
                what = f"{type(part).__name__} has no name in the registry of families"
                raise ValueError(f"{what}; set `family = ...` in the class to save it")
            part._check_savable()


def _check_family(metadata: Any, path: Any) -> None:
    family = metadata.get("family") if isinstance(metadata, dict) else None
    if not isinstance(family, str) or family not in FAMILIES:
        raise ValueError(f"{path}: unknown family {str(family)[:40]!r}{nearest(str(family)[:40], FAMILIES)}")


def built(metadata: dict[str, Any], tensors: dict[str, Tensor], path: Any) -> GenerativeModel:
    """A model from its ``description`` and its tensors, sizes checked before anything is allocated.

    Raises:
        ValueError: If the family is unknown, or settings and tensors do not fit it.
    """
    _check_family(metadata, path)
    family, settings = metadata["family"], metadata.get("settings", {})
    try:
        with torch.device("meta"):
            _check_outline(FAMILIES[family](**settings), tensors, path)
        before: dict[str, Any] = {"preprocess": from_settings(metadata["preprocess"])} if metadata.get("preprocess") else {}
        model = FAMILIES[family](**settings, **before)
    except (TypeError, KeyError) as error:
        raise ValueError(f"{path}: settings do not fit the family {family}: {str(error)[:80]}") from error
    if model.preprocess is not None:
        for name, buffer in model.preprocess.named_buffers():
            if f"preprocess.{name}" in tensors and buffer.shape != tensors[f"preprocess.{name}"].shape:
                owner = model.preprocess.get_submodule(name.rpartition(".")[0])
                setattr(owner, name.rpartition(".")[2], torch.empty_like(tensors[f"preprocess.{name}"]))
    dtype = next(
        (t.dtype for n, t in tensors.items() if t.is_floating_point() and not n.startswith("preprocess")), torch.float32
    )
    model.to(dtype)
    load_state(model, tensors, str(path))
    model.primed = True
    return model


def _check_outline(outline: nn.Module, tensors: dict[str, Tensor], path: Any) -> None:
    """Compare shapes on the meta device, before anything is allocated."""
    for name, tensor in outline.state_dict().items():
        if name.startswith("preprocess."):
            continue
        if name not in tensors or tensors[name].shape != tensor.shape:
            got = tuple(tensors[name].shape) if name in tensors else "nothing"
            raise ValueError(f"{path}: {name} should have shape {tuple(tensor.shape)}, the file has {got}")
