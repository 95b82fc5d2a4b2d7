r"""Data larger than memory: sources that reach rows on disk, and a feed that fetches them ahead of training.

A source is anything with ``len(source)`` and ``rows(indices)``; `MemoryMapped` and `Parquet` are two. What is read costs
memory only while it is used: files are reached through the system's page cache, which it takes back as it likes.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from ..contracts import Batch, DataSource, check_positive
from .arrays import as_batch, map_tensors, sample_rows
from .batches import Batches, epoch_order, key
from .readers import open_npy, open_parquet, parquet_column

__all__ = ["Checked", "Feed", "MemoryMapped", "Parquet", "look_rows"]

LOOK_ROWS, LOOK_NUMBERS = 4096, 2**24
"""At most so many rows, and about so many numbers, of a source are looked at before training."""
BLOCK_STEPS, BLOCK_NUMBERS = 64, 2**20
"""A feed fetches at most so many steps, and about so many numbers, at a time."""
RING = 3
"""Blocks that a feed holds: one in use, one that a call may reach into, one on its way."""
MAX_GROUP_BYTES = 2**30
"""Largest row group, decoded, that is read."""


# --- sources -------------------------------------------------------------------------------------------------------------


class MemoryMapped:
    """Arrays in ``.npy`` files, reached in place: any rows in any order, at the price of those rows.

    Each batch becomes tensors as arrays given to ``fit`` would: floats of 8 bytes in torch's default dtype, integers int64.

    Args:
        files: A path, or a tuple or dict of paths to arrays of equal length along axis 0.

    Example:
        >>> source = MemoryMapped({"x": "images.npy", "context": "classes.npy"})  # doctest: +SKIP
        >>> run = vae.fit(source, batch_size=100)  # doctest: +SKIP
    """

    def __init__(self, files: Any) -> None:
        self._arrays = tree_map(lambda path: open_npy(Path(path)), files)
        lengths = {str(array.filename): len(array) for array in tree_leaves(self._arrays)}
        if not lengths:
            raise ValueError("`files` is empty; give the path of a .npy file, or a tuple or dict of paths")
        if len(set(lengths.values())) > 1:
            listed = ", ".join(f"{Path(name).name} {length}" for name, length in lengths.items())
            raise ValueError(f"the arrays of `files` differ in length along axis 0: {listed}")
        self._length = next(iter(lengths.values()))
        self.stamp = _stamp(lengths)

    def __len__(self) -> int:
        return self._length

    def rows(self, indices: Tensor) -> Batch:
        """The rows at ``indices``, in that order: copies in memory."""
        where = indices.numpy()
        return as_batch(tree_map(lambda array: np.take(array.view(np.ndarray), where, axis=0), self._arrays))


class Parquet:
    """Numeric columns of a Parquet file, read by row groups.

    A row costs its whole row group, so an epoch runs through *windows*: each joins a few row groups, drawn at random, and its
    rows are shuffled together. **Rows mix only inside a window.** Where a file is sorted by something that matters, write it
    shuffled, or with small row groups. About three windows are in memory at a time.

    Args:
        path: The file.
        columns: Names of the columns to read, in this order; all by default.
        named: Whether a batch is a dict with one tensor ``(B,)`` a column, instead of one matrix ``(B, columns)``.
        window_bytes: Size of a window in memory; at least one row group.

    Raises:
        ValueError: If the file is damaged or a column does not hold numbers.
    """

    def __init__(
        self, path: str | Path, columns: Sequence[str] | None = None, *, named: bool = False, window_bytes: int = 2**26
    ) -> None:
        check_positive("window_bytes", window_bytes)
        self.path, self._named = Path(path), named
        self._file, self.columns = open_parquet(self.path, columns)
        metadata = self._file.metadata
        sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        row_bytes = 8 * len(self.columns)
        largest = max(sizes) * row_bytes
        if largest > MAX_GROUP_BYTES:
            raise ValueError(
                f"{path}: a row group of {max(sizes)} rows takes {largest / 2**30:.1f} GB; write the file with a smaller "
                f"row_group_size, or choose fewer `columns`"
            )
        self._starts = np.concatenate([[0], np.cumsum(sizes)])
        self._length = int(self._starts[-1])
        self.stamp = _stamp([str(self.path)])
        rows_wanted = max(1, window_bytes // row_bytes)
        self._windows = _Windows(self._starts, rows_wanted)
        self._lock = threading.Lock()
        self._keep = 2 * self._windows.groups + 1
        self._cache: OrderedDict[int, np.ndarray] = OrderedDict()

    def __len__(self) -> int:
        return self._length

    def rows(self, indices: Tensor) -> Batch:
        """The rows at ``indices``, in that order; quick where they lie in few row groups."""
        where = indices.numpy()
        groups = np.searchsorted(self._starts, where, side="right") - 1
        out = np.empty((len(where), len(self.columns)), dtype=_default_dtype())
        for group in np.unique(groups):
            mine = np.flatnonzero(groups == group)
            with self._lock:
                out[mine] = self._group(int(group))[where[mine] - self._starts[group]]
        return as_batch({name: out[:, i] for i, name in enumerate(self.columns)} if self._named else out)

    def epoch_rows(self, seed: int, epoch: int, start: int, stop: int) -> Tensor:
        """The rows at positions ``start`` to ``stop - 1`` of an epoch's order: a function of its arguments alone."""
        with self._lock:
            return self._windows.rows(seed, epoch, start, stop)

    def _group(self, number: int) -> np.ndarray:
        if number not in self._cache:
            while len(self._cache) >= self._keep:
                self._cache.popitem(last=False)
            table = self._file.read_row_group(number, columns=list(self.columns), use_threads=False)
            first = int(self._starts[number])
            parts = [parquet_column(self.path, name, table.column(name), first) for name in self.columns]
            self._cache[number] = np.stack(parts, axis=1).astype(_default_dtype())
        self._cache.move_to_end(number)
        return self._cache[number]


