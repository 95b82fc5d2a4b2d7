r"""Checkpoints: what a fit needs to go on exactly where it was.

Noise and order are functions of the seed and the step, so a checkpoint holds tensors and counters only: one safetensors
file, written beside, synced and renamed, with the one before it kept. At every moment at least one whole checkpoint lies in
the folder, and one process at a time writes there.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import socket
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import files

__all__ = ["Checkpoint", "check_same", "pack", "recorded", "unpack"]

ANY = "any"
"""Stands in a configuration for a value that cannot change the result."""


class Checkpoint:
    """A folder with the last two checkpoints of one run, locked while it is open.

    Args:
        folder: Created if missing.
        writes: Whether this process writes there. Of several that train one model the first does, and the others read.

    Raises:
        ValueError: If another fit is writing there.
    """

    def __init__(self, folder: Path, writes: bool = True) -> None:
        self.folder, self.writes = folder, writes
        self._fresh, self.path, self.previous = _paths(folder)
        self._lock = folder / "lock"
        if not writes:
            return
        folder.mkdir(parents=True, exist_ok=True)
        _take_lock(self._lock)
        files.sweep(folder)
        self._rotate()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *args: object) -> None:
        if self.writes:
            self._lock.unlink(missing_ok=True)

    def write(self, tensors: dict[str, Tensor], history: dict[str, np.ndarray], metadata: dict[str, Any]) -> None:
        """Write beside, then let the one before last go.

        Raises:
            OSError: If it cannot be written, with the path, the bytes needed and the bytes free; what is there stays.
        """
        columns = {f"history.{name}": torch.from_numpy(np.ascontiguousarray(c)) for name, c in history.items()}
        files.write(self._fresh, {**tensors, **columns}, metadata)
        self._rotate()

    def clear(self) -> None:
        """Remove the checkpoints."""
        for path in (self.path, self.previous):
            path.unlink(missing_ok=True)

    def _rotate(self) -> None:
        """Give a whole new file its name; a process killed in between leaves this to the next."""
        if self._fresh.exists():
            if self.path.exists():
                os.replace(self.path, self.previous)
            os.replace(self._fresh, self.path)

    def read(self) -> tuple[dict[str, Tensor], dict[str, np.ndarray], dict[str, Any]] | None:
        """The newest whole checkpoint, or None; a damaged one is named in a warning and the one before is taken.

        Raises:
            ValueError: If there are checkpoints but none can be read: a run is never started over in silence.
        """
        reasons = []
        for path in (self.path, self.previous):
            if not path.exists():
                continue
            try:
                tensors, metadata = files.read(path)
            except (ValueError, OSError) as error:
                reasons.append(str(error))
                continue
            if reasons:
                warnings.warn(f"checkpoint {reasons[0]}; falling back to the one before, {path}", stacklevel=3)
            history = {n.removeprefix("history."): t.numpy() for n, t in tensors.items() if n.startswith("history.")}
            return {n: t for n, t in tensors.items() if not n.startswith("history.")}, history, metadata
        if reasons:
            what = "; ".join(reasons)
            raise ValueError(f"{self.folder} has no checkpoint that can be read ({what}); move it away to start anew")
        return None


def recorded(folder: Path, name: str) -> Any:
    """One value of the configuration of the newest whole checkpoint in a folder; None if there is none."""
    for path in _paths(folder):
        with contextlib.suppress(ValueError, OSError, KeyError):
            return files.read_metadata(path)["configuration"][name]
    return None


def _paths(folder: Path) -> list[Path]:
    """Of a checkpoint being written, the newest and the one before."""
    return [folder / name for name in ("checkpoint.new", "checkpoint.pgen", "checkpoint-before.pgen")]


def check_same(saved: dict[str, Any], now: dict[str, Any], path: Path) -> None:
    """Refuse to go on with another configuration or other data, naming what differs."""
    for name, value in now.items():
        before = saved.get(name)
        if before != value and ANY not in (before, value):
            raise ValueError(
                f"{path} holds a run with {name} = {_around(before, value)!r}, this one has {_around(value, before)!r}; "
                f"use another folder, or the same {name}"
            )


def _around(value: Any, other: Any) -> str:
    """At most 60 characters of a value, from where it begins to differ."""
    text = str(value)
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(text, str(other))))
    start = max(0, same - 20) if len(text) > 60 else 0
    return ("..." if start else "") + text[start : start + 60]


# --- one writer at a time ------------------------------------------------------------------------------------------------


def _take_lock(path: Path) -> None:
    """Note this process in ``path``, unless a live one stands there; of another host nobody can tell, so it counts as live."""
    with _exclusive(path) as file:
        try:
            holder = json.loads(file.read() or "{}")
        except ValueError:
            holder = {}  # torn by a crash
        if _alive(holder):
            raise ValueError(
                f"{path.parent} is in use by process {holder.get('pid')} on {holder.get('host')} since {holder.get('since')}; "
                f"wait for it or use another folder (if that machine is gone, delete {path})"
            )
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        me = {"pid": os.getpid(), "host": socket.gethostname(), "since": now, "started": _started(os.getpid())}
        file.seek(0)
        file.truncate()
        file.write(json.dumps(me))


@contextlib.contextmanager
def _exclusive(path: Path) -> Iterator[Any]:
    """The file, open for reading and writing, with other processes kept out where the system can (POSIX)."""
    while True:
        with open(path, "a+", encoding="utf-8") as file:
            if os.name == "posix":
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX)
            if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
                continue  # released while we waited: this file is no longer the one of that name
            file.seek(0)
            yield file
            return


def _alive(holder: Any) -> bool:
    if not isinstance(holder, dict) or not isinstance(holder.get("pid"), int):
        return False
    if holder.get("host") != socket.gethostname():
        return True
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # alive, and somebody else's
    return _started(holder["pid"]) == holder.get("started")


def _started(pid: int) -> str:
    """When a process began, as the system counts (Linux), so that a number used again is told apart; else nothing."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "ended" if fields[0] == "Z" else f"{boot}:{fields[19]}"
    except (OSError, IndexError):
        return ""


# --- the state of an optimizer that is not ours --------------------------------------------------------------------------


def pack(value: Any, prefix: str, tensors: dict[str, Tensor]) -> Any:
    """Plain JSON for nested dicts, lists and tuples of numbers, strings and tensors; the tensors go into ``tensors``.

    Raises:
        ValueError: On anything else.
    """
    if isinstance(value, Tensor):
        name = f"{prefix}.{len(tensors)}"
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[pack(part, prefix, tensors) for part in item] for item in value.items()]}
    if isinstance(value, (list, tuple)):
        return {"tuple" if isinstance(value, tuple) else "list": [pack(part, prefix, tensors) for part in value]}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ValueError(f"the optimizer keeps a {type(value).__name__}, which a checkpoint cannot hold; fit without `checkpoint`")


def unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of ``pack``."""
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "float":
        return float(content)
    if kind == "dict":
        return {unpack(key, tensors): unpack(part, tensors) for key, part in content}
    parts = [unpack(part, tensors) for part in content]
    return tuple(parts) if kind == "tuple" else parts
