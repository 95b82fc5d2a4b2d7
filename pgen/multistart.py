r"""Several starts of one guide, trained in one batched run and compared.

The parameters of all starts are stacked and the loss is evaluated for all of them at once (``torch.func.vmap``), so that a
step costs little more than one start's. Every start begins at a draw of its own from the prior and has noise of its own.

What is promised: the result is a function of the seeds and the settings, and each start is distributed as a fit by itself is.
It is not, to the bit, the fit that ``Pair.fit(seed=...)`` gives: noise is drawn for all starts together, and the start is one
draw of the prior instead of the median of several.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .base import Pair, place
from .contracts import Batch, Draws, Run, check_positive
from .data.batches import key
from .programs import batch_length, vectorize
from .training import Training
from .training.fit import fit as fit_loop

__all__ = ["Restarts", "multistart"]

APART = 0.5
"""Starts whose means differ by more than this many sds, in any latent, ended at different optima."""
DRAWS = 4000


@dataclass
class Restarts:
    """Fits from several starts. ``print`` it for the table.

    Attributes:
        seeds: Of the starts.
        pairs: The fitted pairs, in the order of the seeds.
        bounds: ELBO of the whole data set for each, nats, ``(starts,)``.
        bound_errors: Their Monte Carlo standard errors.
        optima: For each start the number of its optimum, 0 for the one with the best bound.
        unfinished: For each start whether its bound still rose in the last quarter of the steps, by more than half a nat and
            three standard errors: where it ended then says nothing about optima.
        run: Of all starts together; its loss is their sum.
    """

    seeds: list[int]
    pairs: list[Pair]
    bounds: np.ndarray
    bound_errors: np.ndarray
    optima: np.ndarray
    unfinished: np.ndarray
    run: Run

    @property
    def best(self) -> Pair:
        """The pair with the best bound."""
        return self.pairs[int(np.argmax(np.nan_to_num(self.bounds, nan=-np.inf)))]

    @property
    def num_optima(self) -> int:
        """How many optima the starts ended at."""
        return int(self.optima.max()) + 1

    def __str__(self) -> str:
        rows = [
            f"{seed:>6}{f'{bound:.3f} ± {error:.3f}':>22}{optimum + 1:>10}{'  unfinished' if unfinished else ''}"
            for seed, bound, error, optimum, unfinished in zip(
                self.seeds, self.bounds, self.bound_errors, self.optima, self.unfinished
            )
        ]
        words = "one optimum" if self.num_optima == 1 else f"{self.num_optima} optima"
        what = (
            f"{len(self.pairs)} starts ended at {words} ({self.run.steps} steps in {self.run.seconds:.1f} s, {self.run.tier})"
        )
        advice = f"{int(self.unfinished.sum())} still rose at the end: give more `steps`, or a larger `optimizer` rate"
        head = f"{'seed':>6}{'ELBO':>22}{'optimum':>10}"
        return "\n".join([head, *rows, what, *([advice] if self.unfinished.any() else [])])


class _Stack(nn.Module):
    """The parameters of several pairs with one leading axis, trained together."""

    def __init__(self, pairs: Sequence[Pair]) -> None:
        super().__init__()
        self.template = pairs[0]
        self.names = [name for name, p in pairs[0].named_parameters() if p.requires_grad]
        every = [dict(pair.named_parameters()) for pair in pairs]
        self.stacked = [nn.Parameter(torch.stack([p[name].detach() for p in every])) for name in self.names]
        self.num = len(pairs)

    def trainable(self, player: str = "") -> list[nn.Parameter]:
        """The stacked parameters."""
        return self.stacked

    def python_state(self) -> dict[str, str]:
        """The plain Python values that the programs may read and change, as text."""
        return self.template.python_state()

    def changing(self) -> list[Tensor]:
        """Buffers that the programs may change."""
        return list(self.template.buffers())

    def forward(self, objective: Any, batch: Batch, scalars: dict[str, Any]) -> Tensor:
        """Loss of the template with the parameters that it holds."""
        return self.template.loss(objective, batch, scalars)[0]

    def loss(self, objective: Any, batch: Batch, scalars: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum of all starts' losses, so that each has its own gradient, and each of them as a metric."""

        def one(*values: Tensor) -> Tensor:
            held = {f"template.{name}": value for name, value in zip(self.names, values)}
            return torch.func.functional_call(self, held, (objective, batch, scalars))

        losses = vectorize(one, self.num, *self.stacked)
        return losses.sum(), {f"start_{i}": loss.detach() for i, loss in enumerate(losses)}

    def bound_rows(self, objective: Any, batch: Batch, pause: Callable[[], None]) -> tuple[Tensor, Tensor]:
        """Of no use here: restarts take no validation data."""
        raise NotImplementedError

    def identity(self) -> str:
        """What is trained, for a checkpoint (which restarts do not write)."""
        return f"{self.num} starts of {self.template.identity()}"

    def autopsy(self, batch: Batch, index: Tensor | None) -> str:
        """Name the first start with a parameter that is not finite."""
        for i in range(self.num):
            if not all(bool(torch.isfinite(p[i]).all()) for p in self.stacked):
                return f"start {i} has a parameter that is not finite; try a smaller learning rate"
        return "some start's loss or gradient is not finite; try a smaller learning rate or leave its seed out"


