"""Exact undo in memory: an update that is recorded, taken off again, swapped for another; and what peers do.

    python benchmarks/bench_undo.py --json benchmarks/results/undo.json

The seven linear weights of one Mistral-7B layer. Ways, in turn, round after round; figures are medians:
    limit     a pass that reads and writes every weight once
    plain     the update without a record
    apply     the update with its record
    swap      that update off and another on, in one pass, with a record again
    remove    off again: the bits are compared with those of the start, in every round
    copies    what a server does that keeps a pristine copy: the weights are copied back, then ``plain``
    peft      PEFT's merge, and ``unmerge`` its unmerge, with the share of weights that it leaves wrong

Bits a weight are those of the record; a copy has 16. Beside them, the entropy of old - round(new - delta) in units of
the last place, which no code of these differences alone can be below: the record is, as it knows where they are likely.
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
from cases import SCALING, Case, layer
from samples import summary
from torch import Tensor

from portllm import ops
from portllm.record import Record

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
Terms = list[tuple[Tensor, Tensor]]


class Undo:
    """Weights with two patches, and the ways to put them on and take them off."""

    def __init__(self, rank: int, factor_dtype: torch.dtype, delta: float) -> None:
        self.case: Case = layer("Mistral-7B", rank, patches=2, factor_dtype=factor_dtype, delta=delta)
        self.weights = self.case.weights
        self.base = [weight.clone() for weight in self.weights]
        self.first, self.second = ([terms[i] for terms in self.case.terms] for i in range(2))
        self.records: list[Record | None] = [None] * len(self.weights)

    def reset(self) -> None:
        for weight, base in zip(self.weights, self.base, strict=True):
            weight.copy_(base)

    def plain(self) -> None:
        self.case.one_patch()

    def copies(self) -> None:
        self.reset()
        self.case.one_patch()

    def apply(self) -> None:
        self._exchange([], self.first)

    def swap(self) -> None:
        self._exchange(self.first, self.second)

    def remove(self) -> None:
        self._exchange(self.second, [])

    def _exchange(self, old: Terms, new: Terms) -> None:
        both = [[*pair] for pair in zip(old, new, strict=True)] if old and new else [[term] for term in old or new]
        terms = [term for each in both for term in each]
        n_old, n_new = ([int(bool(part))] * len(self.weights) for part in (old, new))
        self.records = ops.lowrank_exchange_(
            self.weights,
            [a for a, _ in terms],
            [b for _, b in terms],
            [SCALING] * len(terms),
            n_old,
            n_new,
            self.records,
        )

    def is_base(self) -> bool:
        return all(torch.equal(w.view(torch.int16), b.view(torch.int16)) for w, b in self._pairs())

    def wrong(self) -> float:
        """The share of weights whose bits are not those of the base."""
        differ = sum(int((w.view(torch.int16) != b.view(torch.int16)).sum()) for w, b in self._pairs())
        return differ / sum(weight.numel() for weight in self.weights)

    def _pairs(self) -> Any:
        return zip(self.weights, self.base, strict=True)

    @property
    def bits(self) -> float:
        """Of the records that are at hand, for each weight."""
        return 8 * sum(r.nbytes for r in self.records if r) / sum(weight.numel() for weight in self.weights)

    def entropy(self) -> float:
        """Of old - round(new - delta) in units of the last place, bits a weight; on 1,024 rows of one weight."""
        base, (a, b) = self.base[0][:1024], self.first[0]
        delta = SCALING * (b[:1024].float() @ a.float())
        guess = ((base.float() + delta).to(base.dtype).float() - delta).to(base.dtype)
        _, counts = (base.view(torch.int16).int() - guess.view(torch.int16).int()).unique(return_counts=True)
        share = counts / counts.sum()
        return -float((share * share.log2()).sum())


def measure(undo: Undo, rounds: int, *, peft: bool) -> dict[str, Any]:
    """Seconds of each way, after one round to warm up; what the records take; whether all bits came back."""
    times: dict[str, list[float]] = {}
    bits = wrong = 0.0

    def timed(number: int, way: str, call: Callable[[], None]) -> None:
        started = time.perf_counter()
        call()
        if number:
            times.setdefault(way, []).append(time.perf_counter() - started)

    exact = True
    for number in range(rounds + 1):
        timed(number, "limit", undo.case.limit)
        timed(number, "plain", undo.plain)
        timed(number, "copies", undo.copies)
        undo.reset()
        timed(number, "apply", undo.apply)
        bits = undo.bits
        timed(number, "swap", undo.swap)
        timed(number, "remove", undo.remove)
        exact &= undo.is_base()
        if peft:
            timed(number, "peft", undo.case.peft)
            timed(number, "unmerge", undo.case.peft_unmerge)
            wrong = undo.wrong()
            undo.reset()
    ways = {way: summary(samples) for way, samples in times.items()}
    return {
        "ways": ways,
        "bits": bits,
        "entropy": undo.entropy(),
        "exact": exact,
        "peft_wrong": wrong if peft else None,
    }


def show(result: dict[str, Any]) -> None:
    """A line for each case."""
    seconds = {way: figures["seconds"] for way, figures in result["ways"].items()}
    ratios = "".join(f"{way} {s * 1e3:.1f} ({s / seconds['plain']:.2f}), " for way, s in seconds.items())
    print(
        f"{result['factors']} r {result['rank']:<4} delta {result['delta']:<6g} ms (x plain): {ratios}"
        f"{result['bits']:.3f} bits a weight (entropy {result['entropy']:.3f}), "
        f"{'every bit back' if result['exact'] else 'BITS LOST'}"
        + (f", PEFT leaves {result['peft_wrong']:.2%} wrong" if result["peft_wrong"] is not None else ""),
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", nargs="+", type=int, default=[8, 16, 64])
    parser.add_argument("--deltas", nargs="+", type=float, default=[0.001, 0.01, 0.05])
    parser.add_argument("--factor-dtypes", nargs="+", default=["fp32", "bf16"], choices=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-peft", action="store_true", help="leave PEFT's merge out")
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    results = []
    for factors in arguments.factor_dtypes:
        for rank in arguments.ranks:
            for delta in arguments.deltas:
                undo = Undo(rank, DTYPES[factors], delta)
                peft = not arguments.no_peft and rank == 16
                result = {"factors": factors, "rank": rank, "delta": delta}
                result |= measure(undo, arguments.rounds, peft=peft)
                show(result)
                results.append(result)
    if arguments.json:
        report = {"benchmark": "undo", "machine": machine.describe(), "cases": results}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
