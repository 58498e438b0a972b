"""Update all linear weights of a whole model on a GPU: portllm against addmm_, PEFT's merge, and the in-place pass.

    python benchmarks/bench_gpu.py --quick                                     # few settings
    python benchmarks/bench_gpu.py --json benchmarks/results/gpu.json --plot benchmarks/results/gpu
    python benchmarks/bench_gpu.py --device cpu                                # tiny shapes: that the script runs

Each way updates every weight of the model once. The limit is a pass that reads and writes every weight in place and
computes next to nothing. All ways of a case run in one process, in turn, round after round, timed by CUDA events;
figures are medians. Before the timing each way of portllm is held against float64: what is wrong is not timed.

For tuning, PORTLLM_CUDA_STAGES=2, 3 or 4 sets how many tiles of W the CUDA kernel keeps under way:

    for s in 2 3 4; do PORTLLM_CUDA_STAGES=$s python benchmarks/bench_gpu.py --quick --ranks 16 --ways cuda; done
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from cases import linear_shapes, peft_layer
from samples import summary
from torch import Tensor

from portllm import ops

Shapes = list[tuple[int, int]]
# One layer, and how many there are.
MODELS: dict[str, tuple[Shapes, int]] = {
    "Mistral-7B": (linear_shapes(4096, 4096, 1024, 14336), 32),
    "Llama-3.1-8B": (linear_shapes(4096, 4096, 1024, 14336), 32),
    "Gemma2-9B": (linear_shapes(3584, 4096, 2048, 14336), 42),
    "70B, shard 1 of 8": (linear_shapes(8192, 8192 // 8, 1024 // 8, 28672 // 8), 80),
    "Mixtral-8x7B": (linear_shapes(4096, 4096, 1024, 14336, experts=8), 32),
}
TINY: dict[str, tuple[Shapes, int]] = {
    "tiny": (linear_shapes(64, 64, 16, 136), 2),
    "tiny, experts": (linear_shapes(40, 64, 8, 72, 4), 1),
}
# Of the memory that is free at the start, weights and factors take at most this part.
MEMORY = 0.7
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Setting(NamedTuple):
    model: str
    rank: int
    patches: int
    factors: str  # a key of TYPES

    def __str__(self) -> str:
        return f"{self.model}, r={self.rank}, {self.patches} x {self.factors}"


def settings(quick: bool, models: list[str], some_ranks: list[int] | None) -> Iterator[Setting]:
    """What is measured: the first model in full, the others at two ranks."""
    for i, model in enumerate(models):
        ranks = some_ranks or ((16, 64) if quick or i else (8, 16, 32, 64, 128, 256))
        for rank in ranks:
            for factors in ("fp32", "bf16"):
                if not quick or (i == 0 or (rank, factors) == (16, "fp32")):
                    yield Setting(model, rank, 1, factors)
        for patches in () if i or some_ranks else (4,) if quick else (2, 4, 8, 16):
            yield Setting(model, 16, patches, "fp32")


class Case:
    """A model's weights with factors, and the ways to update them; each call is one whole pass."""

    def __init__(self, setting: Setting, shapes: Shapes, device: torch.device) -> None:
        self.setting = setting
        self.device = device
        dtype, rank = TYPES[setting.factors], setting.rank
        made = {"device": device, "dtype": torch.bfloat16}
        self.weights = [torch.empty(shape, **made).normal_(0, 0.02) for shape in shapes]
        terms = [shape for shape in shapes for _ in range(setting.patches)]
        self.lora_A = [(torch.randn(rank, n, device=device) / n**0.5).to(dtype) for _, n in terms]
        self.lora_B = [(torch.randn(m, rank, device=device) * 1e-3).to(dtype) for m, _ in terms]
        self.scalings = [2.0 / setting.patches] * len(terms)
        self.n_terms = [setting.patches] * len(shapes)
        self.bytes = sum(2 * w.nbytes for w in self.weights)
        self._halves: list[tuple[Tensor, Tensor]] = []

    def ways(self) -> dict[str, Callable[[], Callable[[], None]]]:
        """By name, what prepares each way that there is on this device."""
        if self.device.type == "cpu":
            return {
                "limit": lambda: self.limit,
                "cpu": lambda: partial(self.portllm, "cpu"),
                "addmm_": lambda: self.addmm_,
                "peft": self._peft,
            }
        return {
            "limit": lambda: self.limit,
            "triton": lambda: partial(self.portllm, "triton"),
            "triton, prepared": self._triton_prepared,
            "cuda": lambda: partial(self.portllm, "cuda"),
            "cuda, graph": lambda: self._captured(partial(self.portllm, "cuda")),
            "addmm_": lambda: self.addmm_,
            "addmm_, graph": lambda: self._captured(self.addmm_),
            "peft": self._peft,
        }

    def limit(self) -> None:
        """Read and write each weight once; an integer op, so that nothing but the memory is timed."""
        for weight in self.weights:
            weight.view(torch.int16).bitwise_xor_(1)

    def portllm(self, backend: str) -> None:
        ops.lowrank_add_(self.weights, self.lora_A, self.lora_B, self.scalings, self.n_terms, backend)

    def addmm_(self) -> None:
        """The best call in torch; it takes factors of the weight's dtype only, so fp32 ones lose their last bits."""
        if not self._halves:
            self._halves = [(a.bfloat16(), b.bfloat16()) for a, b in zip(self.lora_A, self.lora_B, strict=True)]
        for t, (a, b) in enumerate(self._halves):
            self.weights[t // self.setting.patches].addmm_(b, a, alpha=self.scalings[t])

    def _triton_prepared(self) -> Callable[[], None]:
        from portllm.kernels.lowrank_add import LaunchTable

        return LaunchTable(self.weights, self.lora_A, self.lora_B, self.scalings, self.n_terms).launch

    def _captured(self, call: Callable[[], None]) -> Callable[[], None]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()  # what is made at the first call must not be captured
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay

    def _peft(self) -> Callable[[], None]:
        """PEFT's own merge of each layer, through PEFT: one of its layers for each patch, around the same weight."""
        layers = [
            peft_layer(self.weights[t // self.setting.patches], a, b, self.scalings[t])
            for t, (a, b) in enumerate(zip(self.lora_A, self.lora_B, strict=True))
        ]

        def merge() -> None:
            for made in layers:
                made.merge()
                made.merged_adapters.clear()

        return merge

    def check(self, way: str, call: Callable[[], None]) -> str | None:
        """Run it once; what is wrong with some of the weights, or None. portllm's ways must be right to the bit."""
        some = sorted({0, 1, len(self.weights) // 2, len(self.weights) - 1})
        before = {i: self.weights[i].clone() for i in some}
        call()
        for i in some:
            terms = range(i * self.setting.patches, (i + 1) * self.setting.patches)
            got, exact = self.weights[i], before[i].double()
            size = exact.abs()
            for t in terms:
                a, b = self.lora_A[t].double(), self.lora_B[t].double()
                exact.addmm_(b, a, alpha=self.scalings[t])
                size.addmm_(b.abs(), a.abs(), alpha=abs(self.scalings[t]))
            half_ulp = torch.ldexp(torch.ones_like(exact), torch.frexp(exact).exponent.clamp_min(-125) - 9)
            lost = 2.0**-24 * (self.setting.rank + self.setting.patches + 8) * size
            # addmm_ and PEFT round factors, deltas or sums on the way: that they do the same thing is enough.
            allowed = half_ulp * 1.01 + lost if way in EXACT else 4 * half_ulp + 2.0**-6 * size
            error = (got.double() - exact).abs()
            if not bool((error <= allowed).all()):
                return f"weight {i} is off by up to {float((error / allowed).nan_to_num(math.inf).max()):.3g} x allowed"
        return None


EXACT = ("cpu", "triton", "cuda", "triton, prepared", "cuda, graph")


class Clock:
    """Seconds of a call, by CUDA events on a GPU; and the bytes it takes beyond what is there."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"

    def seconds(self, call: Callable[[], None]) -> float:
        if not self.cuda:
            started = time.perf_counter()
            call()
            return time.perf_counter() - started
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def extra_bytes(self, call: Callable[[], None]) -> int | None:
        if not self.cuda:
            call()
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


def measure(case: Case, rounds: int, wanted: list[str] | None) -> dict[str, dict[str, Any]]:
    """For each way seconds (median, 20th and 80th percentile) and extra memory, or why it was not timed."""
    clock = Clock(case.device)
    ways: dict[str, Callable[[], None]] = {}
    results: dict[str, dict[str, Any]] = {}
    for way, prepare in case.ways().items():
        if wanted and way not in ("limit", *wanted):
            continue
        try:
            call = prepare()
            wrong = None if way == "limit" else case.check(way, call)
            results[way] = {"wrong": wrong} if wrong else {"extra_bytes": clock.extra_bytes(call)}
        except Exception as error:  # not built, not installed, out of memory: the others go on
            results[way] = {"wrong": f"{type(error).__name__}: {error}".splitlines()[0]}
        if "wrong" not in results[way]:
            ways[way] = call
    times: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(rounds + 1):
        for way, call in ways.items():
            seconds = clock.seconds(call)
            if number:
                times[way].append(seconds)
    for way, samples in times.items():
        results[way] |= summary(samples)
    return results


def fitting(setting: Setting, model: tuple[Shapes, int], device: torch.device) -> Shapes:
    """As many layers of a model as there is memory for."""
    shapes, layers = model
    if device.type != "cuda":
        return shapes * layers
    rank = setting.rank * setting.patches
    size = TYPES[setting.factors].itemsize + 2  # and once more in bf16, for addmm_
    each = sum(2 * m * n + size * rank * (m + n) for m, n in shapes)
    free = torch.cuda.mem_get_info(device)[0]
    return shapes * max(1, min(layers, int(MEMORY * free) // each))


def line(case: Case, way: str, ways: dict[str, dict[str, Any]]) -> str:
    result = ways[way]
    if "wrong" in result:
        return f"  {way:18} not timed: {result['wrong']}"
    seconds = result["seconds"]

    def times(other: str) -> str:
        return f"{ways[other]['seconds'] / seconds:9.2f}" if "seconds" in ways.get(other, {}) else f"{'–':>9}"

    extra = result["extra_bytes"]
    return (
        f"  {way:18}{seconds * 1e3:10.3f}{result['p20'] * 1e3:10.3f}{result['p80'] * 1e3:10.3f}"
        f"{case.bytes / seconds / 1e9:9.0f}{100 * ways['limit']['seconds'] / seconds:9.1f}"
        f"{times('addmm_')}{times('peft')}"
        f"{'–' if extra is None else f'{extra / 2**20:.1f}':>12}"
    )


def plot(cases: list[dict[str, Any]], path: Path) -> None:
    """Share of the limit over the rank, for the first model, as PNG and SVG."""
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is not installed: no plot")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    chosen = [case for case in cases if case["model"] == cases[0]["model"] and case["patches"] == 1]
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True)
    for axis, factors in zip(axes, TYPES, strict=True):
        rows = [case for case in chosen if case["factors"] == factors]
        for way in dict.fromkeys(way for case in rows for way in case["ways"] if way != "limit"):
            points = [
                (case["rank"], 100 * case["ways"]["limit"]["seconds"] / case["ways"][way]["seconds"])
                for case in rows
                if "seconds" in case["ways"].get(way, {})
            ]
            axis.plot(*zip(*points, strict=True), marker="o", label=way) if points else None
        axis.set(title=f"{cases[0]['model']}, {factors} factors", xlabel="rank", xscale="log", ylim=(0, 105))
        axis.minorticks_off()
        axis.set_xticks([case["rank"] for case in rows], [str(case["rank"]) for case in rows])
    axes[0].set_ylabel("% of an in-place pass over the weights")
    axes[-1].legend(fontsize="small")
    figure.tight_layout()
    for suffix in (".png", ".svg"):
        figure.savefig(path.with_suffix(suffix), dpi=150)
    pyplot.close(figure)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer settings and rounds")
    parser.add_argument("--models", nargs="*", choices=list(MODELS), default=None)
    parser.add_argument("--ranks", nargs="*", type=int, default=None)
    parser.add_argument("--ways", nargs="*", default=None, help="only these, and the limit")
    parser.add_argument("--rounds", type=int, default=None)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--plot", type=Path, default=None, help="the name of the files, without .png and .svg")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    options = parse(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("torch sees no CUDA device: nothing is measured; --device cpu shows that the script runs")
        return []
    models = TINY if device.type == "cpu" else MODELS
    names = list(models) if options.models is None or device.type == "cpu" else options.models
    if options.quick and options.models is None:
        names = names[:1]
    rounds = options.rounds or (3 if device.type == "cpu" else 10 if options.quick else 30)
    cases: list[dict[str, Any]] = []
    for setting in settings(options.quick or device.type == "cpu", names, options.ranks):
        shapes = fitting(setting, models[setting.model], device)
        layers = len(shapes) // len(models[setting.model][0])
        case = Case(setting, shapes, device)
        print(f"\n{setting}: {layers} layers, {len(shapes)} weights, {case.bytes / 2e9:.2f} GB")
        print(
            f"  {'way':18}{'ms':>10}{'p20':>10}{'p80':>10}{'GB/s':>9}{'% limit':>9}{'x addmm_':>9}{'x peft':>9}", end=""
        )
        print(f"{'extra MiB':>12}", flush=True)
        ways = measure(case, rounds, options.ways)
        for way in ways:
            print(line(case, way, ways), flush=True)
        cases.append({**setting._asdict(), "layers": layers, "bytes": case.bytes, "ways": ways})
        del case
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    for backend in ("triton", "triton, prepared", "cuda", "cuda, graph"):
        shares = [
            case["ways"]["limit"]["seconds"] / case["ways"][backend]["seconds"]
            for case in cases
            if "seconds" in case["ways"].get(backend, {})
        ]
        if shares:
            print(f"{backend}: geometric mean {100 * statistics.geometric_mean(shares):.1f} % of the limit")
    if options.json:
        import machine

        report = {"benchmark": "gpu", "machine": machine.describe(), "cases": cases}
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if options.plot:
        plot(cases, options.plot)
    return cases


if __name__ == "__main__":
    main()
