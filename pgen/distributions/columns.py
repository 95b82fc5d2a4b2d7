r"""Columns of several kinds in one table: continuous, binary, categorical and ordinal."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from ..contracts import check_choice
from .observation import Observation, observation

__all__ = ["CONTINUOUS", "KINDS", "Column", "Columns", "Kind", "as_columns", "plain_columns"]

Kind = str | Sequence[Any]
"""What a column holds, as it is given: ``"continuous"``, ``"binary"`` (0 and 1), or ``("categorical", K)`` and
``("ordinal", K)``, whose values are 0, ..., K - 1, without and with an order."""
Column = tuple[str, int]
"""The same, with the number of values: ``("continuous", 0)``, ``("binary", 2)``, ``("categorical", K)``, ``("ordinal", K)``."""
KINDS = ("continuous", "binary", "categorical", "ordinal")
CONTINUOUS: Column = ("continuous", 0)


def as_columns(columns: Sequence[Kind], size: int) -> list[Column]:
    """The kinds of ``size`` columns, checked.

    Example:
        >>> as_columns(["continuous", "binary", ("categorical", 5)], 3)
        [('continuous', 0), ('binary', 2), ('categorical', 5)]
    """
    if isinstance(columns, str) or len(columns) != size:
        raise ValueError(f"`columns` should name a kind for each of the {size} numbers of a datum, got {columns!r:.60}")
    return [_column(number, kind) for number, kind in enumerate(columns)]


def plain_columns(columns: Sequence[Kind] | None) -> list[Any] | None:
    """Kinds of columns as plain JSON values."""
    return None if columns is None else [kind if isinstance(kind, str) else list(kind) for kind in columns]


def _column(number: int, kind: Kind) -> Column:
    name, values = (kind, None) if isinstance(kind, str) else (tuple(kind) + (None,))[:2]
    check_choice(f"columns[{number}]", name, KINDS)
    if name in ("continuous", "binary"):
        if values not in (None, 0 if name == "continuous" else 2):
            raise ValueError(f"`columns[{number}]` should be {name!r} alone, got {kind!r}")
        return str(name), 0 if name == "continuous" else 2
    if not isinstance(values, int) or values < 2:
        raise ValueError(f"`columns[{number}]` should be ({name!r}, K) with K values, two or more, got {kind!r}")
    return str(name), values


class Columns:
    r"""Observation models of the columns of a table, from outputs ``(..., outputs)`` for each column.

    Args:
        models: The observation model of each column and its number of classes: ``("gaussian", None)``, ``("categorical", 5)``.
        num_components: Of the mixtures (default 10).

    Attributes:
        outputs: Most numbers that a column's distribution takes; columns that take fewer leave the last ones unused.
        width: Most numbers that a column gives a network; columns that give fewer are filled up with zeros.

    Example:
        >>> columns = Columns([("bernoulli", None), ("categorical", 4)])
        >>> fn = columns.distribution(torch.zeros(2, 4), torch.tensor([0, 1]))
        >>> fn.log_prob(torch.tensor([1.0, 3.0])).exp()
        tensor([0.5000, 0.2500])
    """

    def __init__(self, models: Sequence[tuple[str, int | None]], num_components: int | None = None) -> None:
        self.models = list(models)
        distinct = list(dict.fromkeys(self.models))
        self.parts = [_scalar(name, classes, num_components) for name, classes in distinct]
        self.numbers = [distinct.index(model) for model in self.models]
        self.outputs = max(part.outputs for part in self.parts)
        self.width = max(part.width for part in self.parts)

    def which(self, device: torch.device) -> Tensor:
        """The number of each column's kind, ``(D,)``."""
        return torch.tensor(self.numbers, device=device)

    def encode(self, x: Tensor, which: Tensor) -> Tensor:
        """Numbers of columns of kinds ``which`` as inputs of a network, ``(*x.shape, width)``."""
        if len(self.parts) == 1:
            return self.parts[0].encode(x)
        out = x.new_zeros((*x.shape, self.width))
        for number, part in enumerate(self.parts):
            own = which == number
            found = part.encode(torch.where(own, x, torch.zeros_like(x)))
            found = torch.nn.functional.pad(found, (0, self.width - part.width))
            out = torch.where(own.unsqueeze(-1), found, out)
        return out

    def distribution(self, outputs: Tensor, which: Tensor) -> dist.TorchDistribution:
        """The distribution of columns of kinds ``which``, from ``(*batch, outputs)``; batch shape ``batch``."""
        if len(self.parts) == 1:
            return self.parts[0].distribution(outputs)
        fns = [part.distribution(outputs[..., : part.outputs]) for part in self.parts]
        return _OneOf(fns, which.expand(outputs.shape[:-1]))

    def start(self, x: Tensor) -> Tensor:
        """Outputs that fit each column of ``(N, D)`` by itself, ``(D, outputs)``."""
        rows = []
        for column, number in enumerate(self.numbers):
            found = self.parts[number].start(x[:, column])
            rows.append(torch.nn.functional.pad(found, (0, self.outputs - len(found))))
        return torch.stack(rows)

    @property
    def support(self) -> Any:
        """The values that each number of ``(*batch, D)`` may take."""
        return self.parts[0].support if len(self.parts) == 1 else _Each([p.support for p in self.parts], self.numbers)


class _OneOf(dist.TorchDistribution):
    """Each number from one of several distributions."""

    arg_constraints: dict[str, Any] = {}

    def __init__(self, fns: Sequence[dist.TorchDistribution], which: Tensor) -> None:
        self.fns, self.which = fns, which
        super().__init__(which.shape, torch.Size(), validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        out = torch.zeros_like(value)
        for number, fn in enumerate(self.fns):
            own = self.which == number
            out = torch.where(own, fn.log_prob(torch.where(own, value, torch.zeros_like(value))), out)
        return out

    def sample(self, sample_shape: Any = ()) -> Tensor:
        drawn = [fn.sample(torch.Size(sample_shape)) for fn in self.fns]
        dtype = reduce(torch.promote_types, [d.dtype for d in drawn])  # classes are whole numbers
        each = torch.stack([d.to(dtype) for d in drawn])
        return each.gather(0, self.which.expand(each.shape[1:]).unsqueeze(0)).squeeze(0)


class _Each(constraints.Constraint):
    """A constraint for each column."""

    def __init__(self, parts: Sequence[Any], numbers: Sequence[int]) -> None:
        self.parts, self.numbers = parts, numbers

    def check(self, value: Tensor) -> Tensor:
        columns = value.reshape(-1, len(self.numbers)).unbind(1)
        return torch.stack([self.parts[n].check(column) for n, column in zip(self.numbers, columns)], 1).reshape(value.shape)

    def of_column(self, column: int) -> Any:
        """The constraint of one column."""
        return self.parts[self.numbers[column]]

    def __repr__(self) -> str:
        return "[that of its column]"


def _scalar(name: str, classes: int | None, num_components: int | None) -> Observation:
    return observation(name, (), classes, num_components if "mixture" in name else None)
