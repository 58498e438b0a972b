"""The paper's claim in the small: a patch learned on a base goes onto the evolved base, without training.

A small Mistral-type model is pretrained on text A, and a LoRA teaches it a task. The base is then pretrained
further on text B, all its weights, and the old LoRA is added to what has become of it. The tables show what
this keeps, and what it costs beside PEFT's merge. The numbers are whatever they are; the exit code is 1 only
if the port itself is wrong.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # all is made here; no library shall look for anything elsewhere

import argparse
import copy
import json
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from report import print_result
from sizes import relative_move, relative_sizes, residue_to_patch
from torch import Tensor, nn
from toy import (
    Score,
    World,
    evolve,
    learn_patch,
    load_model,
    new_model,
    parameter_count,
    pretrain,
    quieten,
    score,
)

import portllm

HERE = Path(__file__).resolve().parent
LOGITS_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Evolution:
    """Continued pretraining of all weights: its peak learning rate, and the share of A among the text."""

    rate: float
    replay: float


GENTLE = Evolution(rate=3e-4, replay=0.25)  # a tenth of the pretraining's rate
HARSH = Evolution(rate=1e-3, replay=0.0)


@dataclass(frozen=True)
class Budget:
    """Steps of each training and between two looks at it, and runs of each measurement."""

    pretrain: int = 250
    patch: int = 150
    evolve: int = 100
    look: int = 20
    runs: int = 5


QUICK = Budget(pretrain=120, patch=110, evolve=40, runs=3)


@dataclass(frozen=True)
class Folders:
    base: Path
    patch: Path
    evolved: Path
    patched: Path
    refit: Path
    other: Path
    scratch: Path

    @classmethod
    def within(cls, root: Path) -> Folders:
        return cls(**{field.name: root / field.name for field in fields(cls)})


class Log:
    """Says what has been done, and keeps how long each stage took."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._start = self._last = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def done(self, stage: str, text: str) -> None:
        now = time.perf_counter()
        self.seconds[stage], self._last = now - self._last, now
        print(f"{now - self._start:5.1f} s  {text}", file=self._stream, flush=True)


def main() -> int:
    arguments = parse_arguments()
    quieten()
    # One thread: fast enough at this size, the same result on any number of cores, unhurt by busy neighbours.
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    log = Log(sys.stderr if arguments.json else sys.stdout)
    with tempfile.TemporaryDirectory(prefix="portllm-demo-") as temporary:
        folders = Folders.within(arguments.workdir or Path(temporary))
        result = run(folders, arguments.seed, arguments.quick, log)
    if arguments.json:
        print(json.dumps(result, indent=2))
    else:
        print_result(result)
    return 0 if result["port_is_right"] else 1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workdir", type=Path, help="keep the models and patches here (new or empty)")
    parser.add_argument("--seed", type=int, default=0, help="of language, weights and batches (default: 0)")
    parser.add_argument("--quick", action="store_true", help="train less; no harsh evolution, no second seed")
    parser.add_argument("--json", action="store_true", help="print a JSON object; progress goes to stderr")
    arguments = parser.parse_args()
    place = arguments.workdir
    if place and place.exists() and (not place.is_dir() or any(place.iterdir())):
        parser.error(f"{place} is not an empty directory; name a new one")
    return arguments


def run(folders: Folders, seed: int, is_quick: bool, log: Log) -> dict[str, Any]:
    budget = QUICK if is_quick else Budget()
    world = World(seed)
    scores: dict[str, Score] = {}

    base = new_model(world)
    pretrain(base, world, budget.pretrain)
    base.save_pretrained(folders.base)
    scores["base"] = score(base, world)
    log.done("base", f"base: {parameter_count(base):,} parameters, {budget.pretrain} steps on text A")

    scores["base + patch"] = learn_and_save(folders.base, folders.patch, world, budget.patch)
    patch = portllm.Patch.load(folders.patch)
    log.done("patch", f"patch: LoRA, r=8, all seven projections (our choice), {budget.patch} steps")

    evolved = load_model(folders.base)
    paths = [evolve_and_look(evolved, base, world, patch, budget, GENTLE)]
    evolved.save_pretrained(folders.evolved, max_shard_size="500KB")
    scores["evolved"] = score(evolved, world)
    log.done("evolve", f"evolution: all weights, {budget.evolve} steps on B with {GENTLE.replay:.0%} of A")

    on_disk = ported_on_disk(folders)
    live = load_model(folders.evolved)
    applied = portllm.apply(live, patch)
    scores["evolved + patch (portllm, on disk)"] = score(on_disk, world)
    scores["evolved + patch (portllm, live)"] = score(live, world)
    checks = check(evolved, on_disk, live, merged_by_peft(folders), patch, world)
    log.done("port", "port: `portllm apply` on disk, portllm.apply live, PEFT to compare")

    scores["evolved + refit"] = learn_and_save(folders.evolved, folders.refit, world, budget.patch)
    refit = portllm.Patch.load(folders.refit)
    sizes = relative_sizes(base.state_dict(), evolved.state_dict(), live.state_dict(), patch, refit)
    log.done("refit", "refit: a new patch learned on the evolved model, same budget, same seed")

    applied.remove()
    undo = compare_undone(evolved, live, patch)
    if not is_quick:
        paths.append(evolve_and_look(load_model(folders.base), base, world, patch, budget, HARSH))
        log.done("harsh", "a harsh evolution from the same base: no A, a higher rate")
        learn_and_save(folders.base, folders.other, world, budget.patch, seed=1)
        sizes["other_seed_to_patch"] = residue_to_patch(portllm.Patch.load(folders.other), patch)
        log.done("other seed", "another patch of the base: same budget, other seed")

    costs = measured(folders, budget.runs)
    log.done("costs", f"costs: {len(costs)} ways, each in a process of its own, {budget.runs} runs")
    return {
        "seed": seed,
        "quick": is_quick,
        "versions": {"portllm": portllm.__version__, "torch": torch.__version__},
        "budget": asdict(budget),
        "parameters": {"model": parameter_count(base), "patch": patch.num_parameters},
        "scores": {name: asdict(value) for name, value in scores.items()},
        "along_the_evolution": paths,
        "relative_sizes": sizes,
        "costs": costs,
        "checks": checks,
        "undo": undo,
        "port_is_right": all(entry["passed"] for entry in checks.values()),
        "seconds": log.seconds,
    }


