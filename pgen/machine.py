"""What the processor is good at."""

from __future__ import annotations

import functools
import platform
from pathlib import Path

__all__ = ["cpu_info", "prefers_onednn"]


@functools.cache
def cpu_info() -> str:
    """What Linux says of the first processor: maker, family, model."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(errors="ignore")[:20_000].splitlines() if info.exists() else [platform.processor()]
    names = ("vendor_id", "cpu family", "model", "model name", "stepping")
    first = {line.split(":")[0].strip(): line for line in reversed(lines)}
    return " ".join(first.get(name, "") for name in names) or lines[0]


def prefers_onednn() -> bool:
    """Whether this machine's MKL takes its slow path: an AMD processor."""
    return "AuthenticAMD" in cpu_info()
