"""Update weights in memory: portllm against addmm_, PEFT's merge, and the in-place pass.

    python benchmarks/bench_update.py --json benchmarks/results/update.json
    python benchmarks/bench_update.py --cases stacked small --weight-dtype fp16 --factor-dtype bf16

Cases:
    layers   the seven linear weights of a decoder layer (of several, if one fits into the last-level cache), by rank
    stacked  four patches of rank 16 on each of these weights in one call, one patch alone, and four addmm_ each
    small    10,000 weights of 64 x 64, by the op's call and by one that was prepared
    memory   how far the process grows during one call, on a Mistral layer: its high-water mark less what it held

Factors are random in all bits of their dtype; fp32 is what PEFT loads an adapter as. B is scaled so that each patch is
``--delta`` of its weight, in the Frobenius norm. All ways run in one process, in turn, round after round; figures are
medians. The limit is the fastest pass that reads and writes every weight once, in place. The roofline is the longer one
of that pass and of the multiply-adds alone, at the rate that peak.py measures in each round.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import machine
import peak
import torch
from cases import LAYERS, WAYS, Case, layer
from samples import resident, summary

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
RANKS = (8, 16, 64, 256)
SMALL = 10_000
SMALL_WAYS = ("limit", "portllm", "prepared", "addmm_", "peft")
OURS = ("portllm", "prepared", "one_patch")  # whose instruction the roofline counts


def measure(case: Case, ways: tuple[str, ...], rounds: int, probe: Callable[[], float] | None) -> dict[str, Any]:
    """Seconds of each way: median, 20th and 80th percentile over the rounds, after one warm-up round.

    Also the median of what the probe measures, once a round.
    """
    times: dict[str, list[float]] = {way: [] for way in ways}
    rates: list[float] = []
    for number in range(rounds + 1):
        for way in ways:
            call: Callable[[], None] = getattr(case, way)
            started = time.perf_counter()
            call()
            if number:
                seconds = time.perf_counter() - started
                times[way].append(seconds / case.peft_share if way == "peft" else seconds)
        if probe:
            rates.append(probe())
    rate = statistics.median(rates) if rates else None
    return {"multiply_adds_per_second": rate, "ways": {way: summary(samples) for way, samples in times.items()}}


def extra_mib(call: Callable[[], None]) -> float | None:
    """How many MiB the resident set grows during a call, at its height; None if the system does not say."""
    call()  # the first one of a kind may start threads and load code
    try:
        ctypes.CDLL(None).malloc_trim(0)  # memory that is kept for reuse would hide a need for it
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
        call()
        return (resident("VmHWM") - before) / 1024
    except (OSError, AttributeError):
        return None


def run(arguments: argparse.Namespace, kinds: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Measure case after case; a result has its ``ways``, each with seconds or extra MiB."""

    instruction, probe = peak.probe(kinds["factor_dtype"] == torch.bfloat16)

    def timed(case: str, name: str, rank: int, made: Case, ways: tuple[str, ...]) -> dict[str, Any]:
        size = {"weights": len(made.weights), "bytes": made.bytes, "patches": len(made.terms[0])}
        size |= {"peft_share": made.peft_share, "multiply_adds": made.multiply_adds}
        measured = measure(made, ways, arguments.rounds, probe)
        return {"case": case, "name": name, "rank": rank, **size, "instruction": instruction, **measured}

    for case in arguments.cases:
        if case == "layers":
            for family in arguments.families:
                for rank in arguments.ranks:
                    yield timed(case, family, rank, layer(family, rank, **kinds), WAYS)
        elif case == "stacked":
            for family in arguments.families:
                made = layer(family, 16, patches=4, **kinds)
                yield timed(case, f"4 x {family}", 16, made, ("limit", "one_patch", "portllm", "addmm_"))
        elif case == "small":
            for rank in (8, 16):
                yield timed(case, f"{SMALL} small", rank, Case([(64, 64)] * SMALL, rank, **kinds), SMALL_WAYS)
        else:
            made = Case(LAYERS["Mistral-7B"], 16, **kinds)
            grown = {way: {"extra_mib": extra_mib(getattr(made, way))} for way in WAYS}
            yield {"case": case, "name": "Mistral-7B", "rank": 16, "ways": grown}


