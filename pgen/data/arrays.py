r"""Batches of tensors: made from what users have, counted, sliced, moved, checked and fingerprinted.

A batch is one tensor, or a tuple or dict of tensors with equal length along axis 0; see `pgen.contracts.Batch`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from typing import Any, TypeGuard, cast

import numpy as np
import torch
from torch import Tensor

from ..contracts import Batch, DataSource
from ..files import tensor_bytes

__all__ = [
    "as_batch",
    "check_finite",
    "check_varies",
    "fingerprint",
    "is_source",
    "map_tensors",
    "num_rows",
    "rows",
    "sample_rows",
    "to_device",
]

_SAMPLED_ROWS = 1024  # of a data source, for its fingerprint


def as_batch(data: Any, dtype: torch.dtype | None = None, name: str = "data") -> Any:
    """Turn arrays into tensors.

    Takes tensors, NumPy arrays, lists of numbers, pandas frames and series, tuples and dicts of these. A DataSource is
    passed through.

    Args:
        data: The arrays. Tensors keep their dtype. Of the others, floats become torch's default dtype (float64 included:
            ask for it by ``dtype``), integers int64, truth values bool.
        dtype: Floating dtype of every floating array, tensors included.
        name: Of the argument, for messages.

    Returns:
        A Batch (or the DataSource). Float32 and int64 NumPy arrays share their memory with it.

    Raises:
        TypeError: If something is not an array of numbers.
        ValueError: If lengths differ, there are no rows, or an array has no batch axis.
    """
    if is_source(data):
        return data
    batch = _convert(name, data, dtype)
    lengths = {path: len(tensor) for path, tensor in _leaves(name, batch)}
    if not lengths:
        raise ValueError(f"`{name}` is an empty collection; give at least one array")
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{path} {length}" for path, length in lengths.items())
        raise ValueError(f"the arrays of `{name}` differ in length along axis 0: {listed}")
    if not next(iter(lengths.values())):
        raise ValueError(f"`{name}` has no rows")
    return batch


def is_source(data: Any) -> TypeGuard[DataSource]:
    """Whether data are a DataSource; frames that happen to have the same methods are arrays."""
    return isinstance(data, DataSource) and not hasattr(data, "to_numpy")


def sample_rows(source: DataSource, count: int) -> Tensor:
    """Numbers of ``count`` rows that stand for a source: spread evenly, or first in the order of one that has an order."""
    count = min(len(source), count)
    own_order = getattr(source, "epoch_rows", None)
    if own_order is not None:
        return own_order(0, 0, 0, count).sort().values
    return torch.linspace(0, len(source) - 1, count, dtype=torch.float64).long()


def num_rows(batch: Batch | DataSource) -> int:
    """Length along axis 0."""
    return len(batch) if isinstance(batch, DataSource) else len(_first(batch))


def rows(batch: Batch | DataSource, indices: Tensor | slice) -> Batch:
    """Some rows of every tensor, in the batch's own structure: copies for indices ``(n,)``, views for a slice."""
    if isinstance(batch, DataSource):
        indices = torch.arange(len(batch))[indices] if isinstance(indices, slice) else indices
        return batch.rows(indices)
    if isinstance(indices, slice):
        return map_tensors(lambda tensor: tensor[indices], batch)
    return map_tensors(lambda tensor: tensor.index_select(0, indices), batch)


def map_tensors(function: Callable[[Tensor], Tensor], batch: Batch) -> Batch:
    """Apply a function to every tensor, and keep the structure. What is not a tensor stays as it is."""
    if isinstance(batch, tuple):
        return tuple(map_tensors(function, part) for part in batch)
    if isinstance(batch, dict):
        return {name: map_tensors(function, part) for name, part in batch.items()}
    return function(batch) if isinstance(batch, Tensor) else batch


def to_device(batch: Batch, device: torch.device | str) -> Batch:
    """Move every tensor."""
    return map_tensors(lambda tensor: tensor.to(device), batch)