def multistart(
    model: Callable[..., Any],
    data: Any,
    *,
    guide: str = "mean_field",
    seeds: int | Sequence[int] = 5,
    objective: Any = None,
    optimizer: Any = None,
    steps: int = 2000,
    batch_size: int | None = None,
    progress: bool = True,
    **options: Any,
) -> Restarts:
    """Fit an automatic guide from several starts in one batched run, and compare where they end.

    Args:
        model: A Pyro program without parameters of its own.
        data: Its arguments, as for ``Pair.fit``.
        guide: ``"mean_field"``, ``"low_rank"``, ``"full_rank"`` or ``"flow"``.
        seeds: One a start; an integer n stands for 0 to n - 1.
        objective: As for ``Pair.fit``.
        optimizer: One of pgen's own, or a learning rate. Default: Adam at 0.1 (0.02 for the flow guide) with a cosine
            schedule: Adam moves a parameter by at most about the rate a step, and starts lie a prior's width from an optimum.
        steps: Optimizer steps. ``Restarts.unfinished`` tells which starts needed more.
        batch_size: Data a step; all by default.
        progress: Whether to show a progress bar.
        **options: Fields of ``pgen.Training``; neither ``clip_norm`` nor ``stop``, which would tie the starts together.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> multistart(model, torch.tensor([1.0, 2.0]), seeds=3, steps=1000, progress=False).num_optima
        1
    """
    chosen = list(range(seeds)) if isinstance(seeds, int) else [int(s) for s in seeds]
    if len(chosen) < 2 or len(set(chosen)) < len(chosen):
        raise ValueError(f"`seeds` should be two or more different integers, or their number, got {seeds!r}")
    check_positive("steps", steps)
    check_positive("batch_size", batch_size, allow_none=True)
    _check_options(options)
    settings = replace(Training(), **options)
    pairs = [Pair(model, guide) for _ in chosen]
    batch = place(pairs[0]._batch("data", data), settings.torch_device(), settings.dtype)
    size = min(batch_size or batch_length(batch), batch_length(batch))
    objective = objective or pairs[0].default_objective()
    for seed, pair in zip(chosen, pairs):
        pair.prior_draws = 1
        pair.to(device=settings.torch_device(), dtype=settings.dtype)
        pair._first_look(batch, size, seed, settings, objective, None, 1)
        pair.to(device=settings.torch_device(), dtype=settings.dtype)
    if list(pairs[0].home.parameters()) or any(p.requires_grad for p in _own(pairs[0])):
        raise ValueError("multistart() restarts guides, but this model has parameters of its own, which the starts would share")
    if optimizer is None:
        optimizer, settings = pairs[0]._default_optimizer(settings)
        optimizer = replace(optimizer, lr=optimizer.lr * (2 if guide == "flow" else 5))  # starts lie a prior's width away
    stack, run = _Stack(pairs), Run()
    fit_loop(
        stack, batch, validation=None, objective=objective, optimizer=optimizer, training=settings, epochs=None, steps=steps,
        batch_size=size, seed=key(*chosen) % 2**31, callbacks=(), progress=progress, run=run,
    )  # fmt: skip
    return _compared(chosen, pairs, stack, batch, run)


def _own(pair: Pair) -> list[nn.Parameter]:
    return list(pair._model.parameters()) if isinstance(pair._model, nn.Module) else []


def _check_options(options: dict[str, Any]) -> None:
    names = [f.name for f in fields(Training)]
    for name in options:
        if name not in names:
            raise TypeError(f"multistart() got an unknown option {name!r} (known: {', '.join(names)})")
        if name in ("clip_norm", "stop", "average", "micro_batches"):
            raise ValueError(f"`{name}` would tie the starts of multistart() together; leave it out")


def _compared(seeds: list[int], pairs: list[Pair], stack: _Stack, batch: Batch, run: Run) -> Restarts:
    """Give each pair its parameters, and tell which ended at the same optimum."""
    draws: list[Draws] = []
    for i, pair in enumerate(pairs):
        held = dict(pair.named_parameters())
        with torch.no_grad():
            for name, values in zip(stack.names, stack.stacked):
                held[name].copy_(values[i])
        history = {**run.history, "loss": run.history[f"start_{i}"]}
        pair.last_run = replace(run, history=history, seed=seeds[i])
        pair._fitted_to(batch)
        draws.append(pair.draw(batch, DRAWS, 0))
    weights = [d.log_weight for d in draws]
    bounds = np.array([float(w.mean()) for w in weights])
    errors = np.array([float(w.std() / math.sqrt(DRAWS)) for w in weights])
    unfinished = np.array([_still_rises(run.history[f"start_{i}"] * run.num_data) for i in range(len(pairs))])
    return Restarts(seeds, pairs, bounds, errors, _optima(draws, bounds), unfinished, run)


def _still_rises(loss: np.ndarray) -> bool:
    """Whether the loss (nats of all data) fell from the third quarter of the steps to the last: half a nat, not by chance."""
    quarter = len(loss) // 4
    if quarter < 2:
        return True
    before, after = loss[-2 * quarter : -quarter], loss[-quarter:]
    error = math.sqrt((before.var() + after.var()) / quarter)
    return bool(before.mean() - after.mean() > max(0.5, 3 * error))


def _optima(draws: list[Draws], bounds: np.ndarray) -> np.ndarray:
    """Number of the optimum of each start, the best bound's first: near in the mean of every latent is the same."""
    flat = [torch.cat([v.reshape(len(v), -1).double() for v in d.values.values()], 1) for d in draws]
    means, sds = torch.stack([x.mean(0) for x in flat]), torch.stack([x.std(0) for x in flat])
    optima, heads = np.zeros(len(draws), dtype=int), list[int]()
    for i in np.argsort(-np.nan_to_num(bounds, nan=-np.inf), kind="stable"):
        for number, head in enumerate(heads):
            pooled = ((sds[i].square() + sds[head].square()) / 2).sqrt().clamp(min=1e-300)
            if float(((means[i] - means[head]).abs() / pooled).max()) < APART:
                optima[i] = number
                break
        else:
            optima[i] = len(heads)
            heads.append(int(i))
    return optima
