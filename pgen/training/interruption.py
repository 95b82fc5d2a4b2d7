r"""Ctrl-C and SIGTERM during a fit: the step at hand ends whole, the run is saved, and only then does the signal act."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["Interruption", "Stop"]

_NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
ECHO_SECONDS = 0.25
"""Terminals and launchers may deliver one request twice; a signal so soon after the first is taken for its echo."""


class Stop(BaseException):
    """Leaves work that a signal has made pointless; never leaves ``fit``."""


class Interruption:
    """Notes the first signal, for the loop to look at between calls; a second one ends the process at once.

    Of several processes that train one model none acts on a signal by itself: what one has ``noted`` is ``received`` by all
    when they agree to ``take`` it.

    Args:
        alone: Whether this process acts by itself.

    Signals that the host program ignores stay ignored, and outside the main thread nothing is touched: signals are the main
    thread's business.
    """

    def __init__(self, alone: bool = True) -> None:
        self.noted: int | None = None
        self.received: int | None = None
        self._alone = alone
        self._at = 0.0
        self._cutting = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in _NAMES:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *args: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        if self.noted is not None:
            if time.monotonic() - self._at > ECHO_SECONDS:
                _end(number)
            return
        self.noted, self._at = number, time.monotonic()
        if self._alone:
            self.received = number
            if self._cutting:
                raise Stop

    def take(self, number: int) -> None:
        """Receive what some process noted; 0 for nothing."""
        if number and self.received is None:
            self.received, self._at = number, time.monotonic()
            self.noted = number

    @property
    def name(self) -> str:
        """What came, in words; nothing if nothing came."""
        return "" if self.received is None else _NAMES[signal.Signals(self.received)]

    def check(self) -> None:
        """Raise ``Stop`` if a signal came: called where stopping leaves nothing half done."""
        if self.received is not None:
            raise Stop

    @contextmanager
    def cutting(self) -> Iterator[None]:
        """Inside, a signal raises ``Stop`` wherever it comes: for long work that may be thrown away at any point."""
        self.check()
        self._cutting = True
        try:
            yield
        finally:
            self._cutting = False

    def deliver(self, words: str) -> None:
        """Let the signal act as it would have without a fit; called once everything is saved and handlers are restored.

        Ctrl-C raises ``KeyboardInterrupt``. SIGTERM raises ``SystemExit(143)``, so that the program's own clean-up runs; a
        handler of the program's own is called instead, and if that returns, so does the fit.
        """
        if self.received is None:
            return
        before = self._before.get(self.received)
        if before is None:  # not the main thread's fit
            return
        if before is signal.default_int_handler:
            raise KeyboardInterrupt(words)
        if before is signal.SIG_DFL:
            raise SystemExit(128 + self.received)
        signal.raise_signal(self.received)


def _end(number: int) -> None:
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
