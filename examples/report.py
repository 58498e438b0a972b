"""The tables of the demo, within 80 columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def print_result(result: dict[str, Any]) -> None:
    _scores(result)
    _path(result["along_the_evolution"])
    _sizes(result["relative_sizes"])
    _costs(result["costs"])
    _checks(result)


def _scores(result: dict[str, Any]) -> None:
    rows = [("", "task", "loss A", "loss B")]
    for name, s in result["scores"].items():
        rows.append((name, f"{s['accuracy']:.1%}", f"{s['loss_a']:.3f}", f"{s['loss_b']:.3f}"))
    _table("Task: whole answers right, of 512 unseen questions. Loss: nats a word.", rows)
    steps = result["budget"]["patch"]
    print(f"The port takes no training step; the refit takes the patch's {steps} once more.")


def _path(paths: Sequence[dict[str, Any]]) -> None:
    print("\nHow far it carries: the old patch on the evolving model (moved: |θ'-θ| / |θ|)")
    heads = [f"{p['replay']:.0%} of A, rate {p['rate']:g}" for p in paths]
    print(" " * 9 + "  ".join(f"{head:>24}" for head in heads))
    print("  steps  " + "  ".join([f"{'moved':>8}{'task':>8}{'loss B':>8}"] * len(paths)))
    for looks in zip(*(path["patched"] for path in paths), strict=True):
        cells = (f"{x['moved']:8.1%}{x['accuracy']:8.1%}{x['loss_b']:8.3f}" for x in looks)
        print(f"  {looks[0]['step']:5}  " + "  ".join(cells))


def _sizes(sizes: dict[str, float]) -> None:
    rows = [
        ("evolution  |θ'-θ| / |θ|", f"{sizes['evolution_to_base']:.1%}"),
        ("patch  |Δ| / |θ'|", f"{sizes['patch_to_evolved']:.1%}"),
        ("cosine of the two", f"{sizes['cosine_patch_evolution']:+.3f}"),
        ("left out by the port  |R| / |Δ|, R = refit - patch", f"{sizes['residue_to_patch']:.2f}"),
    ]
    if "other_seed_to_patch" in sizes:
        other = sizes["other_seed_to_patch"]
        rows.append(("the same, no evolution: other seed - patch, on the base", f"{other:.2f}"))
    rows.append(("paper's ratio  |θ'+Δ| / |R| (holds all of θ')", f"{sizes['patched_to_residue']:.1f}"))
    _table("Sizes: Frobenius norms over the patched matrices.", rows)


def _costs(costs: dict[str, dict[str, float]]) -> None:
    rows = [("", "time", "peak extra memory")]
    for way, cost in costs.items():
        rows.append((way, f"{cost['seconds'] * 1e3:.1f} ms", f"{cost['extra_bytes'] / 1e6:.1f} MB"))
    _table("Costs: from the patch's file to patched weights; one thread, medians.", rows)
    print("With 2 MB of weights these are overheads and say little of the engines.")
    print("For real sizes see benchmarks/.")


def _checks(result: dict[str, Any]) -> None:
    print("\nIs the port right?")
    for name, entry in result["checks"].items():
        detail = ", ".join(f"{key} {_short(value)}" for key, value in entry.items() if key != "passed")
        print(f"  {'yes' if entry['passed'] else 'NO':3}  {name} ({detail})")
    undo = result["undo"]
    print(
        f"After remove(), {undo['same_bits']:.1%} of the patched weights have their old bits;\n"
        f"the largest difference is {undo['largest']:.1e}."
    )


def _short(value: Any) -> str:
    return f"{value:.1e}" if isinstance(value, float) else str(value)


def _table(title: str, rows: Sequence[tuple[str, ...]]) -> None:
    print(f"\n{title}")
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        first, *others = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        print("  " + "  ".join([row[0].ljust(len(first)), *others]))
