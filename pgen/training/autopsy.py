r"""What went wrong in a step that was not finite: the parameter, or the site, its argument and the rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..contracts import Batch
from ..programs import DATA_PLATE, Term, innermost, run_pair

__all__ = ["autopsy"]

ADVICE = "try a smaller learning rate, clip_norm or precision='float64'"


def autopsy(
    parameters: Iterable[tuple[str, Tensor]],
    programs: tuple[Callable[..., Any], Callable[..., Any]],
    batch: Batch,
    index: Tensor | None,
) -> str:
    """Name the first thing that is not finite when the programs run on ``batch``; nothing if all is. Inside ``isolated``.

    Args:
        parameters: By name.
        programs: Model and guide.
        batch: Their arguments.
        index: The rows of the data that the batch holds; None for all in order.
    """
    for name, parameter in parameters:
        if not bool(torch.isfinite(parameter).all()):
            return f"parameter {name!r} is not finite; {ADVICE}"
    try:
        traces = run_pair(*programs, batch)
    except (ValueError, RuntimeError) as error:
        return f"the programs fail there: {' '.join(str(error).split())[:160]}"
    for program, terms in (("guide", traces.guide), ("model", traces.model)):
        for term in terms.values():
            finding = _finding(term, index)
            if finding:
                return f"{program} site {term.name!r}: {finding}; {ADVICE}"
    return ""


def _finding(term: Term, index: Tensor | None) -> str:
    event = len(term.fn.event_shape)
    for what, value, inner in (("value", term.value, event), ("log-density", term.log_prob, 0)):
        bad = ~torch.isfinite(torch.as_tensor(value, dtype=torch.float64))
        if bool(bad.any()):
            return f"{what} not finite{_rows(bad, term, inner, index)}{_argument(term.fn)}"
    return ""


def _rows(bad: Tensor, term: Term, inner: int, index: Tensor | None) -> str:
    """In which rows of the data, where the site has a row for each."""
    axis = next((axis - inner for name, axis in term.plates if name == DATA_PLATE), 0)
    if not axis or bad.dim() < -axis:
        return ""
    others = [i for i in range(bad.dim()) if i != bad.dim() + axis]
    rows = (bad.sum(others) if others else bad).nonzero().reshape(-1).tolist()
    first = rows[0] if index is None else int(index[rows[0]])
    return f" in {len(rows)} of {bad.shape[axis]} rows (first: data row {first})"


def _argument(fn: Any) -> str:
    """The argument of the distribution that is out of bounds, if one is."""
    base = innermost(fn)
    for name, constraint in getattr(base, "arg_constraints", {}).items():
        value = base.__dict__.get(name)
        if not isinstance(value, Tensor) or torch.distributions.constraints.is_dependent(constraint):
            continue
        if not bool(torch.isfinite(value).all()):
            return f", its {name} is not finite"
        if not bool(constraint.check(value).all()):
            return f", its {name} is not {constraint}"
    return ""