def check_finite(batch: Batch | DataSource, name: str = "data", numbers: Tensor | None = None) -> None:
    """Raise ValueError, naming the first row and column, counted from 0, unless all numbers are finite.

    The rows of a DataSource are not read. ``numbers`` are the numbers of the rows, where the batch is part of something.
    """
    for path, tensor in () if isinstance(batch, DataSource) else _leaves(name, batch):
        # A sum is finite only where every term is: one pass and no copy for good data.
        if tensor.is_floating_point() and not torch.isfinite(tensor.sum()):
            _check_each(path, tensor, numbers)


def check_varies(
    x: Tensor,
    still: Tensor | None = None,
    *,
    what: str = "number {} of each datum",
    many: str = "data",
    fix: str = "drop it, or if x is discrete give preprocess=pgen.data.Dequantize(levels)",
) -> None:
    """Refuse a number that never varies, on which the density of a Gaussian has no bound.

    Args:
        x: ``(N, D)``.
        still: Which numbers are refused, ``(D,)``; by default those that have one value.
        what: What a number is called.
        many: What the N are.
        fix: What to do about it.
    """
    still = x.amax(0) == x.amin(0) if still is None else still
    if bool(still.any()):
        column = int(still.nonzero()[0, 0])
        raise ValueError(
            f"{what.format(column)} is constant ({float(x[0, column]):g} in all {len(x)} {many}), so a Gaussian's "
            f"density has no bound: {fix}"
        )


def fingerprint(batch: Batch | DataSource) -> str:
    """SHA-256, in hexadecimal, of names, dtypes, shapes and values.

    Of a DataSource: its length, 1024 of its rows (`sample_rows`), and its ``stamp`` where it has one: of files their names,
    sizes and times of change.
    """
    digest = hashlib.sha256()
    if isinstance(batch, DataSource):
        digest.update(f"source of {len(batch)} {getattr(batch, 'stamp', '')}".encode())
        batch = as_batch(batch.rows(sample_rows(batch, _SAMPLED_ROWS)))
    for name, leaf in _leaves("", batch, constants=True):
        if not isinstance(leaf, Tensor):
            digest.update(f"{name!r} = {leaf!r};".encode())
            continue
        digest.update(f"{name!r} {leaf.dtype} {tuple(leaf.shape)};".encode())
        digest.update(tensor_bytes(leaf))
    return digest.hexdigest()


# --- conversion ----------------------------------------------------------------------------------------------------------


def _convert(name: str, data: Any, dtype: torch.dtype | None) -> Any:
    if isinstance(data, tuple):
        return tuple(_convert(f"{name}[{i}]", part, dtype) for i, part in enumerate(data))
    if isinstance(data, dict):
        return {key: _convert(f"{name}[{key!r}]", part, dtype) for key, part in data.items()}
    tensor = data if isinstance(data, Tensor) else _from_numpy(name, _to_numpy(name, data), dtype)
    if tensor.dim() == 0:
        raise ValueError(f"`{name}` is one number; expected an array whose axis 0 runs over the data")
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def _to_numpy(name: str, data: Any) -> np.ndarray:
    """Anything array-like as an array of numbers."""
    if hasattr(data, "to_numpy"):  # pandas, without importing it
        array = data.to_numpy()
        return array if array.dtype != object else _unbox(name, data, array)
    if isinstance(data, list) and data and isinstance(data[0], Tensor):
        if len({part.shape for part in data}) > 1:
            raise _ragged(name)
        raise TypeError(f"`{name}` is a list of tensors; stack them (torch.stack), or give a tuple of arguments")
    try:
        array = np.asarray(data)
    except (ValueError, TypeError):
        raise _ragged(name) from None
    if array.dtype == object or array.dtype.kind in "USOMmV":
        raise TypeError(f"`{name}` should hold numbers, got {_kind(data, array)}{_hint(data)}")
    return array


