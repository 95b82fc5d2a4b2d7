"""Freed memory that stays with the process while a fit needs as much again in its next step.

The C library gives the top of its heap back to the system as soon as more than a threshold of it is free, at first 128 KiB, and
later twice the largest block. A step frees its activations and gradients; in the next one the system hands the same pages out
anew, zeroed, one fault each: 500 to 1900 faults a step in a denoiser of 2.5 million parameters and a small U-Net, 5 to 30 % of
the time. Preloading another allocator is the usual cure; here the threshold is lifted for the length of a fit.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch

__all__ = ["heap_kept"]

_TRIM, _MAPPED = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
_NEVER, _ADAPTED, _LARGEST = 2**31 - 1, 64 * 2**20, 32 * 2**20
"""No trimming; how far the library moves both thresholds by itself, at most."""


LONG = 1.0
"""Seconds of a fit after which its memory is given back at once: to look for it takes tens of milliseconds in a torn heap."""
_OWN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")


@lru_cache(1)
def _library() -> Any:
    """The C library, if it is one that has these thresholds and nobody has set them for this process."""
    if not sys.platform.startswith("linux") or any(os.environ.get(name) for name in _OWN):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") and hasattr(library, "mallopt") else None


class _Inside:
    """How many fits are under way in this process, of which the last one gives memory back."""

    lock = threading.Lock()
    fits = 0


@contextmanager
def heap_kept(device: torch.device) -> Iterator[None]:
    """Keep freed memory inside, and give it back at the end, at once where it took long; nothing on a GPU or without glibc.

    Afterwards both thresholds stand where the library itself moves them at most (they cannot be read). Those set by the
    environment, ``MALLOC_TRIM_THRESHOLD_`` or ``MALLOC_MMAP_THRESHOLD_``, are left alone.
    """
    library = _library() if device.type == "cpu" else None
    if library is None:
        yield
        return
    begun = time.monotonic()
    with _Inside.lock:
        _Inside.fits += 1
        library.mallopt(_MAPPED, _LARGEST)
        library.mallopt(_TRIM, _NEVER)
    try:
        yield
    finally:
        with _Inside.lock:
            _Inside.fits -= 1
            if not _Inside.fits:
                library.mallopt(_TRIM, _ADAPTED)
        if not _Inside.fits and time.monotonic() - begun > LONG:
            library.malloc_trim(0)
