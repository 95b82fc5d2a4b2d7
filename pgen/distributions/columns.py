r"""Columns of several kinds in one table: real, binary, and of classes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from .observation import LEVELS, OBSERVATIONS, Observation, observation

__all__ = ["Columns", "Kind"]

Kind = str | tuple[str, int]
"""The name of an observation model, or a pair of name and number of classes: ``"bernoulli"``, ``("categorical", 5)``."""


class Columns:
    r"""Observation models of the columns of a table, from outputs ``(..., outputs)`` for each column.

    Args:
        kinds: Of each column: ``"bernoulli"``, ``"gaussian"``, ``"gaussian_mixture"``, ``("categorical", classes)`` or
            ``("discretized_logistic_mixture", levels)``.
        components: Of the mixtures (default 10).

    Attributes:
        outputs: Most numbers that a column's distribution takes; columns that take fewer leave the last ones unused.
        width: Most numbers that a column gives a network; columns that give fewer are filled up with zeros.

    Example:
        >>> columns = Columns(["bernoulli", ("categorical", 4)])
        >>> fn = columns.distribution(torch.zeros(2, 4), torch.tensor([0, 1]))
        >>> fn.log_prob(torch.tensor([1.0, 3.0])).exp()
        tensor([0.5000, 0.2500])
    """

    def __init__(self, kinds: Sequence[Kind], components: int | None = None) -> None:
        self.kinds = [_kind(i, kind) for i, kind in enumerate(kinds)]
        distinct = list(dict.fromkeys(self.kinds))
        self.parts = [_scalar(name, classes, components) for name, classes in distinct]
        self.numbers = [distinct.index(kind) for kind in self.kinds]
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

    def __repr__(self) -> str:
        return "[that of its column]"


def _kind(column: int, kind: Any) -> tuple[str, int | None]:
    """A kind as name and number of classes, checked."""
    name, classes = (kind, None) if isinstance(kind, str) else (tuple(kind) + (None,))[:2]
    if name not in OBSERVATIONS:
        raise ValueError(f"`features` has {name!r} for column {column}, which is unknown (known: {', '.join(OBSERVATIONS)})")
    if name in LEVELS and classes is None:
        raise ValueError(f"`features` has {name!r} for column {column}; say of how many classes: ({name!r}, 5)")
    return name, classes


def _scalar(name: str, classes: int | None, components: int | None) -> Observation:
    return observation(name, (), classes, components if "mixture" in name else None)
