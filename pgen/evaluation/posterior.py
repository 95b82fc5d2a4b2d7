r"""Draws of the latents from the guide, and of the data that the model generates at them, many at a time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.replay_messenger import ReplayMessenger
from pyro.poutine.uncondition_messenger import UnconditionMessenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from ..contracts import Batch, Draws
from ..data.batches import key
from ..enumeration import is_finite
from ..programs import batch_length, call, draw, keyed_rng, rows_at, vectorize
from ..training.progress import Progress
from .units import QUIET_SECONDS, Deal, Unit, device_of, opened, rows_of

__all__ = ["by_rows", "draw_posterior", "draw_predictive", "many"]

UNIT_NUMBERS = 1_000_000
"""Numbers of the data, times draws, in a unit: about what a processor's cache holds; part of what keys the noise."""
UNIT_DRAWS = 1000
"""Most draws of a unit."""
BESIDE_ROWS = 1024
"""Most rows of a unit whose draws lie beside one another, unless the data are more."""


def many(
    fn: Callable[[Batch, int], Any],
    batch: Batch,
    total: int,
    most: int,
    *,
    name: str,
    seed: int,
    held: Sequence[Tensor] = (),
    compile: str = "auto",
    progress: bool = False,
    device: torch.device | None = None,
) -> Any:
    """``fn(batch, count)`` in units of ``count`` draws, ``total`` in all.

    Args:
        fn: Gives tensors with ``count`` draws along axis 0, in a tree of dicts, lists and tuples.
        batch: Its argument, the same for every unit.
        total: Draws in all.
        most: Most draws of a unit.
        name: Of the question, for keys and bar.
        seed: Keys the noise.
        held: Parameters and buffers that ``fn`` uses.
        compile: The tier, as in ``Unit``.
        progress: Whether to show a bar on what takes more than two seconds.
        device: Where the noise is drawn; by default where the batch is.

    Returns:
        The same tree of tensors, ``total`` draws along axis 0.
    """
    deal = Deal(total, most)
    tensors, closed = opened(batch)
    trees: list[Any] = []

    def flat(*tensors: Tensor) -> list[Tensor]:
        leaves, tree = tree_flatten(fn(closed(tensors), deal.size))
        trees[:] = [tree]
        return leaves

    with keyed_rng(0, device or device_of(batch)), rows_at(None), Progress(deal.units, progress, QUIET_SECONDS) as bar:
        unit = Unit(flat, held, tensors, calls=deal.units, compile=compile)
        parts = []
        for number in range(deal.units):
            bar.at(number, name)
            parts.append([leaf[: deal.kept(number)] for leaf in unit(key(seed, name, number), *tensors)])
    return tree_unflatten([torch.cat(leaves) if len(parts) > 1 else leaves[0] for leaves in zip(*parts)], trees[0])


def by_rows(
    fn: Callable[[Batch], Tensor],
    batch: Batch,
    most: int,
    *,
    name: str,
    seed: int,
    held: Sequence[Tensor] = (),
    compile: str = "auto",
    progress: bool = False,
) -> Tensor:
    """``fn(rows)`` in units of at most ``most`` rows, ``(N, ...)``; the arguments are those of ``many``."""
    deal = Deal(batch_length(batch), most)
    units = [opened(rows_of(batch, deal, number))[0] for number in range(deal.units)]
    _, closed = opened(batch)
    with keyed_rng(0, device_of(batch)), rows_at(None), Progress(deal.units, progress, QUIET_SECONDS) as bar:
        unit = Unit(lambda *t: [fn(closed(t))], held, units[0], units[-1], calls=deal.units, compile=compile)
        parts = []
        for number, tensors in enumerate(units):
            bar.at(number, name)
            parts.append(unit(key(seed, name, number), *tensors)[0][: deal.kept(number)])
    return torch.cat(parts)


def _most(batch: Batch) -> int:
    numbers = sum(leaf.numel() for leaf in tree_leaves(batch) if isinstance(leaf, Tensor))
    return max(1, min(UNIT_DRAWS, UNIT_NUMBERS // max(numbers, 1)))


_TENSORS = ("values", "log_p", "log_q", "log_p_rows", "log_q_rows", "log_likelihood")


def draw_posterior(
    model: Callable[..., Any], guide: Callable[..., Any], batch: Batch, num_samples: int, **options: Any
) -> Draws:
    """Draws of the latents from the guide on a whole batch, with the log-densities that weigh them; inside ``isolated``.

    Args:
        model: The model program.
        guide: The guide program.
        batch: Their arguments.
        num_samples: How many.
        **options: ``seed``, ``held``, ``compile``, ``progress``, as in ``many``.
    """
    outline: list[Draws] = []

    def drawn(batch: Batch, count: int) -> dict[str, Any]:
        outline[:] = [draw(model, guide, batch, count)]
        return {name: getattr(outline[0], name) for name in _TENSORS if getattr(outline[0], name) is not None}

    found = many(drawn, batch, num_samples, _most(batch), name="draw", **options)
    return replace(outline[0], **found)


def draw_predictive(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    batch: Batch,
    num_samples: int,
    *,
    local: Collection[str] = (),
    beside: bool = False,
    **options: Any,
) -> dict[str, Tensor]:
    """Draws of the observed sites at draws of the latents from the guide, ``(S, *shape)``; inside ``isolated``.

    Args:
        model: The model program.
        guide: The guide program.
        batch: Their arguments.
        num_samples: How many.
        local: Latents that are drawn from the model instead of the guide.
        beside: Draw a datum's replicates as further rows of the batch: for programs that cannot be vectorized, where all that
            is drawn lies in the data plate.
        **options: ``seed``, ``held``, ``compile``, ``progress``, as in ``many``.
    """
    rows = batch_length(batch)

    def replicated(batch: Batch, count: int) -> dict[str, Tensor]:
        if not beside:
            return vectorize(lambda: _replicate(model, guide, batch, local), count)
        whole = tree_map_only(Tensor, lambda t: t.repeat(count, *[1] * (t.dim() - 1)), batch)
        return {name: x.unflatten(0, (count, rows)) for name, x in _replicate(model, guide, whole, local).items()}

    most = max(1, BESIDE_ROWS // rows) if beside else _most(batch)
    return many(replicated, batch, num_samples, most, name="predict", **options)


def _replicate(model: Callable[..., Any], guide: Callable[..., Any], batch: Batch, local: Collection[str]) -> dict[str, Tensor]:
    with poutine.trace() as proposed:
        call(guide, batch)
    trace = proposed.trace
    for name in local:
        if name in trace:
            trace.remove_node(name)
    with UnconditionMessenger(), ReplayMessenger(trace=trace), poutine.trace() as replayed:
        call(model, batch)
    known = {*trace.nodes, *local}
    sites = {n: s for n, s in replayed.trace.nodes.items() if s["type"] == "sample" and n not in known and _is_data(s)}
    observed = any(s["infer"].get("was_observed") for s in sites.values())
    return {name: s["value"] for name, s in sites.items() if not (observed and _is_summed(s))}


def _is_summed(site: Any) -> bool:
    """Whether a site is a latent that inference sums out, where the data are given."""
    return is_finite(site["fn"]) and not site["infer"].get("was_observed")


def _is_data(site: Any) -> bool:
    """Whether a site is data, and not a deterministic note, a factor or a subsample."""
    note = site["infer"].get("_deterministic") or site_is_subsample(site)
    return not note and not isinstance(site["fn"], pyro.distributions.Unit)