def _default_dtype() -> Any:
    return np.float64 if torch.get_default_dtype() == torch.float64 else np.float32


def _stamp(files: Any) -> str:
    """Names, sizes and times of change: with some rows, the identity of data too large to read whole."""
    found = [(Path(name).name, Path(name).stat()) for name in files]
    return ";".join(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in found)


class _Windows:
    """A shuffled order over blocks of rows: blocks at random, joined into windows of equal numbers, rows shuffled inside."""

    def __init__(self, starts: np.ndarray, rows: int) -> None:
        self._starts, self._sizes = starts, np.diff(starts)
        self.groups = max(1, round(rows / max(1.0, float(self._sizes.mean()))))
        self._epoch: tuple[int, int] | None = None
        self._tables: OrderedDict[int, Tensor] = OrderedDict()

    def rows(self, seed: int, epoch: int, start: int, stop: int) -> Tensor:
        """Rows at the positions from ``start`` to ``stop``."""
        if self._epoch != (seed, epoch):
            self._epoch, self._order = (seed, epoch), epoch_order(len(self._sizes), key(seed, "windows"), epoch).numpy()
            sizes = [int(self._sizes[self._order[i : i + self.groups]].sum()) for i in range(0, len(self._order), self.groups)]
            self._ends = np.cumsum(sizes).tolist()
            self._tables.clear()
        parts = []
        while start < stop:
            window = bisect_right(self._ends, start)
            before = self._ends[window - 1] if window else 0
            upto = min(stop, self._ends[window])
            parts.append(self._table(window, seed, epoch)[start - before : upto - before])
            start = upto
        return torch.cat(parts)

    def _table(self, window: int, seed: int, epoch: int) -> Tensor:
        if window not in self._tables:
            while len(self._tables) >= 2:
                self._tables.popitem(last=False)
            blocks = self._order[window * self.groups : (window + 1) * self.groups]
            rows = torch.cat([torch.arange(int(self._starts[b]), int(self._starts[b + 1])) for b in blocks])
            self._tables[window] = rows[epoch_order(len(rows), key(seed, "window", window), epoch)]
        return self._tables[window]


class Checked:
    """A source whose batches pass through a function, which checks and names them, as they are read.

    Args:
        source: Where rows come from.
        convert: From a batch as the source gives it, and the numbers of its rows, to a Batch on the CPU.
    """

    def __init__(self, source: DataSource, convert: Callable[[Any, Tensor], Batch]) -> None:
        self.source, self._convert = source, convert
        self.looked: Tensor | None = None
        self.check: Callable[[Batch, Tensor], None] | None = None
        self.stamp = getattr(source, "stamp", "")
        if hasattr(source, "epoch_rows"):
            self.epoch_rows = source.epoch_rows

    def __len__(self) -> int:
        return len(self.source)

    def rows(self, indices: Tensor) -> Batch:
        """The rows at ``indices``, checked."""
        raw = self.source.rows(indices)
        batch = self._convert(raw, indices)
        lengths = {len(leaf) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim()}
        if lengths != {len(indices)}:
            raise ValueError(
                f"the data source was asked for {len(indices)} rows and gave {', '.join(map(str, sorted(lengths)))}; "
                f"rows(indices) should give one row for each index"
            )
        if self.check is not None:
            self.check(batch, indices)
        return batch


