r"""Several processes train one model: ``torchrun --nproc-per-node=N script.py`` on a script that knows nothing of it.

A step's batch is cut into M *micro-batches*, in order; each has noise keyed by (seed, step, micro-batch), whichever process
takes it. Their losses and gradients, weighted by their rows, are added over all processes before anything looks at them, and
every process then makes the same update. What is trained depends on M, which is part of the configuration, and not on the
number of processes: to rounding, or to the bit where gradients are gathered and added in one order.

References:
    Goyal et al. (2017), Accurate, large minibatch SGD, arXiv:1706.02677 (sums over workers of equal shares); Li et al.
    (2023), EasyScale, arXiv:2208.14228 (results that do not depend on the number of workers).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["LostProcess", "Workers", "together"]

_NEEDED = ("RANK", "MASTER_ADDR", "MASTER_PORT")
_GRACE_SECONDS = 2.0
_server: dist.Store | None = None  # where no launcher serves the store, the first process does, for its life
_joined = 0  # groups made so far: each has names of its own in the store


class LostProcess(RuntimeError):
    """Another process of the fit failed, hangs or has gone. The message says which and why, as far as is known."""


class Workers:
    """The processes of one fit, this one among them, and what each takes of a step.

    Args:
        micro_batches: M, the parts that a step's batch is cut into.
        exact: Whether parts are added in one order, for the same bits on any number of processes.
        rank: Of this process, from 0.
        world: How many there are.
        store: Where processes leave word for each other; None where the group is not ours.
        timeout: Seconds that one waits for another.
        device: Where what is exchanged must lie.
    """

    def __init__(
        self,
        micro_batches: int = 1,
        exact: bool = False,
        *,
        rank: int = 0,
        world: int = 1,
        store: dist.Store | None = None,
        timeout: float = 600.0,
        device: torch.device | str = "cpu",
    ) -> None:
        if micro_batches < world:
            raise ValueError(
                f"a step of {micro_batches} micro-batches cannot be divided between {world} processes; "
                f"start at most {micro_batches}, or set micro_batches={world} (a resumed run keeps its own)"
            )
        self.micro_batches, self.exact, self.rank, self.world = micro_batches, exact, rank, world
        self.timeout, self._store, self._device = timeout, store, torch.device(device)
        self._counts = [len(range(micro_batches)[_cut(micro_batches, world, r)]) for r in range(world)]

    @property
    def leads(self) -> bool:
        """Whether this process prints and writes for all."""
        return self.rank == 0

    @property
    def own(self) -> range:
        """The micro-batches of this process."""
        return range(self.micro_batches)[_cut(self.micro_batches, self.world, self.rank)]

    def part(self, length: int, number: int) -> slice:
        """The rows of micro-batch ``number`` in a batch of some length."""
        return _cut(length, self.micro_batches, number)

    def rows(self, index: Tensor, number: int) -> Tensor:
        """The row indices of a micro-batch; of an empty one, a row to learn the shapes from."""
        part = self.part(len(index), number)
        return index[part] if part.stop > part.start else index[:1]

    def share(self, length: int) -> slice:
        """The rows of a batch that this process needs."""
        return slice(self.part(length, self.own[0]).start, self.part(length, self.own[-1]).stop)

    # -- a step -------------------------------------------------------------------------------------------------------

    def gradients(
        self,
        run: Callable[[Tensor], Sequence[Tensor]],
        index: Tensor,
        reseed: Callable[[int], None],
        buffers: Sequence[Tensor],
    ) -> list[Tensor]:
        r"""A step's loss, metrics and gradients over all processes: :math:`\sum_m \frac{B_m}{B} g_m`.

        Each micro-batch meets the buffers as the step found them; what it makes of them is averaged the same way.

        Args:
            run: From row indices to ``[loss, *metrics, *gradients]``.
            index: The step's rows, ``(B,)``, the same on every process.
            reseed: Keys the noise of a micro-batch.
            buffers: Numbers that ``run`` may change.
        """
        buffers = [b for b in buffers if b.dtype != torch.bool]
        before = [b.clone() for b in buffers]
        rows: list[Tensor] = []
        out: Sequence[Tensor] = ()
        for number in self.own:
            part = self.part(len(index), number)
            _copy(buffers, before)
            reseed(number)
            out = run(self.rows(index, number))
            flat = _flat([*out, *(b - old for b, old in zip(buffers, before))])
            weight = (part.stop - part.start) / len(index)
            rows.append(flat * weight if weight else torch.zeros_like(flat))
        *sums, changes = _unflat(self._added(rows), [*out, *before], len(out))
        _copy(buffers, [old + _like(change, old) for old, change in zip(before, changes)])
        return list(sums[0])

    def _added(self, rows: list[Tensor]) -> Tensor:
        """The sum of every process's rows."""
        if self.exact and self.world > 1:
            rows = self._gathered(rows)
        total = rows[0]
        for row in rows[1:]:
            total = total + row
        if not self.exact:
            self._collective(dist.all_reduce, total)
        return total

    def _gathered(self, rows: list[Tensor]) -> list[Tensor]:
        """The rows of all processes in the order of their micro-batches."""
        most = max(self._counts)
        mine = torch.stack(rows + [torch.zeros_like(rows[0])] * (most - len(rows)))
        all_rows = [torch.empty_like(mine) for _ in range(self.world)]
        self._collective(dist.all_gather, all_rows, mine)
        return [row for part, count in zip(all_rows, self._counts) for row in part[:count]]

    # -- between steps ------------------------------------------------------------------------------------------------

    def largest(self, *numbers: int) -> list[int]:
        """The largest of each number over all processes."""
        values = torch.tensor(numbers, dtype=torch.int64, device=self._device)
        self._collective(dist.all_reduce, values, dist.ReduceOp.MAX)
        return [int(v) for v in values.tolist()]

    def first(self, *numbers: float) -> list[float]:
        """The numbers of the first process."""
        values = torch.tensor(numbers, dtype=torch.float64, device=self._device)
        self._collective(dist.broadcast, values, 0)
        return values.tolist()

    def align(self, facts: Mapping[str, str], tensors: Sequence[Tensor]) -> None:
        """Refuse to go on unless all processes have the same facts; then give all the first one's tensors.

        Raises:
            ValueError: Naming a process and a fact that differs from the first process's.
        """
        if self.world == 1:
            return
        lines = sorted(f"{name} {value}" for name, value in facts.items())
        texts = self._texts("\n".join(lines))
        for rank, text in enumerate(texts):
            if text != texts[0]:
                theirs, first = set(text.split("\n")), set(texts[0].split("\n"))
                only = [sorted(theirs - first)[:1], sorted(first - theirs)[:1]]
                raise ValueError(
                    f"the processes do not train the same thing: process {rank} has {''.join(only[0]) or 'nothing'}, process 0 "
                    f"has {''.join(only[1]) or 'nothing'} in its place; run the same script with the same data on each"
                )
        for tensor in tensors:
            value = tensor.detach().contiguous()
            self._collective(dist.broadcast, value.view(torch.uint8) if value.dtype == torch.bool else value, 0)
            tensor.detach().copy_(value)

    def _texts(self, text: str) -> list[str]:
        """Every process's text, or its digest alone where all agree."""
        digest = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "little")
        high, low = self.largest(digest, -digest)
        if high == -low:
            return [text] * self.world
        data = torch.tensor(list(text.encode()), dtype=torch.uint8, device=self._device)
        (longest,) = self.largest(len(data))
        mine = torch.cat([data, data.new_zeros(longest - len(data))])
        found = [torch.empty_like(mine) for _ in range(self.world)]
        self._collective(dist.all_gather, found, mine)
        return [bytes(t.tolist()).rstrip(b"\0").decode() for t in found]

    def _collective(self, function: Callable[..., object], *args: object) -> None:
        if self.world == 1:
            return
        try:
            function(*args)
        except RuntimeError as error:
            raise LostProcess(self._cause(error)) from None

    # -- what went wrong ----------------------------------------------------------------------------------------------

    def tell(self, error: BaseException) -> None:
        """Leave word of a failure for the others."""
        if self._store is not None and not isinstance(error, LostProcess):
            with contextlib.suppress(RuntimeError):
                self._store.set("failed", f"process {self.rank} failed: {type(error).__name__}: {' '.join(str(error).split())}")

    def _cause(self, error: RuntimeError) -> str:
        """One line: what another process left word of, or which does not answer."""
        here, reason = f"process {self.rank} of {self.world} stops", str(error).split("\n")[0][:160]
        if self._store is None:
            return f"{here}: {reason}"
        with contextlib.suppress(RuntimeError):
            silent = self._silent()
            if self._store.check(["failed"]):
                return f"{here}: {self._store.get('failed').decode()[:400]}"
            if silent:
                return f"{here}: no answer from process {', '.join(map(str, silent))} within {self.timeout:g} s, or it has gone"
        return f"{here}: {reason}"

    def _silent(self) -> list[int]:
        """Processes that do not say within a moment that they wait too."""
        assert self._store is not None
        self._store.set(f"waits {self.rank}", "")
        until = time.monotonic() + _GRACE_SECONDS
        silent = [r for r in range(self.world) if r != self.rank]
        while silent and time.monotonic() < until and not self._store.check(["failed"]):
            time.sleep(0.02)
            silent = [r for r in silent if not self._store.check([f"waits {r}"])]
        return silent


