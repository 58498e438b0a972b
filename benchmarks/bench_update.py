"""Update a decoder layer's weights in memory: portllm against addmm_, PEFT's merge, and the in-place pass.

    python benchmarks/bench_update.py --json benchmarks/results/update.json
    pytest benchmarks/bench_update.py                # the same calls under pytest-benchmark, for comparing commits

The unit is the seven linear weights of one decoder layer (several layers, if one fits into the last-level cache) in
bf16 with fp32 factors, which is how PEFT loads an adapter. All ways run in one process, in turn, round after round;
figures are medians. The limit is the fastest pass that reads and writes every weight once, in place.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from portllm import ops

# (out, in) of q, k, v, o, gate, up, down.
LAYERS = {
    "Mistral-7B": [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336)],
    "Llama-3.1-8B": [
        (4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336),
    ],
    "Gemma2-9B": [(4096, 3584), (2048, 3584), (2048, 3584), (3584, 4096), (14336, 3584), (14336, 3584), (3584, 14336)],
}  # fmt: skip
RANKS = (8, 16, 64, 256)
WAYS = ("limit", "portllm", "addmm_", "peft")


class Case:
    """The weights of some layers with factors, and the ways to update them; each call is one whole pass."""

    def __init__(self, shapes: list[tuple[int, int]], rank: int, dtype: torch.dtype = torch.bfloat16) -> None:
        self.weights = [torch.empty(shape, dtype=dtype).normal_(0, 0.02) for shape in shapes]
        self.lora_A = [torch.randn(rank, shape[1]) / shape[1] ** 0.5 for shape in shapes]
        self.lora_B = [torch.randn(shape[0], rank) * 1e-4 for shape in shapes]
        self.scaling = 2.0
        self.bytes = sum(2 * w.nbytes for w in self.weights)
        self._narrow = [(a.to(dtype), b.to(dtype)) for a, b in zip(self.lora_A, self.lora_B, strict=True)]
        self._peft: list[Any] = []

    def limit(self) -> None:
        """Read and write each weight once; an integer op, so that nothing but the memory is timed."""
        for weight in self.weights:
            weight.view(torch.int16 if weight.element_size() == 2 else torch.int32).bitwise_not_()

    def portllm(self) -> None:
        n = len(self.weights)
        ops.lowrank_add_(self.weights, self.lora_A, self.lora_B, [self.scaling] * n, [1] * n)

    def addmm_(self) -> None:
        """The best call in torch; it takes factors of the weight's dtype only, so they lose their last bits."""
        for weight, (a, b) in zip(self.weights, self._narrow, strict=True):
            weight.addmm_(b, a, alpha=self.scaling)

    def peft(self) -> None:
        """PEFT's own merge of each layer, through PEFT."""
        for layer in self._peft or self._wrap():
            layer.merge()
            layer.merged_adapters.clear()

    def _wrap(self) -> list[Any]:
        from peft import LoraConfig
        from peft.tuners.lora import Linear

        for weight, a, b in zip(self.weights, self.lora_A, self.lora_B, strict=True):
            base = nn.Linear(1, 1, bias=False, dtype=weight.dtype)
            base.weight = nn.Parameter(weight, requires_grad=False)
            base.out_features, base.in_features = weight.shape
            rank = a.shape[0]
            layer = Linear(base, "default", config=LoraConfig(r=rank), r=rank, lora_alpha=int(self.scaling * rank))
            layer.lora_A["default"].weight = nn.Parameter(a, requires_grad=False)
            layer.lora_B["default"].weight = nn.Parameter(b, requires_grad=False)
            self._peft.append(layer)
        return self._peft


def case(family: str, rank: int) -> Case:
    """Enough layers of a family to be several times the last-level cache."""
    shapes = LAYERS[family]
    size = sum(2 * m * n for m, n in shapes)
    return Case(shapes * max(1, -(-4 * last_level_cache() // size)), rank)


def last_level_cache() -> int:
    """Bytes in the last-level cache of the first CPU; 32 MiB if the system does not say."""
    sizes = [0]
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = index.read_text().strip()
        sizes.append(int(text[:-1]) * {"K": 1 << 10, "M": 1 << 20}[text[-1]])
    return max(sizes) or 32 << 20


def measure(case: Case, rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of each way: median, 20th and 80th percentile over the rounds, after one warm-up round."""
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(rounds + 1):
        for way in WAYS:
            call: Callable[[], None] = getattr(case, way)
            started = time.perf_counter()
            call()
            if number:
                times[way].append(time.perf_counter() - started)
    return {way: _summary(samples) for way, samples in times.items()}


def _summary(samples: list[float]) -> dict[str, float]:
    ordered = sorted(samples)
    last = len(ordered) - 1
    return {
        "seconds": statistics.median(ordered),
        "p20": ordered[round(0.2 * last)],
        "p80": ordered[round(0.8 * last)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="*", default=list(LAYERS), choices=list(LAYERS))
    parser.add_argument("--ranks", nargs="*", type=int, default=list(RANKS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    import machine

    results: list[dict[str, Any]] = []
    print(f"{'layer':14}{'rank':>5}  {'way':9}{'ms':>9}{'GB/s':>8}{'x peft':>8}{'x addmm_':>10}{'% limit':>9}")
    for family in arguments.families:
        for rank in arguments.ranks:
            made = case(family, rank)
            ways = measure(made, arguments.rounds)
            results.append({"family": family, "rank": rank, "bytes": made.bytes, "ways": ways})
            for way, r in ways.items():
                seconds = r["seconds"]
                print(
                    f"{family:14}{rank:5}  {way:9}{seconds * 1e3:9.1f}{made.bytes / seconds / 1e9:8.1f}"
                    f"{ways['peft']['seconds'] / seconds:8.1f}{ways['addmm_']['seconds'] / seconds:10.2f}"
                    f"{100 * ways['limit']['seconds'] / seconds:9.0f}",
                    flush=True,
                )
    if arguments.json:
        report = {"benchmark": "update", "machine": machine.describe(), "cases": results}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def pytest_generate_tests(metafunc: Any) -> None:
    metafunc.parametrize("way", WAYS)
    metafunc.parametrize("rank", RANKS[:3])


def test_update(benchmark: Any, rank: int, way: str) -> None:
    """One Mistral-7B layer under pytest-benchmark; grouped by rank."""
    benchmark.group = f"Mistral-7B, rank {rank}"
    benchmark.pedantic(
        getattr(case("Mistral-7B", rank), way), rounds=int(os.environ.get("ROUNDS", "5")), warmup_rounds=1
    )


if __name__ == "__main__":
    main()
