"""Update quantised weights in memory: portllm against dequantise, add, requantise in torch, and the in-place pass.

    python benchmarks/bench_quantised.py --json benchmarks/results/quantised.json
    python benchmarks/bench_quantised.py --cases fp8-128x128 --rounding nearest

One Mistral-7B layer's seven linear weights, N(0, 0.02^2), quantised by the scheme's own rule, and one patch of
``--rank`` for each, of ``--delta`` of its weight in the Frobenius norm. Ways:
    limit    the fastest pass that reads and writes every byte of the codes once, in place
    add      portllm's update of a bf16 weight of the same shape: the same arithmetic, and no codes
    portllm  decode, add, choose scales, encode, in one pass
    torch    the whole weight in fp32, addmm_, fresh scales for all blocks, the whole weight encoded
    bnb      PEFT's merge of its bitsandbytes layer, for nf4 and int8, where bitsandbytes is installed and runs

All ways run in one process, in turn, round after round; figures are medians. Extra memory is how far the process grows
during a call: its high-water mark less what it held.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine
import torch
from bench_update import extra_mib
from cases import LAYERS, SCALING
from samples import summary
from torch import Tensor

from portllm import ops, quant, requantise

FP32 = torch.float32
# Name: scheme, block (0: all), dtype of the scales.
CASES = {
    "fp8-128x128": ("fp8_e4m3", (128, 128), FP32),
    "fp8-1x128": ("fp8_e4m3", (1, 128), FP32),
    "fp8-rows": ("fp8_e4m3", (1, 0), FP32),
    "fp8-tensor": ("fp8_e4m3", (0, 0), FP32),
    "int8-rows": ("int8", (1, 0), FP32),
    "nf4": ("nf4", (1, 64), FP32),
    "mxfp4": ("mxfp4", (1, 32), quant.E8M0),
    "nvfp4": ("nvfp4", (1, 16), quant.E4M3),
}
GLOBAL_SCALE = 2.0**-14  # nvfp4: brings the scales into e4m3's range


class Weight:
    """One quantised weight with its patch, and the ways to update it."""

    def __init__(self, case: str, shape: tuple[int, int], rank: int, delta: float, modes: list[int]) -> None:
        self.scheme, block, self.scale_dtype = CASES[case]
        self.kind, self.shape, self.modes = quant.SCHEMES[self.scheme], shape, modes
        self.block = block[0] or shape[0], block[1] or shape[1]
        self.a, self.b = torch.randn(rank, shape[1]), torch.randn(shape[0], rank)
        self.b *= delta * 0.02 / (SCALING * rank**0.5)
        self.global_scale = GLOBAL_SCALE if case == "nvfp4" else 1.0
        self.codes, self.scales = self.encoded(torch.empty(shape).normal_(0, 0.02))

    def encoded(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and scales of a whole weight in fp32, which is overwritten; in plain torch."""
        blocks = self.blocks(weight)
        scales = blocks.abs().amax((1, 3)) / self.kind.largest
        if self.scale_dtype == quant.E8M0:
            scales = scales.log2().ceil().exp2().to(quant.E8M0)
        elif self.scale_dtype == quant.E4M3:
            scales = (scales / self.global_scale).clamp(max=quant.E4M3_LARGEST).to(quant.E4M3)
        blocks /= self.units(scales)
        codes = self.kind.encode(weight, None)
        if self.kind.packing == "one":
            return codes.view(self.kind.codes), scales
        first, second = codes.view(-1, 2).unbind(1)
        high, low = (first, second) if self.kind.packing == "high" else (second, first)
        return high << 4 | low, scales

    def blocks(self, weight: Tensor) -> Tensor:
        """[blocks down, rows, blocks across, columns], for shapes that blocks divide; a view."""
        m, n = self.shape
        return weight.view(m // self.block[0], self.block[0], n // self.block[1], self.block[1])

    def units(self, scales: Tensor) -> Tensor:
        wide = scales.float() * self.global_scale
        return wide.view(self.shape[0] // self.block[0], 1, -1, 1)

    def portllm(self) -> None:
        requantise.lowrank_requantise_(
            self.codes, self.scales, [self.a], [self.b], [SCALING], self.scheme, *self.block,
            self.global_scale, self.modes,
        )  # fmt: skip

    def torch(self) -> None:
        codes = self.codes.view(torch.uint8)
        if self.kind.packing != "one":
            high, low = codes >> 4, codes & 15
            codes = torch.stack((high, low) if self.kind.packing == "high" else (low, high), dim=1)
        weight = self.kind.decode(codes.view(self.shape))
        self.blocks(weight).mul_(self.units(self.scales))
        weight.addmm_(self.b, self.a, alpha=SCALING)
        codes, scales = self.encoded(weight)
        self.codes.copy_(codes)
        self.scales.copy_(scales)

    def limit(self) -> None:
        self.codes.view(torch.uint8).bitwise_or_(0)


class Case:
    """The weights of a layer; each way is one whole pass."""

    def __init__(self, case: str, rank: int, delta: float, stochastic: bool) -> None:
        modes = [1, 123, 0, 0] if stochastic else []
        self.weights = [Weight(case, shape, rank, delta, modes) for shape in LAYERS["Mistral-7B"]]
        self._wide = [torch.empty(w.shape, dtype=torch.bfloat16).normal_(0, 0.02) for w in self.weights]
        self._bnb = _bnb_layers(case, self.weights)
        self.ways = ("limit", "add", "portllm", "torch") + (("bnb",) if self._bnb else ())

    def run(self, way: str) -> None:
        if way == "add":
            factors = [w.a for w in self.weights], [w.b for w in self.weights]
            ops.lowrank_add_(self._wide, *factors, [SCALING] * len(self._wide), [1] * len(self._wide))
        elif way == "bnb":
            for layer in self._bnb:
                layer.merge()
                layer.merged_adapters.clear()
        else:
            for weight in self.weights:
                getattr(weight, way)()


def _bnb_layers(case: str, weights: list[Weight]) -> list[Any]:
    """PEFT's layers around bitsandbytes' own, on the CPU; none where they are not there."""
    try:
        import bitsandbytes as bnb
        from peft import LoraConfig
        from peft.tuners.lora.bnb import Linear4bit, Linear8bitLt
    except ImportError:
        return []
    if case not in ("nf4", "int8-rows"):
        return []
    made = []
    for weight in weights:
        m, n = weight.shape
        wide, rank = torch.empty(m, n).normal_(0, 0.02), len(weight.a)
        if case == "nf4":
            base = bnb.nn.Linear4bit(n, m, bias=False, compute_dtype=FP32, quant_type="nf4", compress_statistics=False)
            base.weight = bnb.nn.Params4bit(wide, requires_grad=False, quant_type="nf4", compress_statistics=False)
        else:
            base = bnb.nn.Linear8bitLt(n, m, bias=False, has_fp16_weights=False)
            base.weight = bnb.nn.Int8Params(wide.half(), requires_grad=False, has_fp16_weights=False)
        base = base.to("cpu")
        kind = Linear4bit if case == "nf4" else Linear8bitLt
        config = LoraConfig(r=rank)
        layer = kind(base, "default", config=config, r=rank, lora_alpha=rank)
        layer.scaling["default"] = SCALING
        layer.lora_A["default"].weight = torch.nn.Parameter(weight.a, requires_grad=False)
        layer.lora_B["default"].weight = torch.nn.Parameter(weight.b, requires_grad=False)
        made.append(layer)
    return made


def measure(case: Case, ways: tuple[str, ...], rounds: int) -> dict[str, Any]:
    """Seconds of each way: median, 20th and 80th percentile over the rounds, after one warm-up round; extra MiB."""
    times: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(rounds + 1):
        for way in ways:
            started = time.perf_counter()
            case.run(way)
            if number:
                times[way].append(time.perf_counter() - started)

    def call(way: str) -> Callable[[], None]:
        return lambda: case.run(way)

    return {way: summary(times[way]) | {"extra_mib": extra_mib(call(way))} for way in ways}


def show(result: dict[str, Any]) -> None:
    """A line for each way."""
    ways = result["ways"]
    for way, figures in ways.items():
        seconds = figures["seconds"]
        spread = (figures["p80"] - figures["p20"]) / seconds
        against = "".join(f"{ways[other]['seconds'] / seconds:9.2f}" for other in ("limit", "add", "torch"))
        extra = figures["extra_mib"]
        cells = f"{seconds * 1e3:9.1f}{spread:8.0%}{result['weights'] / seconds / 1e9:9.2f}{against}"
        print(f"{result['case']:13}{way:9}{cells}{'-' if extra is None else f'{extra:.1f}':>11}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--delta", type=float, default=0.01, help="||s B A|| / ||W||")
    parser.add_argument("--rounding", default="nearest", choices=("nearest", "stochastic"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    kinds = {"rank": arguments.rank, "delta": arguments.delta, "rounding": arguments.rounding}
    print("  ".join(f"{key} {value}" for key, value in kinds.items()))
    heads = {"ms": 9, "spread": 8, "G w/s": 9, "x limit": 9, "x add": 9, "x torch": 9, "extra MiB": 11}
    print(f"{'case':13}{'way':9}" + "".join(f"{head:>{width}}" for head, width in heads.items()))
    results = []
    for name in arguments.cases:
        case = Case(name, arguments.rank, arguments.delta, arguments.rounding == "stochastic")
        count = sum(w.shape[0] * w.shape[1] for w in case.weights)
        results.append({"case": name, "weights": count, "ways": measure(case, case.ways, arguments.rounds)})
        show(results[-1])
    if arguments.json:
        report = {"benchmark": "quantised", "machine": machine.describe(), **kinds, "cases": results}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