# --- joining and leaving -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def together(micro_batches: int | None, *, exact: bool, timeout: float, device: torch.device) -> Iterator[Workers]:
    """The processes that the environment speaks of, for one fit: one alone, those of torchrun, or a group already made.

    Args:
        micro_batches: M; None for one a process.
        exact: See `Workers`.
        timeout: Seconds that a process waits for another.
        device: What is trained on.

    Raises:
        LostProcess: In the others, where a process fails or hangs.
    """
    theirs = dist.is_available() and dist.is_initialized()
    world = dist.get_world_size() if theirs else int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Workers(micro_batches or 1, exact)
        return
    rank = dist.get_rank() if theirs else _environment_rank()
    store = None if theirs else _connect(rank, timeout)
    workers = Workers(micro_batches or world, exact, rank=rank, world=world, store=store, timeout=timeout, device=device)
    try:
        if store is not None:
            _start(store, rank, world, timeout, device)
        yield workers
        dist.barrier()  # without it a process that leaves early takes others down
    except BaseException as error:
        workers.tell(error)
        raise
    finally:
        if store is not None and dist.is_initialized():
            dist.destroy_process_group()


def _environment_rank() -> int:
    missing = [name for name in _NEEDED if name not in os.environ]
    if missing:
        raise ValueError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but the environment has no {', '.join(missing)}; start the script with "
            f"torchrun, or unset WORLD_SIZE"
        )
    return int(os.environ["RANK"])


