"""What a figure was measured on."""

from __future__ import annotations

import platform
import re
from datetime import date
from importlib import metadata
from typing import Any

import torch

from portllm import info


def describe() -> dict[str, Any]:
    """CPU, memory, GPUs, threads and versions, for the head of a results file."""
    facts = info.gather()
    return {
        "date": date.today().isoformat(),
        "cpu": _line("/proc/cpuinfo", "model name") or platform.processor(),
        "cores": torch.get_num_threads(),
        "memory_kib": _line("/proc/meminfo", "MemTotal"),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "isa": facts["cpu_isa"],
        "backends": {name: reason or "ready" for name, reason in facts["backends"].items()},
        "versions": facts["versions"] | {"accelerate": _version("accelerate")},
    }


def label() -> str:
    """A short name for results files, such as epyc-2c: the CPU's name without maker and trade marks, and cores."""
    cpu = (_line("/proc/cpuinfo", "model name") or platform.processor() or "cpu").split("@")[0].lower()
    words = re.findall(r"[a-z0-9]+", re.sub(r"\((r|tm)\)|amd|intel|\d+-core|processor|cpu$", " ", cpu))
    return "-".join([*(words or ["cpu"]), f"{torch.get_num_threads()}c"])


def _line(path: str, key: str) -> str | None:
    try:
        with open(path, encoding="utf-8") as file:
            return next((line.split(":", 1)[1].strip() for line in file if line.startswith(key)), None)
    except OSError:
        return None


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
