r"""Columns of a table as the context c of a conditional density p(x | c): numbers standardised, categories one-hot."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..contracts import nearest
from .tables import Table, number, table

__all__ = ["ContextColumns"]


@dataclass(frozen=True)
class ContextColumns:
    r"""How columns of a table become context vectors: a number c as (c - loc) / scale, a category as one of K indicators.

    Shapes: values ``(N, columns)`` as in a ``Table`` -> vectors ``(N, size)``.

    Attributes:
        names: Of the columns.
        categories: For each column the texts that its numbers stand for, in order; empty for a column of numbers.
        loc: For each column the mean of its numbers, in their units; 0 for categories.
        scale: For each column the standard deviation of its numbers; 1 for categories.

    Example:
        >>> columns = ContextColumns(("species", "year"), (("Adelie", "Gentoo"), ()), (0.0, 2008.0), (1.0, 0.5))
        >>> columns.encode(columns.parse({"year": "2009", "species": "Gentoo"}))
        tensor([[0., 1., 2.]])
    """

    names: tuple[str, ...]
    categories: tuple[tuple[str, ...], ...]
    loc: tuple[float, ...]
    scale: tuple[float, ...]

    @classmethod
    def of(cls, found: Table) -> ContextColumns:
        """The columns of a table, all of which are context.

        Raises:
            ValueError: If an entry is missing, or a column has the same value in all rows.
        """
        _refuse_missing(found)
        x = found.x.double()
        for name, column in zip(found.names, x.unbind(1)):
            if bool((column == column[0]).all()):
                raise ValueError(f"the context column {name!r} has one value in all {len(x)} rows; leave it out")
        pairs = zip(found.categories, x.mean(0).tolist(), x.std(0, correction=0).tolist())
        loc, scale = zip(*((0.0, 1.0) if texts else (mean, deviation) for texts, mean, deviation in pairs))
        return cls(found.names, found.categories, loc, scale)

    @classmethod
    def plain(cls, size: int) -> ContextColumns:
        """Vectors of ``size`` numbers without names, taken as they are."""
        return cls(tuple(map(str, range(size))), ((),) * size, (0.0,) * size, (1.0,) * size)

    @classmethod
    def classes(cls, name: str, count: int) -> ContextColumns:
        """One column of classes 0, ..., ``count`` - 1."""
        return cls((name,), (tuple(map(str, range(count))),), (0.0,), (1.0,))

    @property
    def size(self) -> int:
        """Length of a context vector: the ``context_dim`` of a family."""
        return sum(len(texts) or 1 for texts in self.categories)

    @property
    def kinds(self) -> list[str]:
        """What each number of a context vector holds, in the words of ``columns``."""
        return [kind for texts in self.categories for kind in (["binary"] * len(texts) or ["continuous"])]

    def words(self) -> str:
        """The columns in one line."""
        return ", ".join(f"{name} ({', '.join(texts)})" if texts else name for name, texts in zip(self.names, self.categories))

    def encode(self, values: Tensor) -> Tensor:
        """Values of the columns as context vectors, in their dtype."""
        parts = []
        for column, texts, loc, scale in zip(values.unbind(1), self.categories, self.loc, self.scale):
            codes = torch.arange(len(texts), device=values.device)
            found = column[:, None] == codes if texts else ((column.double() - loc) / scale)[:, None]
            parts.append(found.to(values.dtype))
        return torch.cat(parts, 1)

    def read(self, source: str | os.PathLike[str]) -> Tensor:
        """The values of these columns in a ``.csv`` file, ``(N, columns)``; its other columns are not looked at.

        Raises:
            ValueError: If a column or an entry is missing, or a category is none of those known.
        """
        found = table(source, self.names, categories=self.texts())
        _refuse_missing(found)
        return found.x

    def parse(self, values: Mapping[str, str], where: str = "the context") -> Tensor:
        """One row of values, ``(1, columns)``, from texts by name.

        Args:
            values: For each column its number or category.
            where: What the values are called in messages.

        Raises:
            ValueError: If a name is unknown or left out, or a value is no number or none of the known categories.
        """
        for name in values:
            if name not in self.names:
                raise ValueError(f"{where} has {name!r}, which is no column of the context{nearest(name, self.names)}")
        row = []
        for name, texts in zip(self.names, self.categories):
            cell = values.get(name, "").strip()
            row.append(number(cell, {text: float(code) for code, text in enumerate(texts)}, where, name))
            if math.isnan(row[-1]):
                example = texts[0] if texts else "0"
                raise ValueError(f"{where} says nothing of {name!r}; give all of the context: add {name}={example}")
        return torch.tensor([row])

    def rows(self, values: Tensor) -> list[list[str]]:
        """Values as the cells of a table."""
        return Table(values, self.names, self.categories, "").rows(values)

    def texts(self) -> dict[str, tuple[str, ...]]:
        """The texts of the columns of categories, by name."""
        return {name: texts for name, texts in zip(self.names, self.categories) if texts}

    def to_dict(self) -> dict[str, list[Any]]:
        """Plain JSON values."""
        categories = [list(texts) for texts in self.categories]
        return {"names": list(self.names), "categories": categories, "loc": list(self.loc), "scale": list(self.scale)}

    @classmethod
    def from_dict(cls, record: Any) -> ContextColumns:
        """What ``to_dict`` gave.

        Raises:
            ValueError: If it is something else.
        """
        try:
            names, categories, loc, scale = (list(record[key]) for key in ("names", "categories", "loc", "scale"))
            found = cls(
                tuple(map(str, names)), tuple(tuple(map(str, texts)) for texts in categories), tuple(map(float, loc)),
                tuple(map(float, scale)),
            )  # fmt: skip
        except (TypeError, KeyError, ValueError):
            raise ValueError("these are not the columns of a context") from None
        whole = len({len(part) for part in (names, categories, loc, scale)}) == 1 and bool(names)
        if not whole or not all(map(math.isfinite, found.loc)) or not all(0 < s < math.inf for s in found.scale):
            raise ValueError("these are not the columns of a context")
        return found


def _refuse_missing(found: Table) -> None:
    if found.missing:
        name, count = next(iter(found.missing.items()))
        raise ValueError(
            f"{found.name}: {count} of {len(found.x)} entries are missing in the context column {name!r}; a context is given "
            "whole: leave such rows out with --complete, or the column"
        )
