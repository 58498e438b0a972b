"""Finds and loads the compiled library, which only adds implementations to ops defined in ``portllm.ops``."""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path

import torch

LIBRARY = Path(__file__).with_name("libportllm.so")  # setup.py builds it under this name


@cache
def load() -> str | None:
    """Load the native library, once in a process.

    Returns:
        None if its ops can be called, else one line that says why they cannot.
    """
    if os.environ.get("PORTLLM_DISABLE_NATIVE", "0") not in ("", "0"):
        return "disabled by PORTLLM_DISABLE_NATIVE"
    if not LIBRARY.exists():
        return (
            "the native library was not built: it needs a C++20 compiler and torch >= 2.10 "
            "(`pip install -v --no-build-isolation` says what went wrong)"
        )
    try:
        torch.ops.load_library(str(LIBRARY))
    except (OSError, RuntimeError) as error:
        return f"the native library does not load: {str(error).splitlines()[0]}"
    return None


def isa() -> str | None:
    """The instruction set that the CPU kernel runs with in this process.

    Chosen from the CPU at the first call of the kernel; PORTLLM_CPU_ISA forces a lower one.

    Returns:
        "avx512", "avx2" or "portable"; None if the library is not loaded.
    """
    if load() is not None:
        return None
    name = ctypes.CDLL(str(LIBRARY)).portllm_cpu_isa
    name.restype = ctypes.c_char_p
    value: bytes = name()
    return value.decode()
