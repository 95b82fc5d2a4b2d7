r"""Log-likelihoods by importance sampling, for any number of samples in bounded memory.

Noise is keyed by units of rows and draws (``units``), so results do not depend on how much is evaluated at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from ..contracts import Batch
from ..data.batches import key
from ..programs import DATA_PLATE, At, Term, batch_length, keyed_rng, rows_at, run_model, run_program, vectorize
from ..training.progress import Progress
from .units import QUIET_SECONDS, Deal, Unit, device_of, opened, rows_of

__all__ = ["UNIT_ROWS", "At", "each", "importance_bound", "log_joint", "take"]

UNIT_ROWS = 64
"""Most rows of a unit."""
UNIT_DRAWS = 64
"""Most draws of a unit."""
UNIT_NUMBERS = 4_000_000
"""Numbers of the data, times draws, in a unit: with the rows this bounds memory, and is part of what keys the noise."""


def take(batch: Batch, rows: slice | Tensor) -> Batch:
    """Some rows of every tensor of a batch."""
    return tree_map_only(Tensor, lambda t: t[rows] if t.dim() else t, batch)


def importance_bound(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    batch: Batch,
    num_samples: int,
    *,
    seed: int,
    held: Sequence[Tensor] = (),
    batch_size: int | None = None,
    unit_rows: int = UNIT_ROWS,
    estimated: bool = False,
    compile: str = "auto",
    progress: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""Each datum's K-sample bound, and its Monte Carlo standard error.

    .. math:: \hat{\mathcal{L}}_K = \log \frac{1}{K} \sum_k w_k, \qquad
        \operatorname{se} = \sqrt{\frac{1}{K} \Bigl(\frac{\overline{w^2}}{\bar{w}^2} - 1\Bigr)} \text{ (delta method)}

    Of estimated log-weights only a mean is a bound: then it is :math:`\frac{1}{K} \sum_k \log w_k` with its standard error.

    Args:
        model: The model program, all of whose latents lie in the data plate.
        guide: The guide program.
        batch: The data; run inside ``isolated``.
        num_samples: K.
        seed: Keys the noise.
        held: Parameters and buffers of the programs.
        batch_size: Rows whose likelihood is evaluated at a time; changes memory, not results.
        unit_rows: Most rows that share one noise key; all of them for a guide with parameters of each row.
        estimated: Whether a log-weight is an unbiased estimate itself.
        compile: The tier, as in ``Unit``; where ``batch_size`` divides a unit, ``"auto"`` means ``"eager"``.
        progress: Whether to show a bar on what takes more than two seconds.

    Returns:
        Bound and standard error, ``(N,)`` each, float64, in nats.

    References:
        Burda et al. (2016), arXiv:1509.00519, eq. 8.
    """
    rows = Deal(batch_length(batch), unit_rows)
    draws = Deal(num_samples, _draws_of(rows_of(batch, rows, 0)))
    _, closed = opened(batch)
    parts = [opened(rows_of(batch, rows, number))[0] for number in range(rows.units)]
    divided = batch_size is not None and batch_size < rows.size

    def log_weights(*tensors: Tensor) -> list[Tensor]:
        return [_log_weights(model, guide, closed(tensors), draws.size, batch_size)]

    calls, out = rows.units * draws.units, []
    with keyed_rng(0, device_of(batch)), rows_at(None), Progress(calls, progress, QUIET_SECONDS) as bar:
        tier = "eager" if divided and compile == "auto" else compile
        unit = Unit(log_weights, held, parts[0], parts[-1], calls=calls, compile=tier)
        for number, part in enumerate(parts):
            sums: list[Tensor] = []
            for chunk in range(draws.units):
                bar.at(number * draws.units + chunk, "log_prob")
                (log_weight,) = unit(key(seed, "bound", number, chunk), *part)  # (draws, rows)
                kept = log_weight[: draws.kept(chunk), : rows.kept(number)]
                sums = _add(sums, kept) if estimated else _accumulate(sums, kept)
            out.append(torch.stack(sums))
    first, second = torch.cat(out, -1)
    if estimated:
        mean = first / num_samples
        spread = (second / num_samples - mean.square()).clamp(min=0)
        return mean, (spread / (num_samples - 1)).sqrt() if num_samples > 1 else torch.full_like(mean, math.nan)
    relative = (second - 2 * first + math.log(num_samples)).exp() - 1
    error = (relative.clamp(min=0) / num_samples).sqrt() if num_samples > 1 else torch.full_like(relative, math.nan)
    return first - math.log(num_samples), error


