r"""Callbacks: told of the start, of each logged block, of each validation and of the end; they change nothing."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from ..contracts import Run

__all__ = ["Callback", "JsonLines", "TensorBoard"]


class Callback:
    """Does nothing; override what you need. Called from the training loop, outside the captured step.

    Attributes:
        every: Steps between two calls of ``on_state``; None for none.
    """

    every: int | None = None

    def on_start(self, run: Run) -> None:
        """Training is about to begin."""

    def on_log(self, step: int, metrics: dict[str, float]) -> None:
        """A block of steps has ended: means over it, in nats a datum where they are bounds."""

    def on_validation(self, step: int, bound: float, std_error: float) -> None:
        """A validation bound was computed, in nats a datum."""

    def on_state(self, step: int) -> None:
        """The model may be asked: it holds the parameters that it would keep if training ended here (their average, if any)."""

    def on_end(self, run: Run) -> None:
        """Training has ended."""


class JsonLines(Callback):
    """Appends one JSON object a line to a file: ``{"step": ..., "loss": ..., ...}``.

    Args:
        path: The file; its folder is created.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def _write(self, **entry: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({**entry, "time": time.time()}) + "\n")

    def on_log(self, step: int, metrics: dict[str, float]) -> None:
        """One line of metrics."""
        self._write(step=step, **metrics)

    def on_validation(self, step: int, bound: float, std_error: float) -> None:
        """One line with the validation bound."""
        self._write(step=step, validation_bound=bound, std_error=std_error)

    def on_end(self, run: Run) -> None:
        """One line with the outcome."""
        self._write(step=run.steps, stopped=run.stopped, seconds=run.seconds, tier=run.tier)


class TensorBoard(Callback):
    """Writes scalars for TensorBoard; needs the extra ``pgen[tensorboard]``.

    Args:
        folder: The log folder.
    """

    def __init__(self, folder: str | Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError("TensorBoard needs the extra: pip install 'pgen[tensorboard]'") from error
        self._writer = SummaryWriter(str(folder))

    def on_log(self, step: int, metrics: dict[str, float]) -> None:
        """One point a metric."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def on_validation(self, step: int, bound: float, std_error: float) -> None:
        """The validation bound."""
        self._writer.add_scalar("validation_bound", bound, step)

    def on_end(self, run: Run) -> None:
        """Close the file."""
        self._writer.close()
