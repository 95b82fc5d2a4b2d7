r"""Models whose density may lack its normaliser, as functions of the data that they observe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro.distributions import Unit
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..contracts import Batch
from ..programs import Term, innermost, run_laws, run_program
from .elbo import scaled

__all__ = [
    "both_densities",
    "check_without_latents",
    "conditionals",
    "is_discrete",
    "law",
    "log_density",
    "observing",
    "parts",
    "score",
]

Program = Callable[..., Any]


def parts(batch: Batch) -> tuple[Tensor, list[Tensor], Callable[[Tensor, Sequence[Tensor]], Batch]]:
    """The data x of a batch (``"x"`` of a dict that has one, else the first tensor), its other tensors, and the way back."""
    if isinstance(batch, dict) and all(value is None or isinstance(value, Tensor) for value in batch.values()):
        return _named_parts(batch)
    leaves, spec = tree_flatten(batch)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.dim() > 0]
    first = list(batch).index("x") if isinstance(batch, dict) and "x" in batch else places[0]
    others = [i for i in places if i != first]

    def closed(x: Tensor, given: Sequence[Tensor]) -> Batch:
        filled = list(leaves)
        for place, tensor in zip([first, *others], [x, *given]):
            filled[place] = tensor
        return tree_unflatten(filled, spec)

    return leaves[first], [leaves[i] for i in others], closed


def _named_parts(batch: dict[str, Any]) -> tuple[Tensor, list[Tensor], Callable[[Tensor, Sequence[Tensor]], Batch]]:
    """The same for a dict of tensors, at less cost."""
    names = [name for name, value in batch.items() if value is not None and value.dim() > 0]
    first = "x" if "x" in batch else names[0]
    others = [name for name in names if name != first]

    def closed(x: Tensor, given: Sequence[Tensor]) -> Batch:
        return {**batch, first: x, **dict(zip(others, given))}

    return batch[first], [batch[name] for name in others], closed


def _terms(model: Program, batch: Batch) -> tuple[list[Term], list[Term]]:
    """The terms whose density needs a normaliser, and the others."""
    x, *_ = parts(batch)
    terms = list(run_program(model, batch).values())
    if not any(term.value is x for term in terms):
        return terms, []
    own: list[Term] = []
    others: list[Term] = []
    for term in terms:
        (own if term.value is x or isinstance(innermost(term.fn), Unit) else others).append(term)
    return own, others


def law(model: Program, batch: Batch) -> Any:
    """The distribution of the site that observes x, else of the first one."""
    x, *_ = parts(batch)
    found = list(run_laws(model, batch).values())
    return next((fn for fn, value in found if value is x), found[0][0])


def is_discrete(fn: Any) -> bool:
    """Whether x takes values without a gradient; programs with factors alone do not say."""
    try:
        return bool(fn.support.is_discrete)
    except (NotImplementedError, AttributeError):
        return False


def observing(model: Program, batch: Batch) -> list[Term]:
    """The terms whose density needs a normaliser: the site that observes x, and factors; all, where no site observes x.

    What else a model observes (the class of each datum, say) has a normalised law given x, so that a chain over x need not
    draw it.
    """
    return _terms(model, batch)[0]


def _sum(terms: Sequence[Term], scales: bool) -> Tensor:
    rows = [scaled(term, term.rows) if scales else term.rows for term in terms]
    return sum(rows[1:], rows[0])


def log_density(model: Program, batch: Batch, *, scales: bool = False) -> Tensor:
    """log f(x) of each datum, ``(B,)``, up to a constant, in nats.

    Args:
        model: Without latents.
        batch: Its arguments.
        scales: Whether the program's own scales count.
    """
    return _sum(observing(model, batch), scales)


def conditionals(model: Program, batch: Batch) -> Tensor | float:
    """Log-density of what else a model observes, given x, ``(B,)`` with the program's scales; 0 where there is nothing."""
    return both_densities(model, batch)[1]


def both_densities(model: Program, batch: Batch) -> tuple[Tensor, Tensor | float]:
    """``log_density`` with the program's scales, and ``conditionals``, by one run of the program."""
    own, others = _terms(model, batch)
    return _sum(own, True), _sum(others, True) if others else 0.0


def score(model: Program, batch: Batch) -> Callable[[Tensor], Tensor]:
    """The gradient of log f as a function of x, ``(B, *event_shape)`` both; differentiable, in the parameters too."""
    _, given, closed = parts(batch)
    return torch.func.grad(lambda x: log_density(model, closed(x, given)).sum())


def check_without_latents(objective: Any, model: Program, batch: Batch) -> None:
    """Refuse a model whose density at x is not to be had by running it once."""
    name = type(objective).__name__
    for term in run_program(model, batch).values():
        if not term.observed:
            raise ValueError(f"{name} needs a model without latents, and this one draws {term.name!r}; use pgen.ELBO()")
        if not term.local:
            raise ValueError(
                f'{name} needs the density of each datum, and site {term.name!r} lies outside `with pyro.plate("data", ...)`'
            )
