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
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from portllm import _native

# By the kernel's variant: the chain, and its multiply-adds in one instruction.
INSTRUCTIONS = {"avx2": ("fma_256", 8), "avx512": ("fma_512", 16), "avx512_bf16": ("fma_512", 16)}
PAIRS = {"avx512_bf16": ("dot_bf16", 32)}  # where both factors are bf16
SECONDS = 0.1


def probe(bf16_factors: bool) -> tuple[str, Callable[[], float] | None]:
    """The instruction that the update of such factors uses, and what measures its multiply-adds a second, once.

    Where that cannot be measured there is no such call, and the text says why.
    """
    isa = _native.isa() or "none"
    found = (PAIRS.get(isa) if bf16_factors else None) or INSTRUCTIONS.get(isa)
    library = _library() if found else f"peak.cpp has no chain for the variant {isa}"
    if found is None or isinstance(library, str):
        return str(library), None
    name, lanes = found
    chain = getattr(library, name)
    chain.argtypes = [ctypes.c_int64]
    rounds, per_round = 1 << 16, lanes * library.chains() * torch.get_num_threads()
    while (seconds := _seconds(chain, rounds)) < SECONDS:
        rounds = int(rounds * max(2, SECONDS / seconds))
    return name, lambda: rounds * per_round / _seconds(chain, rounds)


def _seconds(chain: ctypes._FuncPointer, rounds: int) -> float:
    """From the first thread's start to the last one's end; a call through ctypes holds no lock of Python's."""
    time.sleep(0.05)  # threads of torch spin for a while when their work is done
    count = torch.get_num_threads()
    barrier, spans = threading.Barrier(count), []

    def work(cpu: int | None) -> None:
        if cpu is not None:  # two threads sometimes start on one core, and stay there for a while
            os.sched_setaffinity(0, {cpu})
        barrier.wait()
        started = time.perf_counter()
        chain(rounds)
        spans.append((started, time.perf_counter()))

    cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    places = cpus[:count] if count <= len(cpus) else [None] * count
    threads = [threading.Thread(target=work, args=(cpu,)) for cpu in places]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return max(end for _, end in spans) - min(start for start, _ in spans)


@cache
def _library() -> ctypes.CDLL | str:
    """peak.cpp, compiled; or why not."""
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "c++", "g++", "clang++"))), None)
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
        instruction, measure = probe(bf16_factors)
        rate = statistics.median(measure() for _ in range(15)) / 1e9 if measure else None
        print(f"{instruction}: {rate and round(rate, 1)} G multiply-adds a second, {torch.get_num_threads()} threads")