def look_rows(source: DataSource, at_least: int) -> Tensor:
    """Numbers of the rows of a source that are looked at before training."""
    one = as_batch(source.rows(torch.zeros(1, dtype=torch.int64)))
    numbers = sum(leaf.numel() for leaf in tree_leaves(one) if isinstance(leaf, Tensor))
    return sample_rows(source, max(at_least, min(LOOK_ROWS, LOOK_NUMBERS // max(1, numbers))))


# --- the feed ------------------------------------------------------------------------------------------------------------


class Feed:
    """The minibatches of a source, fetched ahead by a thread into a ring of rows on the device.

    The counterpart of `Batches` where data do not fit in memory: ``indices(step)`` are places in ``resident``, whose rows
    are those of the step once ``load`` has returned. The order is that of `Batches`, a function of seed and step; the ring
    has fixed addresses, so that a captured or compiled step reads from it as from resident data.

    Args:
        source: Where rows come from.
        batch_size: Rows a step.
        seed: Keys the order.
        device: Of the ring.
        dtype: Of floating-point rows.
        share: Of a step's number of rows, the slice that this process needs; all by default.
        whole: Whether every batch is whole; see `Batches`.

    Attributes:
        resident: A batch of ring rows, structured as the source's.
        numbers: The row of the source that each ring row holds, int64.
        span: Steps that one ``load`` may ask for.
    """

    def __init__(
        self,
        source: DataSource,
        batch_size: int,
        seed: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        share: Callable[[int], slice] | None = None,
        whole: bool = False,
    ) -> None:
        self.source, self.batches = source, Batches(source, batch_size, seed, whole=whole)
        self._size, self._share, self.device = self.batches.batch_size, share or slice, torch.device(device)
        first = self.batches.indices(0)
        batch = source.rows(first)
        numbers = sum(leaf.numel() for leaf in tree_leaves(batch) if isinstance(leaf, Tensor))
        self.span = max(1, min(BLOCK_STEPS, BLOCK_NUMBERS // max(1, numbers)))
        repeated = torch.arange(RING * self.span * self._size) % len(first)  # real rows, for a capture before the first load

        def ring(rows: Tensor) -> Tensor:
            host = (rows.to(dtype) if rows.is_floating_point() else rows).index_select(0, repeated)
            return host.pin_memory() if self.device.type == "cuda" else host

        self._host = (map_tensors(ring, batch), ring(first))
        self.resident, self.numbers = (map_tensors(lambda t: t.to(self.device), part) for part in self._host)
        slots = torch.arange(len(repeated))
        self._places, self._slots = slots.to(self.device).split(self._size), slots.split(self._size)
        self._last = min(self._size, len(source) - (len(self) - 1) * self._size)
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._closed = False
        self._oldest = self._filled = self._copied = 0  # blocks: first still needed, first not fetched, first not on the device
        self._events: dict[int, Any] = {}

    def __len__(self) -> int:
        """Batches an epoch."""
        return len(self.batches)

    def indices(self, step: int) -> Tensor:
        """Where in ``resident`` the rows of a step lie once they are loaded, int64."""
        places = self._places[step % len(self._places)]
        return places if (step + 1) % len(self) else places[: self._last]

    def load(self, step: int, count: int = 1) -> None:
        """Wait until the rows of ``count`` steps from ``step`` on are in the ring; those of steps before may go.

        Raises:
            Exception: Whatever reading or checking those rows raised.
        """
        first, last = step // self.span, (step + count - 1) // self.span
        if self._thread is None or not self._oldest <= first <= self._filled:
            self._start(first)
        if first == self._oldest and last < self._copied:
            return
        with self._changed:
            self._oldest = first
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._filled > last or self._error is not None)
        if self._filled <= last and self._error is not None:
            raise self._error
        if self.device.type == "cuda":
            for block in range(max(self._copied, first), last + 1):
                self._to_device(block % RING)
        self._copied = last + 1

    def close(self) -> None:
        """Stop fetching. A later ``load`` starts anew."""
        if self._thread is None:
            return
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()
        self._thread = None

    # -- the thread ---------------------------------------------------------------------------------------------------

    def _start(self, block: int) -> None:
        self.close()
        self._closed, self._error = False, None
        self._oldest = self._filled = self._copied = block
        self._thread = threading.Thread(target=self._work, name="pgen-feed", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        try:
            while not self._closed:
                self._fill(self._filled)
                with self._changed:
                    self._filled += 1
                    self._changed.notify_all()
                    self._changed.wait_for(lambda: self._closed or self._filled < self._oldest + RING)
        except BaseException as error:  # whatever a source may raise is raised again where its rows are waited for
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _fill(self, block: int) -> None:
        steps = range(block * self.span, (block + 1) * self.span)
        numbers = [self.batches.indices(step) for step in steps]
        places: Any = slice(block % RING * self.span * self._size, (block % RING + 1) * self.span * self._size)
        if self._share is not slice or any(len(n) < self._size for n in numbers):
            slots = [self._slots[step % len(self._slots)][: len(n)] for step, n in zip(steps, numbers)]
            parts = [self._share(len(n)) for n in numbers]
            numbers = [n[part] for n, part in zip(numbers, parts)]
            places = torch.cat([s[part] for s, part in zip(slots, parts)])
        rows = torch.cat(numbers)
        if not len(rows):
            return
        batch = self.source.rows(rows)
        if block % RING in self._events:
            self._events[block % RING].synchronize()
        for into, leaf in zip(tree_leaves(self._host), tree_leaves((batch, rows))):
            if isinstance(into, Tensor):
                into[places] = leaf.to(into.dtype)

    def _to_device(self, slot: int) -> None:
        size = self.span * self._size
        for host, device in zip(tree_leaves(self._host), tree_leaves((self.resident, self.numbers))):
            if isinstance(host, Tensor):
                part = slice(slot * size, (slot + 1) * size)
                device[part].copy_(host[part], non_blocking=True)
        self._events[slot] = torch.cuda.Event()
        self._events[slot].record()
