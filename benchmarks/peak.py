"""How many multiply-adds this machine does in a second, all threads at once, with nothing to load or store.

    python benchmarks/peak.py

The instruction is the one that the kernel's variant multiplies with; peak.cpp has a chain of each.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch

from portllm import _native

# By the kernel's variant: the chain, and its multiply-adds in one instruction.
INSTRUCTIONS = {"avx2": ("fma_256", 8), "avx512": ("fma_512", 16), "avx512_bf16": ("fma_512", 16)}
PAIRS = {"avx512_bf16": ("dot_bf16", 32)}  # where both factors are bf16
SAMPLES, SECONDS = 15, 0.02


def rate(bf16_factors: bool) -> dict[str, Any]:
    """``instruction`` that the update of such factors uses, and ``multiply_adds_per_second``.

    Where that is not measured, the latter is None, and ``instruction`` says why.
    """
    isa = _native.isa() or "none"
    found = (PAIRS.get(isa) if bf16_factors else None) or INSTRUCTIONS.get(isa)
    library = _library() if found else f"peak.cpp has no chain for the variant {isa}"
    if found is None or isinstance(library, str):
        return {"instruction": library, "multiply_adds_per_second": None}
    name, lanes = found
    chain = getattr(library, name)
    chain.argtypes = [ctypes.c_int64]
    rounds, per_round = 1 << 16, lanes * library.chains()
    while (seconds := _seconds(chain, rounds)) < SECONDS:
        rounds = int(rounds * max(2, SECONDS / seconds))
    median = statistics.median(_seconds(chain, rounds) for _ in range(SAMPLES))
    per_second = rounds * per_round * torch.get_num_threads() / median
    return {"instruction": name, "multiply_adds_per_second": per_second}


def _seconds(chain: ctypes._FuncPointer, rounds: int) -> float:
    """From the first thread's start to the last one's end; a call through ctypes holds no lock of Python's."""
    count = torch.get_num_threads()
    barrier, spans = threading.Barrier(count), []

    def work() -> None:
        barrier.wait()
        started = time.perf_counter()
        chain(rounds)
        spans.append((started, time.perf_counter()))

    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return max(end for _, end in spans) - min(start for start, _ in spans)


@cache
def _library() -> ctypes.CDLL | str:
    """peak.cpp, compiled; or why not."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return "there is no C++ compiler"
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "peak.so")
        source = Path(__file__).with_name("peak.cpp")
        done = subprocess.run(
            [compiler, "-O2", "-shared", "-fPIC", source, "-o", target], capture_output=True, text=True
        )
        if done.returncode:
            return f"{compiler} failed: {(done.stderr.splitlines() or ['no message'])[0]}"
        return ctypes.CDLL(str(target))


if __name__ == "__main__":
    for bf16_factors in (False, True):
        print(torch.get_num_threads(), "threads:", rate(bf16_factors))
