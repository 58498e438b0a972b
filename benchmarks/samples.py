"""What is made of measurements: of times, and of this process's memory."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile."""
    ordered = sorted(seconds)
    last = len(ordered) - 1
    return {
        "seconds": statistics.median(ordered),
        "p20": ordered[round(0.2 * last)],
        "p80": ordered[round(0.8 * last)],
    }


def resident(key: str) -> int:
    """KiB of memory that this process holds (VmRSS), or has held at most (VmHWM); OSError where it is not told."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key + ":"))
