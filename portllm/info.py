"""What is installed here, and which backends can be used."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Any

import torch

from . import _native, ops
from ._version import __version__


def gather() -> dict[str, Any]:
    """Versions, backends (None: ready; else why not), and the backend that "auto" takes on each device."""
    versions: dict[str, str | None] = {"portllm": __version__, "python": platform.python_version()}
    versions["torch"] = torch.__version__
    for name in ("triton", "numpy", "safetensors", "transformers", "peft"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    chosen = {}
    for device in devices:
        name = "cpu" if device.type == "cpu" else f"{device} ({torch.cuda.get_device_name(device)})"
        chosen[name] = ops.backend_for(torch.empty(1, 1, dtype=torch.bfloat16, device=device))
    return {
        "versions": versions,
        "backends": {name: ops.unavailable(name) for name in ops.BACKENDS},
        "chosen": chosen,
        "cpu_isa": _native.isa(),
        "threads": torch.get_num_threads(),
    }
