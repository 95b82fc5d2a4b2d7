r"""Checkpoints: what a fit needs to go on exactly where it was.

Noise and order are functions of the seed and the step, so a checkpoint holds tensors and counters only: one safetensors
file, written beside, synced and renamed, with the one before it kept.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import files

__all__ = ["Checkpoint"]


class Checkpoint:
    """A folder with the last two checkpoints of one run.

    Args:
        folder: Created if missing.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        files.sweep(folder)
        self.path, self.previous = folder / "checkpoint.pgen", folder / "checkpoint-before.pgen"

    def write(self, tensors: dict[str, Tensor], history: dict[str, np.ndarray], metadata: dict[str, Any]) -> None:
        """Write beside, keep the one before."""
        columns = {f"history.{name}": torch.from_numpy(np.ascontiguousarray(c)) for name, c in history.items()}
        fresh = self.path.with_suffix(".new")
        files.write(fresh, {**tensors, **columns}, metadata)
        if self.path.exists():
            os.replace(self.path, self.previous)
        os.replace(fresh, self.path)

    def read(self) -> tuple[dict[str, Tensor], dict[str, np.ndarray], dict[str, Any]] | None:
        """The newest whole checkpoint, or None; a damaged one is named in a warning and the one before is taken."""
        for path in (self.path, self.previous):
            if not path.exists():
                continue
            try:
                tensors, metadata = files.read(path)
            except (ValueError, OSError) as error:
                warnings.warn(f"checkpoint {path} cannot be used ({error}); falling back to the one before", stacklevel=3)
                continue
            history = {n.removeprefix("history."): t.numpy() for n, t in tensors.items() if n.startswith("history.")}
            return {n: t for n, t in tensors.items() if not n.startswith("history.")}, history, metadata
        return None


def check_same(saved: dict[str, Any], now: dict[str, Any], path: Path) -> None:
    """Refuse to go on with another configuration or other data, naming what differs."""
    for name, value in now.items():
        if saved.get(name) != value:
            raise ValueError(
                f"{path} holds a run with {name} = {str(saved.get(name))[:60]!r}, this one has {str(value)[:60]!r}; "
                f"use another folder, or the same {name}"
            )
