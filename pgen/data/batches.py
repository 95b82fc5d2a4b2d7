r"""Row order and keys as pure functions of (seed, epoch, position): nothing to save, nothing to restore.

Every generator in pgen is seeded by `key` or `step_keys`; every minibatch is ``Batches.indices(step)``. A run can
therefore stop and go on anywhere, on any number of processes, with the same rows and the same noise.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor

from ..contracts import Batch, DataSource, check_positive
from .arrays import num_rows, rows

__all__ = ["Batches", "chunks", "epoch_order", "key", "permute", "step_keys"]

_TABLE_ROWS = 2**24  # longest order that is kept as a table
_PLAIN = {int, str}
_POSITIVE = 2**63 - 1


def key(*parts: int | str) -> int:
    """A 63-bit hash of its parts (BLAKE2b), the same in every process and version: the seed of a generator.

    Costs about 1.5 microseconds.

    Example:
        >>> key(0, "init") == key(0, "init"), key(0, "init") == key("0", "init")
        (True, False)
    """
    if not _PLAIN.issuperset(map(type, parts)):
        parts = tuple(part if isinstance(part, str) else operator.index(part) for part in parts)
    return int.from_bytes(blake2b(repr(parts).encode(), digest_size=8).digest(), "little") & _POSITIVE


def step_keys(seed: int, start: int, count: int) -> list[int]:
    """The 63-bit keys of steps ``start`` to ``start + count - 1``: SplitMix64 as a counter.

    A pure function of seed and step, and cheap for many steps at once: ``step_keys(s, 0, 9)[3] == step_keys(s, 3, 1)[0]``.

    References:
        Steele, Lea and Flood (2014), Fast splittable pseudorandom number generators, doi:10.1145/2660193.2660195.
    """
    base = np.full(1, key(seed, "steps"), dtype=np.uint64)
    z = base + np.arange(start + 1, start + count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) & np.uint64(_POSITIVE)).tolist()


def epoch_order(num_rows: int, seed: int, epoch: int, device: torch.device | str = "cpu") -> Tensor:
    """The order of all rows in an epoch, ``(num_rows,)``, the same on every device.

    `torch.randperm` with a generator of its own up to 2**24 rows, `permute` above.
    """
    if num_rows > _TABLE_ROWS:
        return permute(torch.arange(num_rows, device=device), num_rows, seed, epoch)
    generator = torch.Generator().manual_seed(key(seed, "order", epoch))
    return torch.randperm(num_rows, generator=generator).to(device)


def permute(positions: Tensor, num_rows: int, seed: int, epoch: int) -> Tensor:
    r"""The rows at some positions of an epoch's order, without a table: a keyed Feistel permutation of ``range(num_rows)``.

    Positions are written as :math:`i = a\,l + r` on an :math:`l \times r` grid just large enough; each round shifts one
    coordinate by a keyed hash of the other, which is a bijection; what lands outside the range walks on until it is inside.

    Shapes: ``positions`` int64 of any shape, each in [0, num_rows) -> the same shape.

    References:
        Black and Rogaway (2002), Ciphers with arbitrary finite domains, doi:10.1007/3-540-45760-7_9.
    """
    right = max(1, round(num_rows**0.5))
    left = -(-num_rows // right)
    keys = step_keys(key(seed, "order", epoch), 0, 8)
    out = _feistel(positions, left, right, keys)
    outside = out >= num_rows
    while bool(outside.any()):
        out = torch.where(outside, _feistel(out, left, right, keys), out)
        outside = out >= num_rows
    return out


def chunks(num_rows: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most ``size`` rows that cover all rows once, for evaluation."""
    check_positive("size", size)
    return (slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size))


class Batches:
    """The minibatches of every step, as a function of the step.

    An epoch visits each row once, in an order of its own; its last batch is shorter where the size does not divide the rows.
    A batch that holds all rows keeps them in their own order.

    Args:
        data: The data, on the device where the batches are wanted, or only the number of its rows. A source with a method
            ``epoch_rows(seed, epoch, start, stop)`` decides its own order.
        batch_size: Rows a batch.
        seed: Keys the order.
        shuffle: Whether to permute; else every epoch runs in the order of the data.
        device: Where ``indices`` live.
        whole: Whether every batch has ``batch_size`` rows: an epoch leaves out the rest, other rows each time.

    Example:
        >>> batches = Batches(torch.arange(5.0), batch_size=2, seed=0)
        >>> len(batches), [len(batches.indices(step)) for step in range(3)]
        (3, [2, 2, 1])
    """

    def __init__(
        self,
        data: Batch | DataSource | int,
        batch_size: int,
        seed: int,
        shuffle: bool = True,
        device: torch.device | str = "cpu",
        whole: bool = False,
    ) -> None:
        self.num_rows = data if isinstance(data, int) else num_rows(data)
        check_positive("batch_size", batch_size)
        if self.num_rows < 1:
            raise ValueError("`data` has no rows")
        self.data, self.batch_size, self.seed, self.device = data, min(batch_size, self.num_rows), seed, device
        self.shuffle = shuffle and self.batch_size < self.num_rows
        self._own_order = getattr(data, "epoch_rows", None) if self.shuffle else None
        self._length = self.num_rows // self.batch_size if whole else -(-self.num_rows // self.batch_size)
        self._epoch = -1
        self._views: tuple[Tensor, ...] = ()

    def __len__(self) -> int:
        """Batches an epoch."""
        return self._length

    def epoch(self, step: int) -> int:
        """The epoch that a global step belongs to, from 0."""
        return step // self._length

    def position(self, step: int) -> int:
        """How many batches of its epoch come before a global step."""
        return step % self._length

    def indices(self, step: int) -> Tensor:
        """The rows of global step ``step``, int64, counted from 0 across epochs."""
        epoch, position = divmod(step, self._length)
        if self.num_rows > _TABLE_ROWS or self._own_order is not None:
            return self._without_table(epoch, position)
        if epoch != self._epoch and (self.shuffle or not self._views):
            self._views = self._order(epoch).split(self.batch_size)
            self._epoch = epoch
        return self._views[position]

    def rows(self, step: int) -> Batch:
        """The data of global step ``step``."""
        if isinstance(self.data, int):
            raise ValueError("these batches were made from a number of rows; give them the data to draw rows")
        return rows(self.data, self.indices(step))

    def _order(self, epoch: int) -> Tensor:
        if self.shuffle:
            return epoch_order(self.num_rows, self.seed, epoch, self.device)
        return torch.arange(self.num_rows, device=self.device)

    def _without_table(self, epoch: int, position: int) -> Tensor:
        start = position * self.batch_size
        stop = min(start + self.batch_size, self.num_rows)
        if self._own_order is not None:
            return self._own_order(self.seed, epoch, start, stop).to(self.device)
        where = torch.arange(start, stop, device=self.device)
        return permute(where, self.num_rows, self.seed, epoch) if self.shuffle else where


def _feistel(positions: Tensor, left: int, right: int, keys: list[int]) -> Tensor:
    """One pass of alternating rounds over the grid ``left x right``."""
    high, low = torch.div(positions, right, rounding_mode="floor"), positions % right
    for even, odd in zip(keys[::2], keys[1::2]):
        high = (high + _mix(low, even)) % left
        low = (low + _mix(high, odd)) % right
    return high * right + low


def _mix(x: Tensor, salt: int) -> Tensor:
    """A 62-bit hash of each integer; products wrap around."""
    x = (x ^ salt) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 29) & 0x7FFFFFFFF)) * -0x6B2FB644ECCEEE15
    return (x ^ ((x >> 32) & 0xFFFFFFFF)) & (2**62 - 1)
