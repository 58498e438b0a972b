"""Merge DoRA in memory: portllm against PEFT's merge, plain torch, and the in-place pass.

    python benchmarks/bench_dora.py --json benchmarks/results/dora.json

The seven linear weights of a Mistral-7B layer, one adapter with magnitudes, by the axis of the norms: rows, as in
nn.Linear, and columns, as in Conv1D and embeddings. Factors are random in all bits of their dtype; fp32 is what PEFT
loads an adapter as. B is scaled so that the patch is ``--delta`` of its weight, in the Frobenius norm, and magnitudes
are near the norms, as after training. All ways run in one process, in turn, round after round; figures are medians.

Ways:
    limit     read and write every weight once, in place
    plain     portllm's update with the same factors, without norms
    portllm   DoRA in one call: rows take one read and one write, columns a second read
    squares   the sums of squares alone: the first of the two calls that a weight cut over several machines takes
    write     the second one
    torch     the reference in plain torch
    peft      PEFT's merge of a layer with use_dora (norms of rows only)

The roofline is the longer one of the limit and of the multiply-adds, at the rate that peak.py measures in each round.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import machine
import peak
import torch
from bench_update import DTYPES, measure
from cases import LAYERS, SCALING, Case
from torch import Tensor, nn

from portllm import dora

WAYS = ("limit", "plain", "portllm", "squares", "write", "torch", "peft")


class DoraCase(Case):
    """Weights with one DoRA adapter, and the ways to merge it; each call is one whole merge."""

    def __init__(self, axis: int, **kinds: Any) -> None:
        super().__init__(LAYERS["Mistral-7B"], **kinds)
        self.plain = self.portllm
        self.portllm = self._portllm
        self._axis = axis
        self._magnitudes = [torch.linalg.vector_norm(w, dim=1 - axis, dtype=torch.float32) for w in self.weights]
        for magnitude in self._magnitudes:
            magnitude *= 1 + 0.01 * torch.randn_like(magnitude)
        self._squares = self.squares()

    def _dora(self, squares: list[Tensor], backend: str) -> None:
        count = len(self.weights)
        dora.lowrank_dora_(*self._calls[1], self._magnitudes, [self._axis] * count, [1.0] * count, squares, backend)

    def _portllm(self) -> None:
        self._dora([], "auto")

    def squares(self) -> list[Tensor]:
        return dora.lowrank_dora_squares(*self._calls[1], [self._axis] * len(self.weights))

    def write(self) -> None:
        self._dora(self._squares, "auto")

    def torch(self) -> None:
        self._dora([], "torch")

    def _wrap(self) -> list[Any]:
        for weight, terms, magnitude in zip(self.weights, self.terms, self._magnitudes, strict=True):
            self._peft.append(peft_layer(weight, *terms[0], magnitude))
        return self._peft


def peft_layer(weight: Tensor, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor) -> Any:
    """PEFT's own DoRA layer around a weight."""
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    rank = len(lora_A)
    with torch.device("meta"):
        base = nn.Linear(1, 1, bias=False, dtype=weight.dtype)
    base.weight = nn.Parameter(weight, requires_grad=False)
    base.out_features, base.in_features = weight.shape
    layer = Linear(base, "default", config=LoraConfig(r=rank, use_dora=True), r=rank, lora_alpha=rank)
    layer.scaling["default"] = SCALING
    layer.lora_A["default"].weight = nn.Parameter(lora_A, requires_grad=False)
    layer.lora_B["default"].weight = nn.Parameter(lora_B, requires_grad=False)
    layer.lora_magnitude_vector["default"].weight = nn.Parameter(magnitude, requires_grad=False)
    return layer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", nargs="*", default=["rows", "columns"], choices=["rows", "columns"])
    parser.add_argument("--ways", nargs="*", default=WAYS, choices=WAYS)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--weight-dtype", default="bf16", choices=list(DTYPES))
    parser.add_argument("--factor-dtype", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--delta", type=float, default=0.01, help="||s B A|| / ||W||")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    kinds = {"weight_dtype": arguments.weight_dtype, "factor_dtype": arguments.factor_dtype, "delta": arguments.delta}
    print("  ".join(f"{key} {value}" for key, value in kinds.items()), f" rank {arguments.rank}")
    print(f"{'norms of':10}{'way':9}{'ms':>9}{'x plain':>9}{'x peft':>9}{'% roofline':>12}")
    instruction, probe = peak.probe(arguments.factor_dtype == "bf16")
    results = []
    for axis in arguments.axes:
        dtypes = {key: DTYPES[kinds[key]] for key in ("weight_dtype", "factor_dtype")}
        case = DoraCase(axis == "columns", rank=arguments.rank, **kinds | dtypes)
        ways = tuple(way for way in arguments.ways if way != "peft" or axis == "rows")
        measured = measure(case, ways, arguments.rounds, probe)
        size = {"bytes": case.bytes, "multiply_adds": case.multiply_adds, "instruction": instruction}
        results.append({"norms": axis, "rank": arguments.rank, **size, **measured})
        seconds = {way: value["seconds"] for way, value in measured["ways"].items()}
        rate = measured["multiply_adds_per_second"]
        roofline = max(seconds.get("limit", 0), case.multiply_adds / rate) if rate else None
        for way in ways:
            times = [f"{seconds[way] / seconds['plain']:9.2f}" if "plain" in seconds else f"{'-':>9}"]
            times += [f"{seconds['peft'] / seconds[way]:9.1f}" if "peft" in seconds else f"{'-':>9}"]
            share = (
                f"{100 * roofline / seconds[way]:12.0f}" if roofline and way not in ("limit", "peft", "torch") else ""
            )
            print(f"{axis:10}{way:9}{seconds[way] * 1e3:9.1f}{''.join(times)}{share}", flush=True)
    if arguments.json:
        report = {"benchmark": "dora", "machine": machine.describe(), **kinds, "cases": results}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