def _connect(rank: int, timeout: float) -> dist.Store:
    """A corner of the launcher's store that no other attempt and no other fit has used."""
    global _server, _joined
    store = _server
    if store is None:
        serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(address, port, None, serves, timedelta(seconds=timeout), wait_for_workers=False)
        _server = store if serves else None
    _joined += 1
    return dist.PrefixStore(f"pgen {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')} {_joined}", store)


def _start(store: dist.Store, rank: int, world: int, timeout: float, device: torch.device) -> None:
    backend = "nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timedelta(seconds=timeout))
    except RuntimeError as error:
        reason = str(error).split("\n")[0][:160]
        raise LostProcess(f"process {rank} of {world} did not find the others within {timeout:g} s: {reason}") from None


# --- tensors -------------------------------------------------------------------------------------------------------------


def _cut(length: int, parts: int, number: int) -> slice:
    """Part ``number`` of a range cut into parts whose lengths differ by one at most, the longer ones first."""
    size, longer = divmod(length, parts)
    start = number * size + min(number, longer)
    return slice(start, start + size + (number < longer))


def _copy(into: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for tensor, value in zip(into, values):
        tensor.copy_(value)


def _like(change: Tensor, old: Tensor) -> Tensor:
    return change.to(old.dtype) if old.is_floating_point() else change.round().to(old.dtype)


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    """One vector of all numbers, in the widest floating dtype among them."""
    dtype = torch.float32
    for tensor in tensors:
        if tensor.is_floating_point():
            dtype = torch.promote_types(dtype, tensor.dtype)
    return torch.cat([t.detach().reshape(-1).to(dtype) for t in tensors])


def _unflat(vector: Tensor, like: Sequence[Tensor], cut: int) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors of a vector: the first ``cut`` in their own dtype, the others as they were added."""
    parts = vector.split([t.numel() for t in like])
    shaped = [part.reshape(t.shape) for part, t in zip(parts, like)]
    return [part.to(t.dtype) for part, t in zip(shaped[:cut], like)], shaped[cut:]
