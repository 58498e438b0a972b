"""Extract a patch: portllm's factors of one difference against torch's, and a whole pair of checkpoints on disk.

    python benchmarks/bench_extract.py --size-gb 4 --json benchmarks/results/extract.json

One difference (4096 x 4096, rank 16) goes through the full ``torch.linalg.svd`` (what mergekit's extraction calls),
``torch.svd_lowrank(niter=2)`` with as many columns as the rank and with half as many again, and ``portllm.svd``, in
turn in one process; figures are medians after a warm-up, and the error left by each. The pair is a made checkpoint and
the same with an adapter merged in; it is read in a fresh process, from the page cache.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench_checkpoint
import machine
import torch
from samples import resident

from portllm.svd import Workspace, leading

Way = Callable[[torch.Tensor, int], torch.Tensor]  # the leading singular values


def full(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    return torch.linalg.svd(matrix, full_matrices=False)[1][:rank].double()


def lowrank(columns: float) -> Way:
    return lambda matrix, rank: torch.svd_lowrank(matrix, q=int(columns * rank), niter=2)[1][:rank].double()


WORKSPACE = Workspace()  # as an extraction has one for all of its weights
WAYS: dict[str, Way] = {
    "svd": full,
    "svd_lowrank q=r": lowrank(1),
    "svd_lowrank q=1.5r": lowrank(1.5),
    "portllm": lambda matrix, rank: leading(matrix, rank, workspace=WORKSPACE).values,
}


def differences(size: int) -> dict[str, torch.Tensor]:
    """Three kinds of spectrum: flat, decaying as a power, and a rank of 32 in noise."""
    ranks = torch.arange(1, 513)
    left, right = (torch.linalg.qr(torch.randn(size, len(ranks)))[0] for _ in range(2))
    low = torch.randn(size, 32) @ torch.randn(32, size) / 8
    return {
        "noise": torch.randn(size, size),
        "decaying": left * ranks**-0.7 @ right.T,
        "low rank and noise": low + torch.randn(size, size),
    }


def measure_matrices(size: int, rank: int, rounds: int) -> list[dict[str, Any]]:
    results = []
    for kind, matrix in differences(size).items():
        norm2 = float(matrix.double().square().sum())
        times: dict[str, list[float]] = {way: [] for way in WAYS}
        errors: dict[str, float] = {}
        for number in range(rounds + 1):
            for way, call in WAYS.items():
                if way == "svd" and number > 1:  # many seconds each
                    continue
                started = time.perf_counter()
                values = call(matrix, rank)
                if number:
                    times[way].append(time.perf_counter() - started)
                errors[way] = (1 - float(values.square().sum()) / norm2) ** 0.5
        for way, samples in times.items():
            seconds = statistics.median(samples)
            results.append({"kind": kind, "way": way, "seconds": seconds, "min": min(samples), "error": errors[way]})
    return results


def measure_checkpoints(folder: Path, size_gb: float, rank: int) -> dict[str, float]:
    import portllm

    base, adapter, tuned = folder / "base", folder / "adapter", folder / "tuned"
    size = bench_checkpoint.make_checkpoint(base, size_gb, 8)
    bench_checkpoint.make_adapter(adapter, base, rank)
    portllm.apply_checkpoint(base, adapter, tuned)
    command = [sys.executable, __file__, "--worker", str(base), str(tuned), "--rank", str(rank)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return {"bytes": size, **json.loads(done.stdout.splitlines()[-1])}


def worker(base: Path, tuned: Path, rank: int) -> dict[str, float]:
    import portllm

    held = resident("VmRSS")
    started = time.perf_counter()
    result = portllm.extract(base, tuned, rank=rank, stamp=False)
    seconds = time.perf_counter() - started
    extra = (resident("VmHWM") - held) / 1024
    errors = [w.relative_error for w in result.weights]
    return {
        "seconds": seconds,
        "extra_mib": extra,
        "patch_mib": result.patch.num_parameters / 2**18,
        "error": max(errors),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--size-gb", type=float, default=4.0, help="of each checkpoint; 0 leaves them out")
    parser.add_argument("--dir", type=Path, default=None, help="where to make the checkpoints")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--worker", nargs=2, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(worker(*arguments.worker, arguments.rank)))
        return
    results: dict[str, Any] = {"benchmark": "extract", "machine": machine.describe()}
    matrices = measure_matrices(arguments.size, arguments.rank, arguments.rounds)
    results["matrices"] = {"size": arguments.size, "rank": arguments.rank, "cases": matrices}
    ours = {r["kind"]: r for r in matrices if r["way"] == "portllm"}
    print(f"{'difference':20}{'way':20}{'ms':>9}{'error':>10}{'portllm is':>14}{'and its error':>16}")
    for r in matrices:
        r["portllm_faster"] = r["seconds"] / ours[r["kind"]]["seconds"]
        r["portllm_error"] = ours[r["kind"]]["error"] / r["error"]
        faster, error = f"{r['portllm_faster']:.2f} x", f"{(r['portllm_error'] - 1) * 100:+.2f} %"
        print(f"{r['kind']:20}{r['way']:20}{r['seconds'] * 1e3:9.1f}{r['error']:10.5f}{faster:>14}{error:>16}")
    if arguments.size_gb:
        with tempfile.TemporaryDirectory(dir=arguments.dir, prefix="portllm-bench-") as folder:
            pair = results["checkpoints"] = measure_checkpoints(Path(folder), arguments.size_gb, arguments.rank)
        print(
            f"two checkpoints of {pair['bytes'] / 1e9:.2f} GB: {pair['seconds']:.1f} s, "
            f"{pair['extra_mib']:.0f} MiB extra (the patch is {pair['patch_mib']:.0f})"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