# Width and decimals.
COLUMNS = {"ms": (9, 1), "us/weight": (11, 2), "GB/s": (7, 1), "x peft": (8, 1), "x addmm_": (10, 2), "% limit": (9, 0)}
COLUMNS |= {"% roofline": (12, 0), "extra MiB": (11, 1)}


def figures(result: dict[str, Any], way: str) -> dict[str, float | None]:
    """The columns that a case has."""
    ways = result["ways"]
    if result["case"] == "memory":
        return {"extra MiB": ways[way]["extra_mib"]}
    seconds = ways[way]["seconds"]
    faster = {f"x {other}": r["seconds"] / seconds for other, r in ways.items()}
    limit = {"% limit": 100 * faster["x limit"]} if "limit" in ways else {}
    if way in OURS and "limit" in ways and (rate := result["multiply_adds_per_second"]):
        limit["% roofline"] = 100 * roofline(result, way, rate) / seconds
    of_one = {"us/weight": seconds / result["weights"] * 1e6, "GB/s": result["bytes"] / seconds / 1e9}
    return {"ms": seconds * 1e3, **of_one, **faster, **limit}


def roofline(result: dict[str, Any], way: str, rate: float) -> float:
    """Seconds below which no update with this instruction can be."""
    share = 1 / result["patches"] if way == "one_patch" else 1
    return max(result["ways"]["limit"]["seconds"], share * result["multiply_adds"] / rate)


def show(result: dict[str, Any]) -> None:
    """A line for each way."""
    start = f"{result['name']:16}{result['rank']:5}  "
    for way in result["ways"]:
        values = figures(result, way)
        cells = [
            f"{'-':>{width}}" if (value := values.get(name)) is None else f"{value:{width}.{decimals}f}"
            for name, (width, decimals) in COLUMNS.items()
        ]
        print(f"{start}{way:10}{''.join(cells)}", flush=True)
    if rate := result.get("multiply_adds_per_second"):
        count = result["multiply_adds"] / 1e9
        print(f"{start}{count:.3g} G multiply-adds, {rate / 1e9:.1f} G/s in {result['instruction']} chains", flush=True)
    elif "instruction" in result:
        print(f"{start}no roofline: {result['instruction']}", flush=True)
    if (share := result.get("peft_share", 1)) < 1:
        print(f"{start}peft merged {share:.0%} of the weights, and its time is scaled", flush=True)
    if result["case"] == "stacked":
        four, one = (result["ways"][way]["seconds"] for way in ("portllm", "one_patch"))
        print(f"{start}four patches take {four / one:.2f} times as long as one", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cases = ("layers", "stacked", "small", "memory")
    parser.add_argument("--cases", nargs="+", default=cases, choices=cases)
    parser.add_argument("--families", nargs="*", default=list(LAYERS), choices=list(LAYERS))
    parser.add_argument("--ranks", nargs="*", type=int, default=list(RANKS))
    parser.add_argument("--weight-dtype", default="bf16", choices=list(DTYPES))
    parser.add_argument("--factor-dtype", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--delta", type=float, default=0.01, help="||s B A|| / ||W|| of each patch")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    kinds = {"weight_dtype": arguments.weight_dtype, "factor_dtype": arguments.factor_dtype, "delta": arguments.delta}
    print("  ".join(f"{key} {value}" for key, value in kinds.items()))
    print(f"{'case':16}{'rank':>5}  {'way':10}{''.join(f'{name:>{width}}' for name, (width, _) in COLUMNS.items())}")
    results = []
    for result in run(arguments, kinds | {key: DTYPES[kinds[key]] for key in ("weight_dtype", "factor_dtype")}):
        show(result)
        results.append(result)
    if arguments.json:
        report = {"benchmark": "update", "machine": machine.describe(), **kinds, "cases": results}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
