"""What each way of porting a patch costs: ``measure.py MODEL PATCH OUT RUNS`` prints JSON.

This process only imports the libraries; for each way it forks a fresh one, so that neither the imports nor
what another way has touched counts. Given are medians over the runs, after one that only loads what code is
loaded late: the time, and by how much the memory's peak exceeds what was there before the run.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import multiprocessing
import resource
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from toy import load_model, quieten

from portllm import Patch, apply, apply_checkpoint

Run = Callable[[], Any]


def portllm_live(model_path: Path, patch_path: Path, out: Path) -> Run:
    model = load_model(model_path)
    return lambda: apply(model, Patch.load(patch_path))


def peft_live(model_path: Path, patch_path: Path, out: Path) -> Run:
    model = load_model(model_path)
    return lambda: PeftModel.from_pretrained(model, patch_path).merge_and_unload()


def portllm_disk(model_path: Path, patch_path: Path, out: Path) -> Run:
    return lambda: apply_checkpoint(model_path, Patch.load(patch_path), out)


def peft_disk(model_path: Path, patch_path: Path, out: Path) -> Run:
    def run() -> None:
        model = PeftModel.from_pretrained(load_model(model_path), patch_path).merge_and_unload()
        model.save_pretrained(out)

    return run


WAYS = {
    "portllm, live": portllm_live,
    "PEFT, live": peft_live,
    "portllm, on disk": portllm_disk,
    "PEFT, on disk": peft_disk,
}


def memory_now() -> int:
    """Resident bytes; where there is no /proc, the most so far."""
    return _status("VmRSS") or _most()


def memory_peak() -> int:
    """The most resident bytes since ``forget_peak``.

    Not ``ru_maxrss`` where it can be avoided: it cannot be reset, and across fork and exec it starts at the
    parent's peak, which here is that of the training.
    """
    return _status("VmHWM") or _most()


def forget_peak() -> None:
    # Not Linux, or not allowed: the peak then includes what the imports reached.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def give_back_freed() -> None:
    """Return freed memory to the system; a run that could reuse it would look free of charge."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc alone has it
        ctypes.CDLL(None).malloc_trim(0)


def measure(way: str, model: Path, patch: Path, out: Path, runs: int) -> dict[str, float]:
    quieten()
    torch.set_num_threads(1)
    seconds, extra = [], []
    for _ in range(runs + 1):
        run = WAYS[way](model, patch, out)
        give_back_freed()
        forget_peak()
        before, start = memory_now(), time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
        extra.append(max(0, memory_peak() - before))
        shutil.rmtree(out, ignore_errors=True)
    return {"seconds": statistics.median(seconds[1:]), "extra_bytes": statistics.median(extra[1:])}


def measure_all(model: Path, patch: Path, out: Path, runs: int) -> dict[str, dict[str, float]]:
    # Forking is quick, and safe as long as this process has started no threads; other systems start afresh.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    results = {}
    for way in WAYS:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            results[way] = pool.submit(measure, way, model, patch, out, runs).result()
    return results


def _status(key: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), 0)


def _most() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    model_path, patch_path, out_path, count = sys.argv[1:]
    print(json.dumps(measure_all(Path(model_path), Path(patch_path), Path(out_path), int(count))))