def _ragged(name: str) -> ValueError:
    return ValueError(
        f"`{name}` is ragged: its rows differ in length, so it is no array; pad them and give the lengths, "
        f"data=pgen.data.pad(sequences), to a family of sequences"
    )


def _unbox(name: str, data: Any, array: np.ndarray) -> np.ndarray:
    """Numbers out of a frame or series whose common dtype is object: columns of several kinds, or missing values."""
    labels = list(map(str, getattr(data, "columns", ())))
    for i, column in enumerate(array.T if array.ndim == 2 else array[None]):
        where = f" column {labels[i]!r}" if labels else ""
        for row, value in enumerate(column):
            if not isinstance(value, (int, float, np.number, np.bool_)):
                kind = "is missing" if str(value) in ("None", "<NA>", "NaT") else f"is {str(value)[:30]!r}, not a number"
                raise TypeError(f"`{name}`{where} {kind} in row {row}; drop it or fill it first")
    return array.astype(np.float64)


def _kind(data: Any, array: np.ndarray) -> str:
    return f"{type(data).__name__} of {array.dtype}" if array.ndim else type(data).__name__


def _hint(data: Any) -> str:
    """The likely fix for something that is no array."""
    if isinstance(data, str) or hasattr(data, "__fspath__"):
        return "; read files with pgen.data.load"
    if hasattr(data, "train"):
        return "; give one part of the split, such as its .train"
    if isinstance(getattr(data, "data", None), (Tensor, dict)):
        return "; give its .data"
    return ""


def _from_numpy(name: str, array: np.ndarray, dtype: torch.dtype | None) -> Tensor:
    kinds: dict[str, type[np.generic]] = {"i": np.int64, "u": np.int64, "b": np.bool_, "f": np.float64}
    if array.dtype.kind not in kinds:
        raise TypeError(f"`{name}` should hold real numbers, got {array.dtype}")
    narrow = array.dtype.kind == "f" and array.dtype.itemsize < 8
    wanted = array.dtype.newbyteorder("=") if narrow else np.dtype(kinds[array.dtype.kind])
    array = np.ascontiguousarray(array, dtype=wanted).reshape(array.shape)
    tensor = torch.from_numpy(array if array.flags.writeable else array.copy())
    return tensor.to(dtype or torch.get_default_dtype()) if tensor.dtype == torch.float64 else tensor


# --- structure -----------------------------------------------------------------------------------------------------------


def _leaves(name: str, batch: Any, *, constants: bool = False) -> Iterator[tuple[str, Any]]:
    """Every tensor with its place, such as ``data['x']``; with ``constants`` also what is not a tensor."""
    if isinstance(batch, (tuple, list)):
        for i, part in enumerate(batch):
            yield from _leaves(f"{name}[{i}]", part, constants=constants)
    elif isinstance(batch, dict):
        for key, part in batch.items():
            yield from _leaves(f"{name}[{key!r}]", part, constants=constants)
    elif constants or isinstance(batch, Tensor):
        yield name, batch


def _first(batch: Batch) -> Tensor:
    for _, tensor in _leaves("", batch):
        return cast(Tensor, tensor)
    raise ValueError("the batch holds no tensor")


def _check_each(name: str, tensor: Tensor, numbers: Tensor | None) -> None:
    bad = ~torch.isfinite(tensor)
    where = bad.nonzero()
    if not len(where):
        return  # the sum overflowed
    row, *column = where[0].tolist()
    count = int(bad.reshape(len(bad), -1).any(1).sum())
    place = f", column {column[0] if len(column) == 1 else tuple(column)}" if column else ""
    value = tensor[tuple(where[0])].item()
    others = f"; {count} of {len(bad)} rows are not finite" if count > 1 and numbers is None else ""
    what = "nan" if math.isnan(value) else value
    number = row if numbers is None else int(numbers[row])
    raise ValueError(f"{name} row {number}{place} is {what}{others}; drop or fill such rows first")
