r"""What a person sees while something takes long: a bar with what is being done and the time left."""

from __future__ import annotations

import time
from typing import Any

from ..contracts import spoken

__all__ = ["Progress"]

QUIET_SECONDS = 1.0
"""A fit that ends within about this time shows nothing."""

_OPEN: list[Progress] = []
"""Bars at work, the outermost first: it alone is drawn."""


class Progress:
    """A progress bar on standard error that appears once the work takes longer than a moment.

    Used as a context it is for questions: it covers the bars of whatever is called inside, which add their words to this one;
    it goes when the answer comes; and it shows on a terminal alone.

    Args:
        total: Steps in all.
        show: Whether to show anything at all.
        quiet: Seconds that pass before it appears.
    """

    def __init__(self, total: int, show: bool, quiet: float = QUIET_SECONDS) -> None:
        self.total, self.show, self.quiet = total, show, quiet
        self.done, self.words, self.brief = 0, "", False
        self._start = time.perf_counter()
        self._bar: Any = None
        self._task: Any = None

    def update(self, step: int, word: str, loss: float, trend: float, note: str) -> None:
        """Show the loss as what ``word`` says is maximised, how fast the loss falls a thousand steps, and a short note."""
        name, sign, unit = spoken(word, training=True)
        change = sign * trend
        arrow = "→" if abs(change) < 5e-4 else "↗" if change > 0 else "↘"
        self.at(step, f"{name} {-sign * loss:.3f}{' nats' if unit else ''} {arrow} {change:+.2f}/1k · {note}")

    def at(self, done: int, words: str) -> None:
        """Show how many steps are done, and what is being done."""
        self.done, self.words = done, words
        bars = _OPEN if self in _OPEN else [*_OPEN, self]
        bars[0]._draw(" · ".join(bar.words if bar is bars[0] else f"{bar.words} {bar.done}/{bar.total}" for bar in bars))

    def _draw(self, words: str) -> None:
        if not self.show or (self._bar is None and time.perf_counter() - self._start < self.quiet):
            return
        if self._bar is None:
            self._open()
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, words=words)

    def __enter__(self) -> Progress:
        self.brief = True
        _OPEN.append(self)
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

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
        console = Console(stderr=True)
        if self.brief and not console.is_terminal:
            self.show = False
            return
        self._bar = Rich(*columns, console=console, transient=self.brief)
        self._task = self._bar.add_task("fit", total=self.total, words="")
        self._bar.start()
        if self not in _OPEN:
            _OPEN.insert(0, self)

    def close(self) -> None:
        """Leave the last line standing."""
        if self._bar is not None:
            self._bar.stop()
        if self in _OPEN:
            _OPEN.remove(self)
