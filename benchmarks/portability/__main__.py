"""How long a patch keeps its worth on an evolving model (see README.md).

python -m benchmarks.portability                     # the small form: about a quarter of an hour on two cores
python -m benchmarks.portability --model BASE --evolved EVOLVED --tasks boolq,sst2      # the real form
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

import machine

from . import experiment, real, report
from .models import MODELS

RESULTS = Path(__file__).resolve().parents[1] / "results"


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    if arguments.model:
        return real.run(arguments)
    settings = experiment.QUICK if arguments.quick else experiment.Settings()
    start = time.perf_counter()
    worlds = run_worlds(arguments.models, arguments.seeds, settings, arguments.workers)
    summary = report.summarise(worlds)
    report.print_summary(summary)
    seconds = time.perf_counter() - start
    print(f"\n{len(worlds)} worlds in {seconds / 60:.1f} minutes, {arguments.workers} processes of one thread")
    result = {
        "benchmark": "portability",
        "machine": machine.describe() | {"processes": arguments.workers},
        "minutes": round(seconds / 60, 1),
        "settings": asdict(settings),
        "summary": summary,
        "worlds": worlds,
    }
    if arguments.out or not arguments.quick:
        write(result, arguments.out or RESULTS / f"portability-{machine.label()}.json")
    return 0


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS), help="architectures")
    parser.add_argument("--seeds", type=int, default=3, help="how many worlds of each (default: 3)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: the cores)")
    parser.add_argument("--quick", action="store_true", help="so small that nothing is learned: does it run?")
    parser.add_argument(
        "-o", "--out", type=Path, help=f"JSON to write, a plot beside it; such as {RESULTS.name}/x.json"
    )
    real.add_arguments(parser)
    arguments = parser.parse_args(argv)
    if arguments.seeds < 1 or arguments.workers < 1:
        parser.error("--seeds and --workers must be at least 1")
    if bool(arguments.model) != bool(arguments.evolved):
        parser.error("the real form needs both --model and --evolved")
    return arguments


def run_worlds(kinds: list[str], seeds: int, settings: experiment.Settings, workers: int) -> list[dict[str, Any]]:
    """Every architecture with every seed, in as many processes as asked for; in order, whatever ends first."""
    jobs = [(kind, seed) for seed in range(seeds) for kind in kinds]
    found: dict[tuple[str, int], dict[str, Any]] = {}
    start = time.perf_counter()
    # Fresh processes: torch's threads do not survive a fork.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(experiment.run_world, *job, settings): job for job in jobs}
        for future in as_completed(futures):
            found[futures[future]] = future.result()
            kind, seed = futures[future]
            minutes = (time.perf_counter() - start) / 60
            print(
                f"{minutes:5.1f} min  {kind}, seed {seed}  ({len(found)} of {len(jobs)})", file=sys.stderr, flush=True
            )
    return [found[kind, seed] for kind in kinds for seed in range(seeds)]


def write(result: dict[str, Any], out: Path) -> None:
    """JSON with a line for each record, and the plot beside it if matplotlib is there.

    A record's scores and remedies are lists there, in the order of the names in the head.
    """
    flat = report.flatten(result["worlds"])
    named = {key: list(next(r[key] for r in flat if key in r)) for key in ("scores", "remedies")}
    head = {key: value for key, value in result.items() if key != "worlds"} | named
    lines = [json.dumps(_rounded(head), indent=1, ensure_ascii=False)[:-2] + ',\n "worlds": [']
    for i, world in enumerate(result["worlds"]):
        start = {key: value for key, value in world.items() if key != "records"}
        lists = ({k: list(v.values()) if k in named else v for k, v in r.items()} for r in world["records"])
        records = ",\n".join("   " + json.dumps(_rounded(r), ensure_ascii=False) for r in lists)
        opening = json.dumps(_rounded(start), ensure_ascii=False)[:-1]
        lines.append(f'  {opening}, "records": [\n{records}\n  ]}}' + ("," if i + 1 < len(result["worlds"]) else ""))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join([*lines, " ]\n}\n"]), encoding="utf-8")
    print(out)
    try:
        for file in report.plot(flat, out.with_suffix("")):
            print(file)
    except ImportError:
        print("no plot: matplotlib is not installed (pip install matplotlib)", file=sys.stderr)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


if __name__ == "__main__":
    sys.exit(main())
