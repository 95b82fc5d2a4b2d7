r"""Tables with columns of text and with missing entries: text becomes categories, and back."""

from __future__ import annotations

import math
import os
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..contracts import check_choice, nearest
from .readers import choose, is_missing, is_number, reading_csv, refused

__all__ = ["Table", "column_names", "number", "table"]

_FEW = 20
"""Distinct texts that a column may have however few rows there are; beyond them, at most one for every two rows."""

Cells = Callable[[], Iterator[tuple[str, list[str]]]]
"""Gives the rows of a table, each with its place in words, as often as it is called."""


@dataclass(frozen=True, eq=False, repr=False)
class Table:
    """A table as numbers, with what it takes to read them.

    Attributes:
        x: ``(N, D)``: numbers, and categories 0, ..., K - 1; NaN where an entry is missing.
        names: Of the columns.
        categories: For each column the texts that its numbers stand for, in order; empty for a column of numbers.
        name: Of the file.
    """

    x: Tensor
    names: tuple[str, ...]
    categories: tuple[tuple[str, ...], ...]
    name: str

    def __repr__(self) -> str:
        return f"Table({self.name}: {tuple(self.x.shape)}, {self.words()})"

    @property
    def columns(self) -> list[Any]:
        """What each column holds, as families with an argument ``columns`` take it: numbers are binary where all are 0 or 1."""
        bits = ((self.x == 0) | (self.x == 1) | self.x.isnan()).all(0).tolist()
        return [
            ("categorical", max(len(texts), 2)) if texts else "binary" if binary else "continuous"
            for texts, binary in zip(self.categories, bits)
        ]

    @property
    def missing(self) -> dict[str, int]:
        """How many entries are missing, by column, where there are any."""
        counts = self.x.isnan().sum(0).tolist()
        return {name: int(count) for name, count in zip(self.names, counts) if count}

    def words(self) -> str:
        """Which columns hold what, in one line."""
        kinds: dict[str, list[str]] = {}
        for name, kind in zip(self.names, self.columns):
            kinds.setdefault(kind if isinstance(kind, str) else "categorical", []).append(name)
        return "; ".join(f"{kind}: {', '.join(names)}" for kind, names in kinds.items())

    def split(self, names: Sequence[str]) -> tuple[Table, Table]:
        """The columns but for ``names``, and those of ``names``: what is modelled, and what it is conditioned on.

        Raises:
            ValueError: If a name is unknown, or no column is left.
        """
        for name in names:
            check_choice("names", name, self.names)
        if set(names) == set(self.names):
            raise ValueError(f"{self.name} has no column but {', '.join(names)}; leave one to be modelled")
        rest = [column for column, name in enumerate(self.names) if name not in names]
        return self._select(rest), self._select([self.names.index(name) for name in names])

    def _select(self, chosen: list[int]) -> Table:
        names, categories = tuple(self.names[i] for i in chosen), tuple(self.categories[i] for i in chosen)
        return replace(self, x=self.x[:, chosen], names=names, categories=categories)

    def rows(self, x: Tensor) -> list[list[str]]:
        """Numbers like ``x``, ``(n, D)``, as the cells of a table: text where a column holds text, empty where missing."""
        return [[self._cell(column, value) for column, value in enumerate(row)] for row in x.double().tolist()]

    def _cell(self, column: int, value: float) -> str:
        if math.isnan(value):
            return ""
        texts = self.categories[column]
        return texts[round(value)] if texts else f"{value:.9g}"


def table(
    source: Any,
    columns: Sequence[str] | None = None,
    *,
    categories: Sequence[str] | Mapping[str, Sequence[str]] = (),
) -> Table:
    """Read a table whose columns hold numbers or text; empty cells (and ``?``, ``NA``, ``nan``, ``null``...) are missing.

    A column with any cell of text is one of categories, numbered in alphabetical order.

    Args:
        source: A ``.csv`` or ``.csv.gz`` file, or a pandas DataFrame.
        columns: Names of the columns to keep, in this order; all by default.
        categories: Names of columns of numbers that are categories too (codes). Or, by name, the texts of each column of
            categories, as a former table has them: then these columns are categories, all others numbers, and no other text
            is taken.

    Raises:
        ValueError: If the file cannot be read as a table, in one line that says where and why.

    Example:
        >>> import pandas as pd
        >>> penguins = table(pd.DataFrame({"mass": [3.75, 5.0, None], "island": ["Torgersen", "Biscoe", "Biscoe"]}))
        >>> penguins.x, penguins.columns
        (tensor([[3.7500, 1.0000],
                [5.0000, 0.0000],
                [   nan, 0.0000]]), ['continuous', ('categorical', 2)])
        >>> penguins.rows(penguins.x[:1])
        [['3.75', 'Torgersen']]
    """
    if hasattr(source, "itertuples"):
        return _read("table", [str(c) for c in source.columns], _of_frame(source), columns, categories)
    path = Path(source)
    return _read(path.name, list(column_names(path)), _of_csv(path), columns, categories, path)


