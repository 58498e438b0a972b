"""What the records say: skill kept by evolution, how the scores rank, what the remedies change; a table and a plot."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from .scores import spearman

Records = list[dict[str, Any]]
CHAINS = ("full", "LoRA")
RANKINGS = ("all", "chains", "patch", "within", "evolutions")
LOST = 0.9  # what keeps less of its skill than this is what a remedy is for


def flatten(worlds: Sequence[dict[str, Any]]) -> Records:
    """One row for each (model, seed, task, evolution)."""
    return [{"model": w["model"], "seed": w["seed"], **record} for w in worlds for record in w["records"]]


def spread(records: Records, value: Callable[[dict[str, Any]], float]) -> tuple[float, float]:
    """Mean and standard deviation over the seeds, each of which counts with its mean."""
    seeds = sorted({record["seed"] for record in records})
    means = [statistics.fmean(value(r) for r in records if r["seed"] == seed) for seed in seeds]
    return statistics.fmean(means), statistics.stdev(means) if len(means) > 1 else 0.0


def by_evolution(records: Records) -> list[dict[str, Any]]:
    """For each evolution, in the order of the program: [mean, std over seeds] of each figure."""
    rows = []
    for name in dict.fromkeys(record["evolution"] for record in records):
        group = [record for record in records if record["evolution"] == name]
        row = {
            "evolution": name,
            "moved": spread(group, lambda r: r["scores"]["|D|/|W|"]),
            "evolved": spread(group, lambda r: r["evolved"]),
            "ported": spread(group, lambda r: r["ported"]),
            "kept": spread(group, lambda r: r["kept"]),
        }
        if "refit" in group[0]:
            row["refit"] = spread(group, lambda r: r["refit"]["accuracy"])
            row["residue_to_patch"] = spread(group, lambda r: r["refit"]["residue_to_patch"])
        rows.append(row)
    return rows


def ranking(records: Records) -> list[dict[str, Any]]:
    """How each score ranks the skill kept (Spearman; -1 were perfect), best first by the sum of the figures.

    ``all``: every record. ``chains``: those of the two chains. ``patch``: the evolutions of each model, seed and task
    by themselves, and the mean of these; ``within``: each of its chains by itself, likewise. ``evolutions``: means over
    all models, seeds and tasks. What has kept the same skill throughout has no ranks and is left out.
    """
    chained = [record for record in records if record["evolution"].split()[0] in CHAINS]

    def groups(some: Records, key: Callable[[dict[str, Any]], Any]) -> list[Records]:
        found: dict[Any, Records] = {}
        for record in some:
            found.setdefault(key(record), []).append(record)
        return list(found.values())

    patches = groups(records, lambda r: (r["model"], r["seed"], r["task"]))
    chains = groups(chained, lambda r: (r["model"], r["seed"], r["task"], r["evolution"].split()[0]))
    evolutions = groups(records, lambda r: r["evolution"])
    rows = []
    for name in records[0]["scores"]:

        def rank(some: Records, name: str = name) -> float:
            return spearman([r["scores"][name] for r in some], [r["kept"] for r in some])

        def mean(parts: list[Records], rank: Callable[[Records], float] = rank) -> float:
            values = [value for value in map(rank, parts) if value == value]
            return statistics.fmean(values) if values else float("nan")

        means = [
            [statistics.fmean(value) for value in zip(*((r["scores"][name], r["kept"]) for r in some), strict=True)]
            for some in evolutions
        ]
        figures = {"all": rank(records), "chains": rank(chained), "patch": mean(patches), "within": mean(chains)}
        rows.append({"score": name, **figures, "evolutions": spearman(*zip(*means, strict=True))})
    return sorted(rows, key=lambda row: sum(row[key] for key in RANKINGS))


def remedies(records: Records) -> list[dict[str, Any]]:
    """By how much each remedy changes the skill kept, [mean, std over seeds], where it was lost and where not."""
    tried = [record for record in records if "remedies" in record]
    parts = {"lost": [r for r in tried if r["kept"] < LOST], "not lost": [r for r in tried if r["kept"] >= LOST]}
    rows = []
    for name in tried[0]["remedies"]:
        row: dict[str, Any] = {"remedy": name}
        for part, some in parts.items():
            if some:
                row[part] = spread(some, lambda r, name=name: r["remedies"][name] - r["kept"])
                row[f"{part}, better"] = statistics.fmean(r["remedies"][name] > r["kept"] for r in some)
        rows.append(row)
    return rows


def costs(records: Records) -> dict[str, dict[str, float]]:
    """Medians of port and refit, and how many times more the refit takes."""
    refitted = [record for record in records if "refit" in record]
    result: dict[str, dict[str, float]] = {
        way: {key: statistics.median(r[way][key] for r in refitted) for key in ("seconds", "extra_bytes")}
        for way in ("port", "refit")
    }
    ratio = result["refit"]["seconds"] / result["port"]["seconds"]
    return result | {"refit / port": {"seconds": ratio}}


def summarise(worlds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    records = flatten(worlds)
    tasks = list(dict.fromkeys(record["task"] for record in records))
    models = list(dict.fromkeys(record["model"] for record in records))
    evolutions = list(dict.fromkeys(record["evolution"] for record in records))

    def kept(key: str, value: str) -> dict[str, Any]:
        some = [r for r in records if r[key] == value]
        return {e: spread([r for r in some if r["evolution"] == e], lambda r: r["kept"]) for e in evolutions}

    def on_base(key: str, task: str) -> tuple[float, float]:
        return spread([{"seed": w["seed"], "value": w[key][task]} for w in worlds], lambda r: r["value"])

    return {
        "base": {task: {"base": on_base("base", task), "patched": on_base("patched", task)} for task in tasks},
        "evolutions": by_evolution(records),
        "kept by task": {task: kept("task", task) for task in tasks},
        "kept by model": {model: kept("model", model) for model in models},
        "ranking": ranking(records),
        "remedies": remedies(records),
        "costs": costs(records),
    }


def print_summary(summary: dict[str, Any]) -> None:
    rows = [("task", "base", "base + patch")]
    rows += [(task, _percent(a["base"]), _percent(a["patched"])) for task, a in summary["base"].items()]
    _table("Accuracy on the base, mean ± std over seeds", rows)
    rows = [("evolution", "moved", "evolved", "+ patch", "refit", "skill kept", "|R|/|Δ|")]
    for row in summary["evolutions"]:
        refit, residue = row.get("refit"), row.get("residue_to_patch")
        cells = (_percent(row[key]) for key in ("moved", "evolved", "ported"))
        rest = (_percent(refit) if refit else "", _percent(row["kept"]), _number(residue) if residue else "")
        rows.append((row["evolution"], *cells, *rest))
    _table("Evolutions, over all tasks and models (moved: |θ'-θ|/|θ| of the linear layers)", rows)
    for what in ("task", "model"):
        columns = summary[f"kept by {what}"]
        rows = [("evolution", *columns)]
        for evolution in next(iter(columns.values())):
            rows.append((evolution, *(_percent(column[evolution]) for column in columns.values())))
        _table(f"Skill kept by {what}", rows)
    rows = [("score", "all", "the chains", "each patch", "each chain", "evolutions")]
    rows += [(row["score"], *(f"{row[key]:+.2f}" for key in RANKINGS)) for row in summary["ranking"]]
    _table("Spearman rank correlation of each score with the skill kept (-1 were perfect)", rows)
    rows = [("remedy", "lost", "better in", "not lost", "better in")]
    for row in summary["remedies"]:
        cells: list[str] = []
        for part in ("lost", "not lost"):
            cells += (_signed(row[part]), f"{row[f'{part}, better']:.0%}") if part in row else ("", "")
        rows.append((row["remedy"], *cells))
    _table(f"What each remedy adds to the skill kept, in points (lost: less than {LOST:.0%} kept)", rows)
    rows = [("", "time", "peak extra memory")]
    for way, cost in summary["costs"].items():
        memory = f"{cost['extra_bytes'] / 1e6:.1f} MB" if "extra_bytes" in cost else ""
        time = f"{cost['seconds'] * 1e3:.1f} ms" if "extra_bytes" in cost else f"{cost['seconds']:.0f} x"
        rows.append((way, time, memory))
    _table("Costs, medians, one thread", rows)


def plot(records: Records, place: Path) -> list[Path]:
    """Skill kept against the distance evolved; writes ``place`` with .png and .svg. ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = "portability"  # the same file from the same figures
    figure, axes = plt.subplots(figsize=(7, 4.2))
    rows = by_evolution(records)
    for chain, colour in zip(CHAINS, ("#b3443c", "#2f6f9f"), strict=True):
        steps = [row for row in rows if row["evolution"].split()[0] == chain]
        x, y, error = ([_at(row, *key) for row in steps] for key in (("moved", 0), ("kept", 0), ("kept", 1)))
        label = {"full": "trained on, all weights", "LoRA": "trained on, merged LoRAs"}[chain]
        axes.errorbar(x, y, error, marker="o", markersize=4, capsize=2, color=colour, label=f"{label} (1 to 10 steps)")
    for row in rows:
        if row["evolution"].split()[0] not in CHAINS:
            x, y = 100 * row["moved"][0], 100 * row["kept"][0]
            axes.errorbar(x, y, 100 * row["kept"][1], marker="s", markersize=4, capsize=2, color="#777777")
            axes.annotate(row["evolution"], (x, y), xytext=(6, 4), textcoords="offset points", fontsize=8)
    axes.set_xscale("log")
    axes.set_xlim(right=4 * axes.get_xlim()[1])  # room for the names
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("distance evolved, |θ'-θ| / |θ| of the linear layers, %")
    axes.set_ylabel("skill kept, %")
    axes.axhline(0, color="#bbbbbb", linewidth=0.8)
    axes.set_title("Tiny models; mean over tasks and architectures, bars: std over seeds", fontsize=9)
    axes.legend(fontsize=8, loc="lower left")
    axes.grid(alpha=0.25)
    figure.tight_layout()
    files = [place.with_suffix(ending) for ending in (".png", ".svg")]
    for file in files:
        figure.savefig(file, dpi=130, metadata={"Date": None} if file.suffix == ".svg" else {})
    plt.close(figure)
    return files


def _at(row: dict[str, Any], key: str, index: int) -> float:
    return 100 * row[key][index]


def _percent(value: Sequence[float]) -> str:
    return f"{100 * value[0]:.1f} ± {100 * value[1]:.1f}"


def _signed(value: Sequence[float]) -> str:
    return f"{100 * value[0]:+.1f} ± {100 * value[1]:.1f}"


def _number(value: Sequence[float]) -> str:
    return f"{value[0]:.2f} ± {value[1]:.2f}"


def _table(title: str, rows: Iterable[tuple[str, ...]]) -> None:
    rows = list(rows)
    print(f"\n{title}")
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        print("  " + "  ".join(cells).rstrip())