def learn_and_save(model: Path, out: Path, world: World, steps: int, seed: int = 0) -> Score:
    tuned = learn_patch(load_model(model), world, steps, seed)
    tuned.save_pretrained(out)
    return score(tuned, world)


def evolve_and_look(
    model: nn.Module, base: nn.Module, world: World, patch: portllm.Patch, budget: Budget, way: Evolution
) -> dict[str, Any]:
    """Evolve ``model``; on the way, port the patch to copies of it."""
    looks: list[dict[str, Any]] = []

    def look(step: int) -> None:
        if step % budget.look == 0:
            now = copy.deepcopy(model)
            moved = relative_move(now.state_dict(), base.state_dict(), target_names(patch))
            portllm.apply(now, patch)
            looks.append({"step": step, "moved": moved} | asdict(score(now, world)))

    evolve(model, world, budget.evolve, way.rate, way.replay, look)
    return asdict(way) | {"patched": looks}


def target_names(patch: portllm.Patch) -> list[str]:
    return [f"{entry.module}.weight" for entry in patch.entries]


def ported_on_disk(folders: Folders) -> nn.Module:
    paths = [str(folders.patch), str(folders.evolved), "-o", str(folders.patched)]
    read_json([sys.executable, "-m", "portllm", "apply", *paths, "--json"])
    return load_model(folders.patched)


def merged_by_peft(folders: Folders) -> nn.Module:
    return PeftModel.from_pretrained(load_model(folders.evolved), folders.patch).merge_and_unload().eval()


def measured(folders: Folders, runs: int) -> dict[str, dict[str, float]]:
    arguments = [folders.evolved, folders.patch, folders.scratch, runs]
    return read_json([sys.executable, str(HERE / "measure.py"), *map(str, arguments)])


def read_json(command: list[str]) -> dict[str, Any]:
    """What a command prints; its errors go straight to stderr. Raises SystemExit if it fails."""
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"exit code {done.returncode} from: {' '.join(command)}")
    return json.loads(done.stdout)


def check(
    evolved: nn.Module,
    on_disk: nn.Module,
    live: nn.Module,
    merged: nn.Module,
    patch: portllm.Patch,
    world: World,
) -> dict[str, dict[str, Any]]:
    """What holds if the port is right, whatever the accuracy."""
    old, disk, new = (model.state_dict() for model in (evolved, on_disk, live))
    agree = disk.keys() == new.keys() and all(same_bits(disk[name], new[name]) for name in new)
    changed = {name for name in old if not same_bits(old[name], new[name])}
    text, _ = world.questions(64, random.Random(world.seed))
    with torch.no_grad():
        gap = (live(input_ids=text).logits - merged(input_ids=text).logits).abs().max().item()
    is_close = gap <= LOGITS_TOLERANCE
    return {
        "live and on disk have the same bits": {"passed": agree, "tensors": len(new)},
        "the patch's targets changed, no others": {
            "passed": changed == set(target_names(patch)),
            "changed": len(changed),
        },
        f"logits within {LOGITS_TOLERANCE:g} of PEFT's merge": {"passed": is_close, "largest": gap},
    }


def same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def compare_undone(evolved: nn.Module, undone: nn.Module, patch: portllm.Patch) -> dict[str, float]:
    old, new = evolved.state_dict(), undone.state_dict()
    names = target_names(patch)
    same = sum(int((old[name] == new[name]).sum()) for name in names)
    return {
        "same_bits": same / sum(old[name].numel() for name in names),
        "largest": max((old[name] - new[name]).abs().max().item() for name in names),
    }


if __name__ == "__main__":
    sys.exit(main())
