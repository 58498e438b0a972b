"""Finds and loads the compiled libraries, which only add implementations to ops defined in ``portllm.ops``."""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path

import torch

# setup.py builds them under these names.
LIBRARY = Path(__file__).with_name("libportllm.so")
CUDA_LIBRARY = Path(__file__).with_name("libportllm_cuda.so")


@cache
def load() -> str | None:
    """Load the native library, once in a process.

    Returns:
        None if its ops can be called, else one line that says why they cannot.
    """
    reason = _load(
        LIBRARY,
        "native library",
        "it needs a C++20 compiler and torch >= 2.10 (`pip install -v --no-build-isolation` says what went wrong)",
    )
    if reason is None and _chosen_isa() is None:
        return f"PORTLLM_CPU_ISA={os.environ.get('PORTLLM_CPU_ISA')} is unknown, or this CPU lacks it"
    return reason


@cache
def load_cuda() -> str | None:
    """Load the library of the CUDA kernel, as ``load`` does; only where torch sees a GPU."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    reason = _load(CUDA_LIBRARY, "library for CUDA", "it needs nvcc (`pip install -v --no-build-isolation` says more)")
    return _ask(CUDA_LIBRARY, "portllm_cuda_problem") if reason is None else reason


def _load(library: Path, name: str, needs: str) -> str | None:
    if os.environ.get("PORTLLM_DISABLE_NATIVE", "0") not in ("", "0"):
        return "disabled by PORTLLM_DISABLE_NATIVE"
    if not library.exists():
        return f"the {name} was not built: {needs}"
    try:
        torch.ops.load_library(str(library))
    except (OSError, RuntimeError) as error:
        return f"the {name} does not load: {str(error).splitlines()[0]}"
    return None


def _ask(library: Path, function: str) -> str | None:
    """What a function of a library that takes nothing and returns a string, or null, says."""
    ask = getattr(ctypes.CDLL(str(library)), function)
    ask.restype = ctypes.c_char_p
    answer: bytes | None = ask()
    return answer.decode() if answer else None


def isa() -> str | None:
    """The instruction set that the CPU kernel uses in this process.

    The fastest one of the CPU; the environment variable PORTLLM_CPU_ISA chooses another one at start. All but
    "amx_bf16" give the same bits; that one sums in another order, as precisely, and counts products below 2^-126
    as zero.

    Returns:
        "amx_bf16", "avx512_bf16", "avx512", "avx2" or "portable"; None if the library is not loaded.
    """
    return _chosen_isa() if load() is None else None


def _chosen_isa() -> str | None:
    return _ask(LIBRARY, "portllm_cpu_isa")
