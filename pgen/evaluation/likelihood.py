r"""Log-likelihoods by importance sampling, for any number of samples in bounded memory.

Noise is keyed by a fixed unit of rows and samples, so results do not depend on how much is evaluated at a time.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from ..contracts import Batch
from ..data.batches import key
from ..programs import DATA_PLATE, Term, batch_length, keyed_rng, rows_at, run_program, seed_generators, vectorize
from ..training.capture import CaptureRefused, capture

__all__ = ["At", "importance_bound", "row_units", "take"]

UNIT_ROWS = 64
"""Rows that share one noise key."""
UNIT_SAMPLES = 64
"""Samples that share one noise key."""
WORTH_CAPTURING = 100
"""Units of work above which capturing pays."""


class At(Messenger):
    """Runs a program at given values of its sample sites."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] in self.values and not site_is_subsample(msg):
            msg["value"], msg["done"] = self.values[msg["name"]], True


def take(batch: Batch, rows: slice | Tensor) -> Batch:
    """Some rows of every tensor of a batch."""
    return tree_map_only(Tensor, lambda t: t[rows] if t.dim() else t, batch)


def row_units(batch: Batch, size: int = UNIT_ROWS) -> Iterator[tuple[int, slice]]:
    """``(number, rows)`` of the units of a batch."""
    for number, start in enumerate(range(0, batch_length(batch), size)):
        yield number, slice(start, min(start + size, batch_length(batch)))


def importance_bound(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    batch: Batch,
    num_samples: int,
    *,
    seed: int,
    batch_size: int | None = None,
    unit_rows: int = UNIT_ROWS,
) -> tuple[Tensor, Tensor]:
    r"""Each datum's K-sample bound, and its Monte Carlo standard error.

    .. math:: \hat{\mathcal{L}}_K = \log \frac{1}{K} \sum_k w_k, \qquad
        \operatorname{se} = \sqrt{\frac{1}{K} \Bigl(\frac{\overline{w^2}}{\bar{w}^2} - 1\Bigr)} \text{ (delta method)}

    Args:
        model: The model program, all of whose latents lie in the data plate.
        guide: The guide program.
        batch: The data; run inside ``isolated``.
        num_samples: K.
        seed: Keys the noise.
        batch_size: Rows whose likelihood is evaluated at a time; changes memory, not results.
        unit_rows: Rows that share one noise key; all of them for a guide with parameters of each row.

    Returns:
        Bound and standard error, ``(N,)`` each, float64, in nats.

    References:
        Burda et al. (2016), arXiv:1509.00519, eq. 8.
    """
    device = _device(batch)
    weigh = _Weigher(model, guide, batch, num_samples, batch_size)
    bounds, errors = [], []
    for number, rows in row_units(batch, unit_rows):
        unit = take(batch, rows)
        first = second = None
        for chunk, start in enumerate(range(0, num_samples, UNIT_SAMPLES)):
            with keyed_rng(key(seed, "bound", number, chunk), device), rows_at(None), torch.no_grad():
                log_weight = weigh(unit, min(UNIT_SAMPLES, num_samples - start))  # (samples, rows)
            first = _accumulate(first, torch.logsumexp(log_weight, 0))
            second = _accumulate(second, torch.logsumexp(2 * log_weight, 0))
        assert first is not None and second is not None
        bounds.append(first - math.log(num_samples))
        relative = (second - 2 * first + math.log(num_samples)).exp() - 1
        errors.append((relative.clamp(min=0) / num_samples).sqrt() if num_samples > 1 else torch.full_like(relative, math.nan))
    return torch.cat(bounds), torch.cat(errors)