def column_names(source: str | os.PathLike[str]) -> tuple[str, ...]:
    """The names of the columns of a ``.csv`` or ``.csv.gz`` file; their numbers where it has no header."""
    with reading_csv(Path(source)) as (found, _, _):
        return tuple(found)


def _of_csv(path: Path) -> Cells:
    def cells() -> Iterator[tuple[str, list[str]]]:
        with reading_csv(path) as (names, _, rows):
            for number, (line, found) in enumerate(rows, 1):
                if len(found) != len(names):
                    refused(f"row {number} (line {line}) has {len(found)} cells, expected {len(names)}")
                yield f"row {number} (line {line})", found

    return cells


def _of_frame(frame: Any) -> Cells:
    def cells() -> Iterator[tuple[str, list[str]]]:
        for number, row in enumerate(frame.itertuples(index=False), 1):
            yield f"row {number}", ["" if value is None or value != value else str(value) for value in row]

    return cells


def _read(
    name: str,
    header: list[str],
    cells: Cells,
    columns: Sequence[str] | None,
    categories: Sequence[str] | Mapping[str, Sequence[str]],
    path: Path | None = None,
) -> Table:
    """Two passes: which columns hold text, and which texts; then the numbers."""
    try:
        if len(set(header)) < len(header):
            refused(f"two columns are called {next(n for n in header if header.count(n) > 1)!r}; give each a name of its own")
        chosen = choose(header, columns)
        kept = [header[i] for i in chosen]
        for asked in categories:
            check_choice("categories", asked, kept)
        if isinstance(categories, Mapping):
            known = [tuple(categories.get(column, ())) for column in kept]
        else:
            known = _texts(cells, header, chosen, [column in categories for column in kept])
        x = _numbers(cells, kept, chosen, known)
    except ValueError as error:
        raise ValueError(str(error) if path is None or str(error).startswith(str(path)) else f"{path}: {error}") from None
    return Table(x, tuple(kept), tuple(known), name)


def _texts(cells: Cells, names: list[str], chosen: list[int], asked: list[bool]) -> list[tuple[str, ...]]:
    """The distinct texts of each column, in order; none where all cells are numbers, unless the column is asked for."""
    text, rows = list(asked), 0
    for _, row in cells():
        rows += 1
        for column, i in enumerate(chosen):
            if not text[column] and not is_number(row[i]) and not is_missing(row[i]):
                text[column] = True
    if not rows:
        refused("the table has a header but no rows")
    if any(text) and any(is_number(names[i]) for i in chosen):
        refused("the first line holds numbers beside words, so it names no columns; put a line of names above it")
    found: list[dict[str, None]] = [{} for _ in chosen]
    for _, row in cells() if any(text) else ():
        for column, i in enumerate(chosen):
            if text[column] and not is_missing(row[i]):
                found[column][row[i].strip()] = None
    for column, i in enumerate(chosen):
        if len(found[column]) > max(_FEW, rows / 2):
            refused(f"column {names[i]!r} holds {len(found[column])} texts in {rows} rows; an identifier? leave it out")
    return [_sorted(list(texts)) for texts in found]


def _sorted(texts: list[str]) -> tuple[str, ...]:
    return tuple(sorted(texts, key=float) if all(map(is_number, texts)) else sorted(texts))


def _numbers(cells: Cells, names: list[str], chosen: list[int], known: list[tuple[str, ...]]) -> Tensor:
    """``(N, D)``, of torch's default dtype."""
    codes = [{text: float(code) for code, text in enumerate(texts)} for texts in known]
    values = array("d")
    for place, row in cells():
        for column, i in enumerate(chosen):
            values.append(number(row[i].strip(), codes[column], place, names[column]))
    numbers = np.frombuffer(values, dtype=np.float64).reshape(-1, len(chosen))
    return torch.from_numpy(numbers.copy()).to(torch.get_default_dtype())


def number(cell: str, codes: dict[str, float], place: str, name: str) -> float:
    """The number of a cell: NaN where it is empty, the code of a category where the column ``name`` has ``codes``."""
    if is_missing(cell):
        return math.nan
    if codes:
        if cell not in codes:
            refused(f"{place}, column {name!r}: {cell[:30]!r} is a category that the fit has not seen{nearest(cell, codes)}")
        return codes[cell]
    if not is_number(cell):
        refused(f"{place}, column {name!r}: {cell[:30]!r} is not a number")
    if not math.isfinite(float(cell)):
        refused(f"{place}, column {name!r}: {cell!r} is not finite")
    return float(cell)
