"""How much memory a job takes: of this process and of all that it started."""

from __future__ import annotations

import contextlib
import math
import re
import threading
from pathlib import Path
from typing import Any, Self

from phaseline.runtime.errors import MissingExtraError, UsageError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_INTERVAL_S = 0.25


def parse_bytes(text: str) -> int:
    """A size such as ``4GiB``, ``900MB`` or ``2e9`` in bytes.

    Raises
    ------
    UsageError
        It is none.
    """
    match = re.fullmatch(r"\s*((?:\d+\.?\d*|\.\d+)(?:[eE]\d+)?)\s*([kKmMgGtT]?[iI]?)[bB]?\s*", text, re.ASCII)
    if match is None or match[2].upper() not in _UNITS or not 0 < float(match[1]) < math.inf:
        raise UsageError(f"the size is {text!r}, expected a number of bytes such as 4GiB, 900MB or 2e9")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def format_bytes(count: float) -> str:
    """Bytes for people: ``1.5 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def available_bytes() -> int:
    """Memory that could be had now, within the limit of this process's control group."""
    free = int(_psutil().virtual_memory().available)
    for limit, used in (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")):
        with contextlib.suppress(OSError, ValueError):  # no such control group, or "max": no limit
            root = Path("/sys/fs/cgroup")
            free = min(free, int((root / limit).read_text()) - int((root / used).read_text()))
    return free


def resident_bytes() -> int:
    """Resident memory of this process and of all that it started, shared pages counted in each."""
    psutil = _psutil()
    here = psutil.Process()
    total = int(here.memory_info().rss)
    for child in here.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            total += int(child.memory_info().rss)
    return total


class MemoryWatch:
    """Keeps the peak of `resident_bytes` while it is entered."""

    def __init__(self) -> None:
        self.peak = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self.peak = resident_bytes()
        self._thread = threading.Thread(target=self._watch, name="memory-watch", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(_INTERVAL_S):
            self.peak = max(self.peak, resident_bytes())


def _psutil() -> Any:
    try:
        import psutil
    except ModuleNotFoundError as error:
        raise MissingExtraError("psutil", "volumes", "a job over a volume") from error
    return psutil