class _Weigher:
    """Log-weights of a unit: captured into a graph where there are many units, run as written otherwise."""

    def __init__(
        self, model: Callable[..., Any], guide: Callable[..., Any], batch: Batch, num_samples: int, batch_size: int | None
    ) -> None:
        self.model, self.guide, self.batch_size = model, guide, batch_size
        self.graph: Callable[..., Any] | None = None
        rows = batch_length(batch)
        units = (rows // UNIT_ROWS) * (num_samples // UNIT_SAMPLES)
        if units >= WORTH_CAPTURING and (batch_size or UNIT_ROWS) >= UNIT_ROWS:
            self._capture(batch)

    def __call__(self, unit: Batch, count: int) -> Tensor:
        if self.graph is not None and count == UNIT_SAMPLES and batch_length(unit) == UNIT_ROWS:
            return self.graph(*tree_leaves(unit))[0]
        return _log_weights(self.model, self.guide, unit, count, self.batch_size)

    def _capture(self, batch: Batch) -> None:
        first, second = take(batch, slice(0, UNIT_ROWS)), take(batch, slice(-UNIT_ROWS, None))
        leaves, spec = tree_flatten(first)
        if not all(isinstance(leaf, Tensor) for leaf in leaves):
            return

        def fn(*tensors: Tensor) -> list[Tensor]:
            return [_log_weights(self.model, self.guide, tree_unflatten(list(tensors), spec), UNIT_SAMPLES, None)]

        device = _device(batch)
        with keyed_rng(0, device), rows_at(None), torch.no_grad(), contextlib.suppress(CaptureRefused):
            self.graph = capture(fn, leaves, tree_leaves(second), lambda k: seed_generators(k, device)).forward


def _device(batch: Batch) -> torch.device:
    return next(leaf.device for leaf in tree_leaves(batch) if isinstance(leaf, Tensor))


def _accumulate(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else torch.logaddexp(total, part)


def _log_weights(
    model: Callable[..., Any], guide: Callable[..., Any], unit: Batch, count: int, batch_size: int | None
) -> Tensor:
    """Log-weights of ``count`` draws for each row of a unit, the likelihood in slices of ``batch_size`` rows."""
    axes: dict[str, int] = {}

    def propose() -> tuple[dict[str, Tensor], Tensor]:
        terms = run_program(guide, unit, double=True)
        axes.update({name: _row_axis(term) for name, term in terms.items()})
        return {name: term.value for name, term in terms.items()}, _sum_rows(terms, batch_length(unit))

    values, log_q = vectorize(propose, count)
    parts = []
    size = batch_size or batch_length(unit)
    for start in range(0, batch_length(unit), size):
        rows = slice(start, min(start + size, batch_length(unit)))
        local = {n: v.movedim(axes[n], 0)[rows].movedim(0, axes[n]) for n, v in values.items() if n in axes}
        parts.append(_log_joint(model, take(unit, rows), local))
    return torch.cat(parts, -1) - log_q


def _row_axis(term: Term) -> int:
    """The data axis of a site's value, counted from the right."""
    axis = dict(term.plates).get(DATA_PLATE)
    if axis is None:
        raise ValueError(f'guide site {term.name!r} lies outside the plate "{DATA_PLATE}"; ask for the posterior instead')
    return axis - (term.value.dim() - term.log_prob.dim())


def _log_joint(model: Callable[..., Any], batch: Batch, values: dict[str, Tensor]) -> Tensor:
    """log p(x, z) for each draw and row, at given draws of z."""

    def at(z: dict[str, Tensor]) -> Tensor:
        with At(z):
            return _sum_rows(run_program(model, batch, double=True), batch_length(batch))

    if not values:
        return at({})[None]
    try:
        return torch.func.vmap(at)(values)
    except (RuntimeError, NotImplementedError, ValueError, TypeError, IndexError):
        return torch.stack([at({n: v[i] for n, v in values.items()}) for i in range(len(next(iter(values.values()))))])


def _sum_rows(terms: dict[str, Term], rows: int) -> Tensor:
    outside = [t.name for t in terms.values() if not t.local]
    if outside:
        raise ValueError(f"site {outside[0]!r} is shared by all data, so no datum has a likelihood of its own")
    parts = [t.rows for t in terms.values()]
    return sum(parts[1:], parts[0]) if parts else torch.zeros(rows, dtype=torch.float64)