def _draws_of(unit: Batch) -> int:
    """Most draws of a unit, from the size of its rows alone."""
    numbers = sum(leaf.numel() for leaf in tree_leaves(unit) if isinstance(leaf, Tensor))
    return max(1, min(UNIT_DRAWS, UNIT_NUMBERS // max(numbers, 1)))


def _accumulate(sums: list[Tensor], log_weight: Tensor) -> list[Tensor]:
    """Log-sums of the weights and of their squares over the draws so far, ``(rows,)`` each."""
    new = [torch.logsumexp(log_weight, 0), torch.logsumexp(2 * log_weight, 0)]
    return [torch.logaddexp(*pair) for pair in zip(sums, new)] if sums else new


def _add(sums: list[Tensor], log_weight: Tensor) -> list[Tensor]:
    """Sums of the log-weights and of their squares over the draws so far, ``(rows,)`` each."""
    new = [log_weight.sum(0), log_weight.square().sum(0)]
    return [a + b for a, b in zip(sums, new)] if sums else new


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
    size = batch_size or batch_length(unit)
    if size >= batch_length(unit):
        return log_joint(model, unit, values) - log_q
    parts = []
    for start in range(0, batch_length(unit), size):
        rows = slice(start, min(start + size, batch_length(unit)))
        local = {n: v.movedim(axes[n], 0)[rows].movedim(0, axes[n]) for n, v in values.items() if n in axes}
        parts.append(log_joint(model, take(unit, rows), local))
    return torch.cat(parts, -1) - log_q


def _row_axis(term: Term) -> int:
    """The data axis of a site's value, counted from the right."""
    axis = dict(term.plates).get(DATA_PLATE)
    if axis is None:
        raise ValueError(f'guide site {term.name!r} lies outside the plate "{DATA_PLATE}"; ask for the posterior instead')
    return axis - (term.value.dim() - term.log_prob.dim())


def log_joint(model: Callable[..., Any], batch: Batch, values: dict[str, Tensor]) -> Tensor:
    """log p(x, z) for each draw and row, at given draws of z."""

    def at(z: dict[str, Tensor]) -> Tensor:
        return _sum_rows(run_model(model, batch, z, double=True), batch_length(batch))

    return each(at, values) if values else at({})[None]


def each(fn: Callable[[dict[str, Tensor]], Any], values: dict[str, Tensor]) -> Any:
    """``fn`` at each draw of ``values`` ``(S, *shape)``, in one batched run where that can be."""
    try:
        return torch.func.vmap(fn)(values)
    except (RuntimeError, NotImplementedError, ValueError, TypeError, IndexError):
        found = [tree_flatten(fn({n: v[i] for n, v in values.items()})) for i in range(len(next(iter(values.values()))))]
        return tree_unflatten([torch.stack(leaves) for leaves in zip(*(flat for flat, _ in found))], found[0][1])


def _sum_rows(terms: dict[str, Term], rows: int) -> Tensor:
    outside = [t.name for t in terms.values() if not t.local]
    if outside:
        raise ValueError(f"site {outside[0]!r} is shared by all data, so no datum has a likelihood of its own")
    parts = [t.rows for t in terms.values()]
    return sum(parts[1:], parts[0]) if parts else torch.zeros(rows, dtype=torch.float64)
