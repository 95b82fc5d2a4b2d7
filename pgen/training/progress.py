r"""What a person sees while training: a bar with the bound, its trend and the time left."""

from __future__ import annotations

import time
from typing import Any

__all__ = ["Progress"]

QUIET_SECONDS = 1.0
"""A fit that ends within about this time shows nothing."""


class Progress:
    """A progress bar on standard error that appears once a fit takes longer than a moment.

    Args:
        total: Steps in all.
        show: Whether to show anything at all.
    """

    def __init__(self, total: int, show: bool) -> None:
        self.total, self.show = total, show
        self._start = time.perf_counter()
        self._bar: Any = None
        self._task: Any = None

    def update(self, step: int, bound: float, trend: float, note: str) -> None:
        """Show ``bound`` (nats a datum), its change a thousand steps, and a short note."""
        if not self.show or (self._bar is None and time.perf_counter() - self._start < QUIET_SECONDS):
            return
        if self._bar is None:
            self._open()
        arrow = "→" if abs(trend) < 5e-4 else "↗" if trend > 0 else "↘"
        words = f"bound {bound:.3f} nats {arrow} {trend:+.2f}/1k · {note}"
        self._bar.update(self._task, completed=step, words=words)

    def _open(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Rich
        from rich.table import Column

        columns = (
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            BarColumn(10),
            TextColumn("{task.fields[words]}", table_column=Column(no_wrap=True)),
            TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True)),
        )
        self._bar = Rich(*columns, console=Console(stderr=True), transient=False)
        self._task = self._bar.add_task("fit", total=self.total, words="")
        self._bar.start()

    def close(self) -> None:
        """Leave the last line standing."""
        if self._bar is not None:
            self._bar.stop()
